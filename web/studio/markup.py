"""Small pieces of HTML that both pages use. What is not ours is escaped here, and nowhere twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from html import escape
from typing import Any
from urllib.parse import quote

SHORT = 12
"""Characters of a digest that people compare."""


def digest(value: str) -> str:
    """A digest: short to the eye, whole in its tooltip and when it is copied."""
    return (
        f'<code class="okv-digest" {_copy(value)} title="{escape(value)} (click to copy)" '
        f'tabindex="0">{escape(value[:SHORT])}</code>'
    )


def copyable(text: str, label: str) -> str:
    """A word that copies a text when it is clicked."""
    return f'<a class="okv-copy" role="button" tabindex="0" {_copy(text)}>{escape(label)}</a>'


def badge(state: str, tip: str = "") -> str:
    """A version's state, in its colour."""
    return f'<span class="okv-badge okv-{escape(state)}" title="{escape(tip)}">{escape(state)}</span>'


def fault(text: str) -> str:
    """What went wrong, where it happened."""
    return f'<div class="okv-fault" role="alert">{escape(text)}</div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names beside values; the values are HTML already."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in pairs)
    return f'<dl class="okv-facts">{rows}</dl>'


def mapping(values: Mapping[str, Any]) -> str:
    """Whatever a bundle says of itself, by name; nested values by dotted names."""
    return facts((name, _value(value)) for name, value in _flat(values))


def when(time: datetime) -> str:
    return f'<time datetime="{time.isoformat()}" title="UTC">{time:%Y-%m-%d %H:%M}</time>'


def _copy(text: str) -> str:
    """What studio.js copies; encoded, so that control characters and line ends come through as they are."""
    return f'data-copy="{quote(text)}"'


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _value(value: Any) -> str:
    match value:
        case None:
            return "–"
        case float():
            return f"{value:.4g}"
        case str() if _is_digest(value):
            return digest(value)
        case list() | tuple():
            return escape(", ".join(map(str, value)))
    return escape(str(value))


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(char in "0123456789abcdef" for char in text)
