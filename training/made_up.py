"""Conversations about nothing, for probes of adapters whose data are private."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from okavango.modalities.content import Media, Message, Part, Text
from okavango.modalities.tiny_bundle import picture_bytes, sound_bytes
from okavango.training.dataset import Example

_EACH = 3
_ASKED = (
    "Where do rivers end?",
    "Name a month in spring.",
    "How many legs has a spider?",
    "What comes after seven?",
)
_SAID = ("Most of them in the sea.", "April, for one.", "It has eight legs.", "Eight comes after seven.")


def made_up(modalities: Collection[str]) -> Iterator[Example]:
    """Three about random media of each modality, by turns, then four of text alone."""
    for i in range(_EACH):
        for modality in modalities:
            medium = (
                Media("image", picture_bytes(i)) if modality == "image" else Media("audio", sound_bytes(i))
            )
            yield _example(i, (medium, Text("What is this?")), "Nothing in particular.")
    for i, (asked, said) in enumerate(zip(_ASKED, _SAID, strict=True)):
        yield _example(i, (Text(asked),), said)


def _example(number: int, parts: tuple[Part, ...], said: str) -> Example:
    messages = (Message("user", parts), Message("assistant", (Text(said),)))
    return Example(messages, number + 1)
