"""The scores that people compare adapters by, in one order and one spelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# name in a bundle's metrics → label, how it is shown
SCORES: Mapping[str, tuple[str, str]] = {
    "loss": ("Loss", "{:.3f}"),
    "bleu4": ("BLEU-4", "{:.1f}"),
    "chrf": ("chrF", "{:.1f}"),
    "exact_match": ("Exact match", "{:.1%}"),
}


def scores_of(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of every score in SCORES; "" for one that was not measured."""
    return [(label, _shown(form, metrics.get(name))) for name, (label, form) in SCORES.items()]


def _shown(form: str, value: Any) -> str:
    return form.format(value) if isinstance(value, int | float) else ""
