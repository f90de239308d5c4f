"""Settings: built once at start, frozen, passed down as plain values. The only reader of the environment.

Knows nothing of torch, SQL or the web.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from okavango.platform.errors import ConfigError

PREFIX = "OKAVANGO_"


@dataclass(frozen=True)
class Settings:
    """Where things live. Every field can be set as OKAVANGO_<FIELD> in the environment.

    Attributes:
        home: what must not be lost: the catalog's SQLite file, artifacts, jobs' checkpoints.
        cache: what can be rebuilt: downloads, bases, encoder features.
        database_url: SQLAlchemy URL; "" means SQLite in `home`.
        artifacts_url: fsspec URL of the artifact store; "" means a folder in `home`.
        mlflow_url: of an MLflow tracking server that training jobs are logged to; "" means none.
        api_keys: comma-separated bearer keys; with none, the server binds to loopback only.
    """

    home: Path = Path("~/.okavango")
    cache: Path = Path("~/.cache/okavango")
    database_url: str = ""
    artifacts_url: str = ""
    mlflow_url: str = ""
    api_keys: str = ""

    def __post_init__(self) -> None:
        for name in ("home", "cache"):
            object.__setattr__(self, name, Path(getattr(self, name)).expanduser().absolute())

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'catalog.db'}"

    @property
    def artifacts(self) -> str:
        return self.artifacts_url or str(self.home / "artifacts")

    @property
    def bases(self) -> Path:
        return self.cache / "bases"

    @property
    def downloads(self) -> Path:
        return self.cache / "downloads"

    @property
    def features(self) -> Path:
        return self.cache / "features"

    @property
    def data(self) -> Path:
        """Archives unpacked, and tables as Arrow."""
        return self.cache / "data"

    @property
    def jobs(self) -> Path:
        return self.home / "jobs"

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(key.strip() for key in self.api_keys.split(",") if key.strip())


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from the environment.

    Raises:
        ConfigError: an OKAVANGO_ variable that is no setting, with the nearest one named.
    """
    environ = os.environ if environ is None else environ
    known = {field.name for field in fields(Settings)}
    values = {}
    for variable, value in environ.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in known:
            raise ConfigError("unknown setting", where=variable, remedy=_nearest(name, known))
        values[name] = value
    return Settings(**values)  # type: ignore[arg-type]


def environment_of(settings: Settings) -> dict[str, str]:
    """This process's environment for one that it starts, with these settings and no API keys."""
    other = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    own = {field.name: str(getattr(settings, field.name)) for field in fields(Settings)}
    return other | {f"{PREFIX}{name.upper()}": value for name, value in own.items() if name != "api_keys"}


@contextmanager
def overlaid(values: Mapping[str, str]) -> Iterator[None]:
    """Within, this process's environment holds these, too: for libraries that ask nothing else."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {PREFIX}{close[0].upper()}?"
    return "known are " + ", ".join(sorted(PREFIX + k.upper() for k in known))
