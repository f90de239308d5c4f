"""Paged attention behind transformers' AttentionInterface: any architecture that uses it is served unchanged.

Every layer's attention module gets its own `LayerCache`; all of them share one `StepLayout`, which says where
the step's rows go and what they may see. Plain torch: the reference for every faster kernel.

A masked position counts for nothing only if its value is a number: zero times nan is nan. So no sequence
reads a block that another one writes (those that share one find it full), and what a former holder left in a
block is wiped before it is read.
"""

# Shapes: T rows of the step, N blocks, P positions a block, H heads, K kv heads, G = H / K, D head width,
#         B decoding sequences, S positions a sequence sees

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from okavango.modalities.memory import lazy_zeros
from okavango.platform.errors import UnsupportedError

NAME = "okavango_paged"
MEASURE = "okavango_measure"
UNSERVED = ("s_aux", "sinks", "softcap", "position_bias", "head_mask", "indices", "block_indices")


@dataclass(frozen=True)
class Prefill:
    """Rows [start, end) are one sequence's positions from `seen` on; `blocks`: [its blocks].

    Positions are counted from the first block that the sequence still holds: no row sees what stood before.
    Those in a range of `mutual` see each other, later ones too. Masks are made once a step, by window, for
    all layers.
    """

    start: int
    end: int
    seen: int
    blocks: Tensor
    mutual: Sequence[tuple[int, int]] = ()
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.seen + self.end - self.start

    def mask(self, window: int | None) -> Tensor | None:
        """[rows, total], what each row sees; None where that is all that stands before it."""
        if self.seen == 0 and not self.mutual and (window is None or window >= self.total):
            return None
        if window not in self.masks:
            positions = torch.arange(self.seen, self.total, device=self.blocks.device)
            self.masks[window] = _visible(positions, self.total, window, self.mutual)
        return self.masks[window]


@dataclass(frozen=True)
class Decode:
    """Rows that are each one sequence's newest position.

    Attributes:
        rows: [B] row numbers.
        blocks: [B * blocks of the longest], each row's padded with blocks of its own.
        lengths: [B] positions in these blocks, the row's own included.
    """

    rows: Tensor
    blocks: Tensor
    lengths: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def hidden(self, total: int, window: int | None) -> Tensor:
        """[B, 1, total]: which of the gathered positions a row does not see."""
        if window not in self.masks:
            self.masks[window] = ~_visible(self.lengths - 1, total, window)[:, None]
        return self.masks[window]


@dataclass
class StepLayout:
    """The step's rows: where their keys and values are written, and what each attends to.

    Attributes:
        slots: [T] positions in N * P.
        unfilled: blocks that the step begins and does not fill.
        decodes: of similar length in each, so that padding stays small.
        calls: attention calls so far, so that a model which goes round the interface is noticed.
    """

    slots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    unfilled: Tensor | None = None
    prefills: Sequence[Prefill] = ()
    decodes: Sequence[Decode] = ()
    calls: int = 0


@dataclass(frozen=True)
class LayerShape:
    """One layer's kv heads, the widths of a key and of a value, how many positions it sees (None: all), and
    what it scales scores by."""

    heads: int
    key_width: int
    value_width: int
    window: int | None = None
    scale: float | None = None


@dataclass(frozen=True)
class KeyValues:
    """One layer's keys and values as blocks: [K, N, P, D] each, wherever they lie."""

    keys: Tensor
    values: Tensor
    window: int | None


