"""Whether models answer among others as they do alone. Some servers answer a whole batch with one adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Mixing:
    """What one prompt was answered with, alone and in a batch of all models.

    Attributes:
        alike: by model, the share of its lone answer with which its answer among others begins. Rounding may
            part the two at some token even where all is right.
        mistaken: by model, the one whose lone answer it gave among others, or came nearer to than to its own.
        twins: by model, the first whose lone answer is the same: where they should differ, an adapter was
            ignored.
    """

    alike: dict[str, float]
    mistaken: dict[str, str]
    twins: dict[str, str]

    @classmethod
    def of(cls, alone: Mapping[str, str], mixed: Mapping[str, str]) -> Mixing:
        alike, mistaken, twins = {}, {}, {}
        for model, own in alone.items():
            together = mixed[model]
            alike[model] = same_beginning(own, together) / max(1, len(own), len(together))
            nearest = max(alone, key=lambda other: same_beginning(alone[other], together))
            if same_beginning(alone[nearest], together) > same_beginning(own, together):
                mistaken[model] = nearest
            first = next(other for other in alone if alone[other] == own)
            if first != model:
                twins[model] = first
        return cls(alike, mistaken, twins)


def same_beginning(one: str, other: str) -> int:
    """Characters with which both begin."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)
