"""What a GPU's kernel for rows of any lengths does, by plain products."""

from __future__ import annotations

import torch
from torch import Tensor


def plain_varlen(
    query: Tensor,  # [T, H, D]
    key: Tensor,  # [M, K, D]
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """What torch's varlen_attn says it does, part by part."""
    assert window_size[1] == 0
    group = query.shape[1] // key.shape[1]
    parts = []
    for i in range(len(query_ends) - 1):
        q = query[query_ends[i] : query_ends[i + 1]]
        k, v = (x[key_ends[i] : key_ends[i + 1]].repeat_interleave(group, 1) for x in (key, value))
        assert len(q) <= longest_query
        assert len(k) <= longest_key
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))[None]
        hidden = (behind < 0) | ((behind > window_size[0]) if window_size[0] >= 0 else behind < 0)
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -1e9).softmax(-1), v))
    return torch.cat(parts)
