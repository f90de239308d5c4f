"""The formats by name, and which of them a row is written in."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from okavango.platform.errors import ConfigError
from okavango.training.formats import alpaca, openai, sharegpt
from okavango.training.formats.normal import Normal

LOOKED_AT = 1000
"""Rows that are looked at for a format, at most."""


@dataclass(frozen=True)
class Format:
    """A format of rows.

    Attributes:
        keys: what a row may have.
        needed: of them, what it must have.
        normalise: a row → OpenAI's messages.
    """

    name: str
    keys: tuple[str, ...]
    needed: tuple[str, ...]
    normalise: Callable[[Mapping[str, Any]], Normal]

    @property
    def conversation(self) -> str:
        """The field that holds the conversation; "" for the row as a whole."""
        return self.needed[0] if len(self.needed) == 1 else ""


_ALL = (
    Format("openai", openai.KEYS, ("messages",), openai.openai),
    Format("sharegpt", sharegpt.SHAREGPT_KEYS, ("conversations",), sharegpt.sharegpt),
    Format("llava", sharegpt.LLAVA_KEYS, ("conversations",), sharegpt.llava),
    Format("alpaca", alpaca.KEYS, ("instruction", "output"), alpaca.alpaca),
)
FORMATS = {each.name: each for each in _ALL}
NAMES = tuple(FORMATS)


def named_format(name: str) -> Format:
    """Raises ConfigError for a name that is none, with the nearest one."""
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(FORMATS)}"
        raise ConfigError(f"{name!r} is no format of rows", where="format", remedy=hint)
    return FORMATS[name]


def formats_of(row: Any) -> frozenset[str]:
    """Names of the formats that a row may be written in, by its keys alone; none if they do not tell."""
    if not isinstance(row, Mapping):
        return frozenset()
    found = {key for key in ("messages", "conversations", "instruction") if row.get(key) is not None}
    if found == {"messages"}:
        return frozenset(("openai",))
    if found == {"instruction"}:
        return frozenset(("alpaca",))
    if found != {"conversations"}:
        return frozenset()
    if row.get("image") is not None:
        return frozenset(("llava",))
    is_sharegpt = any(row.get(key) is not None for key in ("system", "images", "audios"))
    return frozenset(("sharegpt",)) if is_sharegpt else frozenset(("sharegpt", "llava"))


def detect(rows: Iterable[Any]) -> Format | None:
    """The format of the first rows; None if none of them tells. A later row of another is a fault of its
    own (training.rows), so that a wrong guess does not go unnoticed."""
    fitting: frozenset[str] = frozenset()
    for row in rows:
        found = formats_of(row)
        fitting = (fitting & found or fitting) if fitting else found
        if len(fitting) == 1:
            break
    return next((each for each in _ALL if each.name in fitting), None)
