"""A batch as one sequence: what its rows begin with in common once, then every row's own tokens.

Rows of a dataset mostly begin alike: the same system prompt, the same words before the picture. Computing
that beginning once a batch saves a third of a step on short rows, and changes nothing but the order of sums
(dropout, too, is drawn once for it). As in serving, the decoder gets [1, T], and its attention, registered
with transformers' AttentionInterface, knows which tokens see which. A row that is shorter than the longest is
padded on the right, where causal attention never looks.

On CPUs the attention is plain matrix products where they are faster: the backward pass of torch's fused
kernel in bfloat16 takes five times as long there.
"""

# Shapes: B rows, P tokens that they share, N further ones of the longest row, T = P + B·N,
#         H heads, K kv heads, D head width, Q queries, M keys

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from okavango.platform.errors import UnsupportedError
from okavango.training.tight import Tight, attend_tightly

ATTENTION = "okavango_training"
_UNKNOWN = ("s_aux", "softcap", "position_bias", "head_mask")
# Products keep their scores for the backward pass: beyond so many the fused kernel's thrift counts for more.
_MOST_SCORES = 1 << 25


@dataclass(frozen=True)
class Layout:
    """How [1, T] is laid out: P, B and N.

    `mutual`: (row, start, end) of positions among a row's own that see each other, later ones too.
    """

    shared: int
    rows: int
    length: int
    mutual: tuple[tuple[int, int, int], ...] = ()

    def positions(self, device: torch.device) -> Tensor:
        """[1, T] position of each token in its own row."""
        own = torch.arange(self.shared, self.shared + self.length, device=device).repeat(self.rows)
        return torch.cat([torch.arange(self.shared, device=device), own])[None]


@dataclass
class _Packed:
    """`calls` counts attention calls, so that a decoder that goes round them is noticed."""

    layout: Layout | Tight
    calls: int = 0


_packed: ContextVar[_Packed | None] = ContextVar("packed", default=None)


@contextmanager
def packed(layout: Layout | Tight, layers: int) -> Iterator[None]:
    """Within, attention is over packed rows.

    Raises:
        UnsupportedError: not all of the decoder's `layers` came by.
    """
    with _within(layout) as state:
        yield
    if state.calls != layers:
        raise UnsupportedError(
            f"{state.calls} of the decoder's {layers} layers use transformers' attention interface"
        )


def recomputing() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What torch.utils.checkpoint asks for, `context_fn`: contexts of a layer's forward pass and of its
    recomputation, which the backward pass does when `packed` is over."""
    state = _packed.get()
    return nullcontext(), nullcontext() if state is None else _within(state.layout)


@contextmanager
def _within(layout: Layout | Tight) -> Iterator[_Packed]:
    state = _Packed(layout)
    token = _packed.set(state)
    try:
        yield state
    finally:
        _packed.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, H, T, D], key and value [1, K, T, D] → [1, T, H, D].

    Outside of `packed`, transformers' own.
    """
    state = _packed.get()
    if state is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for option in _UNKNOWN:
        if options.get(option) is not None:
            raise UnsupportedError(f"attention with {option} is not served")
    state.calls += 1
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    window, layout = options.get("sliding_window"), state.layout
    if isinstance(layout, Tight):
        return attend_tightly(query, key, value, layout, scale, window), None
    return _attend_rows(query, key, value, layout, scale, window), None


def _attend_rows(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None
) -> Tensor:
    own, shared = _rows(query, layout), layout.shared
    mutual = layout.mutual
    if not shared:
        return _join(_attention(own, _rows(key, layout), _rows(value, layout), scale, window, mutual))
    keys, values = (torch.cat([_common(x, layout), _rows(x, layout)], 2) for x in (key, value))
    rows = _attention(own, keys, values, scale, window, mutual)
    start = _attention(query[:, :, :shared], key[:, :, :shared], value[:, :, :shared], scale, window)
    return torch.cat([_join(start), _join(rows)], 1)


