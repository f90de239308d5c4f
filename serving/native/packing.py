"""Weights in the order in which the native kernels read them: see native/matmul.h.

A panel is 16 columns of the product; one row of it holds PAIR neighbours of the summed dimension beside each
other for every column: two in bfloat16, one in float32.
"""

# Shapes: N outputs, K inputs, R rank

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 16


def pair(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 else 1


def round_up(count: int) -> int:
    return -(-count // LANES) * LANES


def pack(weights: Tensor, dtype: torch.dtype, stored: torch.dtype | None = None) -> Tensor:
    """[N, K] → [⌈N / 16⌉, K / PAIR, 16, PAIR], missing columns zero. K must be a multiple of 16.

    `dtype` is what they are multiplied in, and says PAIR; `stored` what they lie in, the same by default. The
    result is a view, if it can be: whoever keeps it copies it, once.
    """
    n, k = weights.shape
    padded = F.pad(weights, (0, 0, 0, round_up(n) - n)) if n % LANES else weights
    panels = padded.to(stored or dtype).view(-1, LANES, k // pair(dtype), pair(dtype))
    return panels.transpose(1, 2)


def pack_factors(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [R, K] and B transposed [R, N] → both packed and flat, R padded with zeros to a multiple of 16."""
    pad = (0, 0, 0, round_up(len(a)) - len(a))
    return pack(F.pad(a, pad), dtype).flatten(), pack(F.pad(b, pad).T.contiguous(), dtype).flatten()


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """Rows of two matrices (or vectors), 16 of each in turn."""
    rows = (tensor.view(-1, LANES, *tensor.shape[1:]) for tensor in (first, second))
    return torch.stack(tuple(rows), 1).flatten(0, 2)
