"""A batch as one sequence without padding between its rows, for GPUs, which have kernels for that.

What the rows begin with in common comes once, as in packing, then every row's own tokens. At the end stands a
row of nothing, which fills the sequence up to one of a few sizes: batches of one size are computed by the
same launches, which training.graphs records and replays.
"""

# Shapes: B rows, T tokens of the sequence, M keys of all its parts, S parts: what is shared, the rows, the
#         filling and empty ones; H heads, K kv heads, D head width

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

_STEP = 128  # sizes are multiples of it
_STEPS_AN_OCTAVE = 8
_PARTS = 8  # so are numbers of parts of this


@dataclass(frozen=True)
class Tight:
    """How [1, T] is laid out.

    Attributes:
        shared: tokens that all rows begin with.
        places: [T] each token's position in its own row.
        keys: [M] the token of each key, part after part; None where keys are the tokens as they come.
        query_ends, key_ends: [S + 1] where parts begin and end, among tokens and among keys.
        longest: tokens, and keys, of the longest part, rounded up.
    """

    shared: int
    places: Tensor
    keys: Tensor | None
    query_ends: Tensor
    key_ends: Tensor
    longest: tuple[int, int]

    @property
    def size(self) -> tuple[Any, ...]:
        """What is the same for layouts that the same launches compute."""
        keys = None if self.keys is None else len(self.keys)
        return len(self.places), keys, len(self.query_ends), self.longest

    def positions(self, device: torch.device) -> Tensor:
        """[1, T] position of each token in its own row."""
        return self.places.to(device)[None]

    def to(self, device: torch.device) -> Tight:
        names = ("places", "keys", "query_ends", "key_ends")
        return replace(
            self, **{name: own.to(device) for name in names if (own := getattr(self, name)) is not None}
        )


def tight_layout(shared: int, lengths: Sequence[int]) -> Tight:
    """The layout of rows that share a beginning and have so many tokens of their own each."""
    own = shared + sum(lengths)
    total = rounded(own + 1)
    filling = total - own
    queries = [*([shared] if shared else []), *lengths, filling]
    places = [np.arange(shared), *(np.arange(shared, shared + n) for n in lengths), np.arange(filling)]
    keys = None
    key_counts = queries
    if shared:
        common, starts = np.arange(shared), shared + np.cumsum([0, *lengths])
        rows = [np.r_[common, start:end] for start, end in itertools.pairwise(starts)]
        parts = [common, *rows]
        count = sum(map(len, parts))
        # the filling sees itself, and its last token more than once
        parts.append(np.r_[np.full(rounded(count + filling) - count - filling, total - 1), own:total])
        keys, key_counts = torch.from_numpy(np.concatenate(parts)), [len(part) for part in parts]
    empty = -len(queries) % _PARTS
    return Tight(
        shared=shared,
        places=torch.from_numpy(np.concatenate(places)),
        keys=keys,
        query_ends=_ends(queries, empty),
        key_ends=_ends(key_counts, empty),
        longest=(_power(max(queries)), _power(max(key_counts))),
    )


def rounded(count: int, steps_an_octave: int = _STEPS_AN_OCTAVE) -> int:
    """The next size that is used: so many between a power of two and the next."""
    step = max(_STEP, (1 << count.bit_length() - 1) // steps_an_octave)
    return -(-count // step) * step


def attend_tightly(
    query: Tensor, key: Tensor, value: Tensor, layout: Tight, scale: float, window: int | None
) -> Tensor:
    """Query [1, H, T, D], key and value [1, K, T, D] → [1, T, H, D]."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if layout.keys is not None:  # by index, whose backward pass sums in float32 and in a fixed order
        k, v = k[layout.keys], v[layout.keys]
    left = -1 if window is None else window - 1
    ends = layout.query_ends, layout.key_ends
    return _varlen()(q, k, v, *ends, *layout.longest, scale=scale, window_size=(left, 0))[None]


@cache
def _varlen() -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    compute: Any = varlen_attn  # which gives a pair where it is asked for more
    # torch 2.11 takes fewer kv heads without being told to
    is_told = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return partial(compute, enable_gqa=True) if is_told else compute


def _ends(counts: Sequence[int], empty: int) -> Tensor:
    """[S + 1] int32."""
    return torch.from_numpy(np.cumsum([0, *counts, *[0] * empty]).astype(np.int32))


def _power(count: int) -> int:
    """The next power of two, of one step at least."""
    return max(_STEP, 1 << (count - 1).bit_length())
