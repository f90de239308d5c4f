"""Paged attention by kernels of ours, behind transformers' AttentionInterface.

A step's decoding rows and chunks of prompts mix; each kind has its kernel, which writes the step's keys and
values, too. torch.compile sees one operator, which says nothing of the cache that it writes: no other
operator touches it, and torch 2.11 would copy what it knows to be written.
"""

# Shapes: T rows of the step, H heads, K kv heads, D key width, E value width, N blocks, P positions a block

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from okavango.platform.errors import UnsupportedError
from okavango.serving.attention import UNSERVED
from okavango.serving.cuda.kernels.decode import attend_decode
from okavango.serving.cuda.kernels.launch import NO_WINDOW
from okavango.serving.cuda.kernels.prefill import attend_prefill
from okavango.serving.cuda.state import current

NAME = "okavango_cuda"


def cuda_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, K, T, D]
    value: Tensor,  # [1, K, T, E]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function over the module's own blocks → [1, T, H, E]."""
    for option in UNSERVED:
        if options.get(option) is not None:
            raise UnsupportedError(f"attention with {option} is not served")
    compute = torch.ops.okavango.attend if torch.compiler.is_compiling() else _attend
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = options.get("sliding_window") or NO_WINDOW
    keys: Tensor = module.okavango_keys  # type: ignore[assignment]
    values: Tensor = module.okavango_values  # type: ignore[assignment]
    return compute(query[0], key[0], value[0], keys, values, scale, window)[None], None


AttentionInterface.register(NAME, cuda_attention)


def _attend(
    query: Tensor,  # [H, T, D]
    key: Tensor,  # [K, T, D]
    value: Tensor,  # [K, T, E]
    keys: Tensor,  # [K, N, P, D]
    values: Tensor,  # [K, N, P, E]
    scale: float,
    window: int,
) -> Tensor:
    """What the current step's rows attend to [T, H, E]; rows that pad a graph are left as they come."""
    step = current()
    out = query.new_empty((query.shape[1], query.shape[0], value.shape[2]))
    query, key, value = (_dense(tensor) for tensor in (query, key, value))
    if step.room.query_tiles:
        tokens = step.sizes.query_tile
        attend_prefill(out, query, key, value, keys, values, step.prefill, tokens, scale, window)
    if step.room.decodes:
        attend_decode(out, query, key, value, keys, values, step.decode, scale, window)
    return out


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor keys, Tensor values, float scale, int window) -> Tensor"
)
_operator = torch.library.custom_op("okavango::attend", _attend, mutates_args=(), schema=_SCHEMA)


@_operator.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, scale: float, window: int
) -> Tensor:
    return query.new_empty((query.shape[1], query.shape[0], value.shape[2]))
