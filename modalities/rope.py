"""Positions in three dimensions: M-RoPE, as Qwen's vision-language decoders have it (Wang et al. 2024).

A text's tokens count on as ever. A picture's positions share one count for time, and have their row's and
their column's number on top of it for height and width; what follows counts on after the larger of the two.
Of the rotation's frequencies each dimension turns its own section. With text alone the three are one, so the
decoder is a plain one, which gets this in place of its rotary embedding.
"""

# Shapes: B rows, T positions of a call, D head width

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from okavango.modalities.prompt import Span

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SECTIONS = "okavango_rope_sections"
"""In a decoder's config: how many frequencies turn with time, height and width."""


class GridRope(nn.Module):
    """A decoder's rotary embedding, by places in three dimensions within `at`, as it was elsewhere."""

    def __init__(self, plain: Any, sections: Sequence[int]) -> None:
        super().__init__()
        self.plain = plain
        self._sections = list(sections)
        self._places: Tensor | None = None
        self._shift: Tensor | None = None

    @contextmanager
    def at(self, places: Tensor | None, shift: Tensor | None = None) -> Iterator[None]:
        """Within, calls of T positions are at `places` [3, B, T]; others, of an answer that goes on, are
        `shift` [B] beyond what they are told."""
        self._places, self._shift = places, shift
        try:
            yield
        finally:
            self._places = self._shift = None

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, D]."""
        places = self._places
        if places is None:
            found: tuple[Tensor, Tensor] = self.plain(x, position_ids)
            return found
        if position_ids.shape[-1] != places.shape[-1]:
            assert self._shift is not None, "an answer goes on, and nobody says where"
            places = (position_ids + self._shift[:, None]).expand(3, -1, -1)
        turns = [self.plain(x, places[axis]) for axis in range(3)]
        cos, sin = (self._merged([turn[i] for turn in turns]) for i in range(2))
        return cos, sin

    def _merged(self, axes: Sequence[Tensor]) -> Tensor:
        """Each section of the frequencies from its own axis; they stand twice side by side."""
        sections = self._sections * 2
        parts = [axis.split(sections, dim=-1) for axis in axes]
        return torch.cat([parts[i % 3][i] for i in range(len(sections))], dim=-1)


def install_rope(decoder: PreTrainedModel) -> None:
    """Put a GridRope into a decoder whose config asks for one."""
    sections = getattr(decoder.config, SECTIONS, None)
    if sections is not None:
        inner: Any = getattr(decoder, decoder.base_model_prefix)
        inner.rotary_emb = GridRope(inner.rotary_emb, sections)


def rope_of(decoder: nn.Module) -> GridRope | None:
    return next((module for module in decoder.modules() if isinstance(module, GridRope)), None)


def places_of(length: int, spans: Sequence[Span]) -> tuple[NDArray[np.int64], int]:
    """[3, length] places of a prompt's tokens, and that of the token after the last."""
    places = np.empty((3, length), np.int64)
    count = done = 0
    for span in (*(span for span in spans if span.grid is not None), None):
        until = span.start if span is not None else length
        places[:, done:until] = np.arange(count, count + until - done)
        count += until - done
        done = until
        if span is not None and span.grid is not None:
            rows, columns = span.grid
            down, across = np.divmod(np.arange(rows * columns), columns)
            places[:, done : span.end] = count + np.stack([np.zeros_like(down), down, across])
            count, done = count + max(rows, columns), span.end
    return places, count
