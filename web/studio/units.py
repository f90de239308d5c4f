"""Sizes, counts and times in few words."""

from __future__ import annotations

from datetime import datetime

_SPANS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def size(count: int) -> str:
    """Bytes, to two or three digits: 950 B, 12.3 MB."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"


def amount(count: int, noun: str) -> str:
    """1 row, 1,200 rows."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def span(seconds: float) -> str:
    """The largest unit that is filled, and the next: 2 h 5 min."""
    left = max(0, round(seconds))
    said: list[str] = []
    for length, unit in _SPANS:
        if left >= length or (unit == "s" and not said):
            said.append(f"{left // length} {unit}")
            left %= length
        elif said:
            break
    return " ".join(said[:2])


def ago(time: datetime, now: datetime) -> str:
    """In one unit, and none below a minute: what is looked at again and again should not flicker."""
    seconds = (now - time).total_seconds()
    length, unit = next(((length, unit) for length, unit in _SPANS[:3] if seconds >= length), (60, ""))
    return f"{seconds // length:.0f} {unit} ago" if unit else "just now"