class LayerCache:
    """One layer's keys and values, in separate storages: [K, N, P, D] each.

    Heads come first, so that what is gathered for a batch is multiplied as it lies.
    """

    def __init__(
        self,
        shape: LayerShape,
        blocks: int,
        block_size: int,
        layout: StepLayout,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.window = shape.window
        self.keys = lazy_zeros((shape.heads, blocks, block_size, shape.key_width), dtype, device)
        self.values = lazy_zeros((shape.heads, blocks, block_size, shape.value_width), dtype, device)

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Store [K, T, D] at the step's slots."""
        if self.layout.unfilled is not None:
            # keys may be anything: where they are masked, their scores are replaced
            self.values.index_fill_(1, self.layout.unfilled, 0)
        self.keys.flatten(1, 2).index_copy_(1, self.layout.slots, keys)
        self.values.flatten(1, 2).index_copy_(1, self.layout.slots, values)

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks [n] → keys and values [K, n * P, D]."""
        keys, values = self.keys.index_select(1, blocks), self.values.index_select(1, blocks)
        return keys.flatten(1, 2), values.flatten(1, 2)


def common_window(caches: Sequence[LayerCache | KeyValues]) -> int | None:
    """The widest window of all layers; None if any of them has none."""
    widths = [cache.window for cache in caches if cache.window is not None]
    return max(widths) if len(widths) == len(caches) else None


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, K, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function over the paged cache → [1, T, H, D]."""
    for option in UNSERVED:
        if options.get(option) is not None:
            raise UnsupportedError(f"attention with {option} is not served")
    cache: LayerCache = module.okavango_cache  # type: ignore[assignment]
    layout = cache.layout
    layout.calls += 1
    q = query[0]
    cache.write(key[0], value[0])
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    window = options.get("sliding_window")
    out = q.new_empty((q.shape[1], q.shape[0], value.shape[-1]))
    for chunk in layout.prefills:
        rows = slice(chunk.start, chunk.end)
        out[rows] = _prefill(q[:, rows], cache, chunk, scale, window)
    for group in layout.decodes:
        out[group.rows] = _decode(q[:, group.rows], cache, group, scale, window)
    return out[None], None


def measuring_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """For a single token, which attends to itself alone: notes the layer's shape at module.okavango_shape."""
    widths = key.shape[1], key.shape[-1], value.shape[-1]
    module.okavango_shape = LayerShape(*widths, options.get("sliding_window"), scaling)  # type: ignore[assignment]
    return value.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(1, 2), None


AttentionInterface.register(NAME, paged_attention)
AttentionInterface.register(MEASURE, measuring_attention)


def _prefill(q: Tensor, cache: LayerCache, chunk: Prefill, scale: float, window: int | None) -> Tensor:
    keys, values = cache.read(chunk.blocks)
    mask = chunk.mask(window)
    out = F.scaled_dot_product_attention(
        q,
        keys[:, : chunk.total],
        values[:, : chunk.total],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[0] != keys.shape[0],
    )
    return out.transpose(0, 1)


def _decode(q: Tensor, cache: LayerCache, group: Decode, scale: float, window: int | None) -> Tensor:
    """Matmul, softmax, matmul: on a CPU faster than scaled_dot_product_attention for single queries."""
    count = len(group.rows)
    keys, values = (found.unflatten(1, (count, -1)).flatten(0, 1) for found in cache.read(group.blocks))
    grouped = q.unflatten(0, (-1, q.shape[0] // cache.keys.shape[0])).transpose(1, 2)  # [K, B, G, D]
    scores = torch.bmm(grouped.flatten(0, 1), keys.transpose(1, 2)).float() * scale  # [K * B, G, S]
    hidden = group.hidden(keys.shape[1], window)
    scores.unflatten(0, (-1, count)).masked_fill_(hidden, float("-inf"))
    seen = torch.bmm(scores.softmax(-1).to(values.dtype), values)  # [K * B, G, D]
    return seen.unflatten(0, (-1, count)).transpose(0, 1).flatten(1, 2)


def _visible(
    positions: Tensor, total: int, window: int | None, mutual: Sequence[tuple[int, int]] = ()
) -> Tensor:
    """[queries, total]: which positions each query's position sees."""
    keys = torch.arange(total, device=positions.device)
    seen = keys[None, :] <= positions[:, None]
    for start, end in mutual:
        asks, is_there = (positions >= start) & (positions < end), (keys >= start) & (keys < end)
        seen |= asks[:, None] & is_there[None, :]
    if window is not None:
        seen &= keys[None, :] > positions[:, None] - window
    return seen
