"""The mark: tributaries that feed one river, which fans out again. The page's icon and its first line."""

from __future__ import annotations

from html import escape
from urllib.parse import quote

_PATHS = (
    "M3 8C9 8 9 16 15 16M3 24C9 24 9 16 15 16"
    "M15 16C21 16 22 5 29 5M15 16C22 16 23 12 29 12M15 16C22 16 23 20 29 20M15 16C21 16 22 27 29 27"
)
COLOUR = "#1f978f"


def mark(colour: str = "currentColor") -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" fill="none" aria-hidden="true" '
        f'stroke="{colour}" stroke-width="2.6" stroke-linecap="round"><path d="{_PATHS}"/></svg>'
    )


def icon() -> str:
    """A link element that carries the icon itself: nothing is fetched for it."""
    return f'<link rel="icon" type="image/svg+xml" href="data:image/svg+xml,{quote(mark(COLOUR))}">'


def header(base: str, aside: str) -> str:
    """The page's first line. `aside` is HTML."""
    return (
        f'<header class="okv-head">{mark()}<b>Okavango</b>'
        f'<span class="okv-right">base {escape(base)} {aside}</span></header>'
    )
