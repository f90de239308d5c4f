"""The scores that people compare adapters by, in one order and one spelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# name in a bundle's metrics → label, how it is shown
SCORES: Mapping[str, tuple[str, str]] = {
    "loss": ("Loss", "{:.3f}"),
    "bleu4": ("BLEU-4", "{:.1f}"),
    "chrf": ("chrF", "{:.1f}"),
    "exact_match": ("Exact match", "{:.1%}"),
    "wer": ("Word errors", "{:.1%}"),
    "retrieval_r1_text": ("R@1", "{:.1%}"),
}


class Score(NamedTuple):
    """How a score is called and shown, and whether more of it is better."""

    label: str
    form: str
    higher: bool = True


# also what is in no table of adapters
ALL_SCORES: Mapping[str, Score] = {
    **{name: Score(label, form, name not in ("loss", "wer")) for name, (label, form) in SCORES.items()},
    "rouge_l": Score("ROUGE-L", "{:.1f}"),
    "cider": Score("CIDEr", "{:.2f}"),
    "retrieval_r1_media": Score("R@1 of media", "{:.1%}"),
}


def scores_of(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of every score in SCORES; "" for one that was not measured."""
    return [(label, _shown(form, metrics.get(name))) for name, (label, form) in SCORES.items()]


def _shown(form: str, value: Any) -> str:
    return form.format(value) if isinstance(value, int | float) else ""
