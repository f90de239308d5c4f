"""Settings: built once at start, frozen, passed down as plain values. The only reader of the environment.

Knows nothing of torch, SQL or the web.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
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
        api_keys: comma-separated bearer keys; with none, the server binds to loopback only.
    """

    home: Path = Path("~/.okavango")
    cache: Path = Path("~/.cache/okavango")
    database_url: str = ""
    artifacts_url: str = ""
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


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {PREFIX}{close[0].upper()}?"
    return "known are " + ", ".join(sorted(PREFIX + k.upper() for k in known))
