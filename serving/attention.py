"""Paged attention behind transformers' AttentionInterface: any architecture that uses it is served unchanged.

Every layer's attention module gets its own `LayerCache`; all of them share one `StepLayout`, which says where
the step's rows go and what they may see. Plain torch: the reference for every faster kernel.
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
_UNSERVED = ("s_aux", "softcap", "position_bias", "head_mask")


@dataclass(frozen=True)
class Prefill:
    """Rows [start, end) are one sequence's positions [seen, seen + end - start); `blocks`: [its blocks]."""

    start: int
    end: int
    seen: int
    blocks: Tensor


@dataclass(frozen=True)
class Decode:
    """Rows that are each one sequence's newest position.

    Attributes:
        rows: [B] row numbers.
        blocks: [B, blocks of the longest], padded with any valid block.
        lengths: [B] positions seen, the row's own included.
    """

    rows: Tensor
    blocks: Tensor
    lengths: Tensor


@dataclass
class StepLayout:
    """The step's rows: where their keys and values are written, and what each attends to.

    `calls` counts attention calls, so that a model which goes round the interface is noticed.
    """

    slots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # [T] in N * P
    prefills: Sequence[Prefill] = ()
    decode: Decode | None = None
    calls: int = 0


class LayerCache:
    """One layer's keys and values, in separate storages: [N, P, K, D] each."""

    def __init__(
        self, shape: tuple[int, int, int, int], layout: StepLayout, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = lazy_zeros(shape, dtype, device)
        self.values = lazy_zeros(shape, dtype, device)
        self.layout = layout

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Store [T, K, D] at the step's slots."""
        self.keys.flatten(0, 1).index_copy_(0, self.layout.slots, keys)
        self.values.flatten(0, 1).index_copy_(0, self.layout.slots, values)

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks [..., n] → keys and values [..., n * P, K, D]."""
        keys, values = self.keys[blocks], self.values[blocks]
        return keys.flatten(-4, -3), values.flatten(-4, -3)


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
    for option in _UNSERVED:
        if options.get(option) is not None:
            raise UnsupportedError(f"attention with {option} is not served")
    cache: LayerCache = module.okavango_cache  # type: ignore[assignment]
    layout = cache.layout
    layout.calls += 1
    q = query[0].transpose(0, 1)
    cache.write(key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    window = options.get("sliding_window")
    out = q.new_empty((*q.shape[:2], value.shape[-1]))
    for chunk in layout.prefills:
        out[chunk.start : chunk.end] = _prefill(q[chunk.start : chunk.end], cache, chunk, scale, window)
    if layout.decode is not None:
        out[layout.decode.rows] = _decode(q[layout.decode.rows], cache, layout.decode, scale, window)
    return out[None], None


AttentionInterface.register(NAME, paged_attention)


def _prefill(q: Tensor, cache: LayerCache, chunk: Prefill, scale: float, window: int | None) -> Tensor:
    total = chunk.seen + q.shape[0]
    keys, values = cache.read(chunk.blocks)
    mask = _visible(torch.arange(chunk.seen, total, device=q.device), total, window)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1),
        keys[:total].transpose(0, 1),
        values[:total].transpose(0, 1),
        attn_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != keys.shape[1],
    )
    return out.transpose(0, 1)


def _decode(q: Tensor, cache: LayerCache, step: Decode, scale: float, window: int | None) -> Tensor:
    """Matmul, softmax, matmul: on a CPU faster than scaled_dot_product_attention for single queries."""
    keys, values = cache.read(step.blocks)  # [B, S, K, D]
    grouped = q.unflatten(1, (keys.shape[2], -1))  # [B, K, G, D]
    scores = torch.matmul(grouped, keys.permute(0, 2, 3, 1)).float() * scale  # [B, K, G, S]
    seen = _visible(step.lengths - 1, keys.shape[1], window)  # [B, S]
    scores.masked_fill_(~seen[:, None, None, :], float("-inf"))
    weights = scores.softmax(-1).to(values.dtype)
    return torch.matmul(weights, values.transpose(1, 2)).flatten(1, 2)


def _visible(positions: Tensor, total: int, window: int | None) -> Tensor:
    """[queries, total]: which positions each query's position sees."""
    keys = torch.arange(total, device=positions.device)
    seen = keys[None, :] <= positions[:, None]
    if window is not None:
        seen &= keys[None, :] > positions[:, None] - window
    return seen
