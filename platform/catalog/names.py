"""Names of bases, adapters and aliases, and the references made of them: emoji, emoji@3, emoji@prod."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from okavango.platform.errors import InputError

DEFAULT_ALIAS = "prod"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_VERSION_DIGITS = 9  # what fits the integers of every database
_RULE = "1 to 64 of a-z, 0-9, dot, underscore and hyphen, starting with a letter or digit"


@dataclass(frozen=True)
class Ref:
    """An adapter, and at most one of a version and an alias."""

    adapter: str
    version: int | None = None
    alias: str | None = None


def parse_ref(text: str) -> Ref:
    """ "emoji" | "emoji@3" | "emoji@prod" → Ref.

    Raises:
        InputError: nothing before or after the "@", or a number that no version can have.
    """
    adapter, at, label = text.partition("@")
    if not adapter or (at and not label):
        raise InputError(
            f"{text!r} names no adapter version", remedy="write ADAPTER, ADAPTER@3 or ADAPTER@prod"
        )
    if _is_number(label):
        if len(label) > _VERSION_DIGITS:
            raise InputError(f"a version number has at most {_VERSION_DIGITS} digits", where=text[:80])
        return Ref(adapter, version=int(label))
    return Ref(adapter, alias=label or None)


def check_name(name: str, what: str) -> None:
    """Raises InputError where a base's or adapter's name breaks the rule. `what` is put before the name."""
    if not _NAME.fullmatch(name):
        raise InputError(f"is not a name: {_RULE}", where=f"{what} {name!r}")


def check_alias(name: str) -> None:
    """As check_name; a number alone would read as a version."""
    check_name(name, "alias")
    if _is_number(name):
        raise InputError("reads as a version number", where=f"alias {name!r}", remedy="add a letter")


def near(name: str, known: Iterable[str], none: str) -> str:
    """A remedy that names what was perhaps meant, or else some of what there is, or else `none`."""
    names = sorted(known)
    if not names:
        return none
    close = difflib.get_close_matches(name, names, n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()