def _rows(x: Tensor, layout: Layout) -> Tensor:
    """[1, H, T, D] → the rows' own tokens [B, H, N, D]."""
    return x[0, :, layout.shared :].unflatten(1, (layout.rows, layout.length)).transpose(0, 1)


def _common(x: Tensor, layout: Layout) -> Tensor:
    """[1, K, T, D] → the shared tokens, once a row [B, K, P, D]."""
    return x[:, :, : layout.shared].expand(layout.rows, -1, -1, -1)


def _join(x: Tensor) -> Tensor:
    """[B, H, N, D] → [1, B·N, H, D]."""
    return x.transpose(1, 2).flatten(0, 1)[None]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    mutual: Sequence[tuple[int, int, int]] = (),
) -> Tensor:
    """Query [B, H, Q, D], of the last of the M keys [B, K, M, D] → [B, H, Q, D]."""
    b, h, q, _ = query.shape
    k, m = key.shape[1:3]
    mask = _visible(q, m, window, query.device)
    if mutual:
        mask = _looking_ahead(mask, b, mutual, window)
    is_small = b * h * q * m <= _MOST_SCORES and not mutual
    if is_small and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return _products(query, key, value, mask, scale)
    key, value = (x.repeat_interleave(h // k, 1) for x in (key, value))
    if q == m and window is None and not mutual:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Query heads of one kv head side by side, so that no key or value is copied for them."""
    b, h, q, d = query.shape
    k, m = key.shape[1:3]
    group = h // k
    scores = torch.bmm((query * scale).reshape(b * k, group * q, d), key.reshape(b * k, m, d).transpose(1, 2))
    unseen = torch.zeros(q, m, dtype=scores.dtype, device=scores.device).masked_fill_(~mask, float("-inf"))
    weights = torch.softmax(scores.view(b * k, group, q, m) + unseen, -1).view(b * k, group * q, m)
    return torch.bmm(weights, value.reshape(b * k, m, -1)).view(b, h, q, -1)


def _visible(q: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """[Q, M]: whether a query sees a key; the queries are those of the last Q keys."""
    seen = torch.ones(q, m, dtype=torch.bool, device=device).tril(m - q)
    return seen if window is None else seen.triu(m - q - window + 1)


def _looking_ahead(
    mask: Tensor, rows: int, mutual: Sequence[tuple[int, int, int]], window: int | None
) -> Tensor:
    """[B, 1, Q, M]: a mask [Q, M] with what sees each other in each row; a window hides only what is past."""
    q, m = mask.shape
    found = mask.expand(rows, 1, q, m).clone()
    for row, start, end in mutual:
        seen = _seen_ahead(end - start, window).to(mask.device)
        found[row, 0, start:end, m - q + start : m - q + end] |= seen
    return found


def _seen_ahead(length: int, window: int | None) -> Tensor:
    """[length, length]: what positions that see each other see of each other."""
    seen = torch.ones(length, length, dtype=torch.bool)
    return seen if window is None else seen.triu(1 - window)


_prompts: ContextVar[tuple[tuple[int, int, int], ...]] = ContextVar("prompts", default=())


@contextmanager
def looking_ahead(mutual: Sequence[tuple[int, int, int]]) -> Iterator[None]:
    """Within, and outside of `packed`, (row, start, end) of a padded batch of prompts see each other."""
    token = _prompts.set(tuple(mutual))
    try:
        yield
    finally:
        _prompts.reset(token)


def _mask(**arguments: Any) -> Tensor | None:
    """transformers' mask function: packed rows need none from outside."""
    if _packed.get() is not None:
        return None
    mutual = _prompts.get()
    if not mutual or arguments["q_length"] == 1:
        return sdpa_mask(**arguments)
    mask = sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
    assert mask is not None
    found = mask.expand(arguments["batch_size"], -1, -1, -1).clone()
    for row, start, end in mutual:
        seen = _seen_ahead(end - start, arguments.get("local_size")).to(found.device)
        found[row, 0, start:end, start:end] |= seen
    return found


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, _mask)
