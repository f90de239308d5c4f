from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from okavango.platform.config import Settings, load_settings
from okavango.platform.errors import ConfigError


def test_without_an_environment_all_lives_in_home() -> None:
    settings = load_settings({})
    home = Path.home() / ".okavango"
    assert settings.database == f"sqlite:///{home}/catalog.db"
    assert settings.artifacts == str(home / "artifacts")
    assert settings.jobs == home / "jobs"
    assert settings.bases == Path.home() / ".cache/okavango/bases"
    assert settings.keys == ()


def test_every_field_is_a_variable() -> None:
    values = {field.name: f"/value/of/{field.name}" for field in fields(Settings)}
    settings = load_settings({f"OKAVANGO_{name.upper()}": value for name, value in values.items()})
    assert {name: str(getattr(settings, name)) for name in values} == values


def test_urls_win_over_home() -> None:
    settings = load_settings(
        {
            "OKAVANGO_HOME": "/data",
            "OKAVANGO_DATABASE_URL": "postgresql+psycopg://db/okavango",
            "OKAVANGO_ARTIFACTS_URL": "s3://bucket/okavango",
        }
    )
    assert settings.database == "postgresql+psycopg://db/okavango"
    assert settings.artifacts == "s3://bucket/okavango"
    assert settings.jobs == Path("/data/jobs")


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"OKAVANGO_DATABSE_URL: .*did you mean OKAVANGO_DATABASE_URL"):
        load_settings({"OKAVANGO_DATABSE_URL": "x"})
    with pytest.raises(ConfigError, match=r"known are .*OKAVANGO_HOME"):
        load_settings({"OKAVANGO_ZZZZ": "x"})


def test_other_programs_variables_are_theirs() -> None:
    assert load_settings({"HOME": "/x", "OKAVANGOS": "y", "okavango_home": "z"}) == load_settings({})


def test_paths_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever folder a worker is started in later."""
    monkeypatch.chdir(tmp_path)
    settings = load_settings({"OKAVANGO_HOME": "data", "OKAVANGO_CACHE": "~/cache"})
    assert settings.home == tmp_path / "data"
    assert settings.cache == Path.home() / "cache"


def test_keys_are_separated_by_commas() -> None:
    assert load_settings({"OKAVANGO_API_KEYS": " a, b ,,c"}).keys == ("a", "b", "c")


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        load_settings({}).home = Path("/elsewhere")  # type: ignore[misc]
