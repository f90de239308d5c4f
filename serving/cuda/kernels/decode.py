"""Attention of single new positions over paged keys and values, which are written on the way.

Split over the positions (FlashDecoding, Dao et al. 2023): several programs share a long sequence, and what
each found is merged by the greatest score it met. All heads that share a kv head are one program's.
"""

# Shapes: T rows of the step, B decoding rows, H heads, K kv heads, G = H / K, D key width, E value width,
#         N blocks, P positions a block, S splits

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from okavango.serving.cuda.kernels.launch import (
    HIDDEN,
    LOG2_E,
    can_overlap,
    dependent,
    is_exact,
    num_processors,
)

_MOST_SPLITS = 16
_POSITIONS = 64  # read at a time


@triton.jit
def _attend(
    query,  # [H, T, D]
    key,  # [K, T, D]
    value,  # [K, T, E]
    keys,  # [K, N, P, D]
    values,  # [K, N, P, E]
    rows,  # [B]
    lengths,  # [B], 0 for none
    starts,  # [B]
    blocks,
    out,  # [T, H, E]
    partial,  # [B, H, S, E]
    weight,  # [B, H, S]
    query_head,
    query_row,
    key_head,
    key_row,
    value_head,
    value_row,
    keys_head,
    keys_block,
    keys_place,
    values_head,
    values_block,
    values_place,
    scale,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    PLACES: tl.constexpr,
    POSITIONS: tl.constexpr,
    SPLITS: tl.constexpr,
    HIDE: tl.constexpr,
    EXACT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    b = tl.program_id(0)
    h = tl.program_id(1)
    split = tl.program_id(2)
    if OVERLAP:
        gdc_launch_dependents()
    length = tl.load(lengths + b)
    if length > 0:
        row = tl.load(rows + b).to(tl.int64)
        start = tl.load(starts + b)
        own = length - 1
        first = tl.maximum(length - window, 0)
        share = tl.cdiv(tl.cdiv(own - first, POSITIONS), SPLITS) * POSITIONS
        begin = first + split * share
        end = tl.minimum(begin + share, own)
        g = tl.arange(0, GROUP_PAD)
        d = tl.arange(0, D_PAD)
        e = tl.arange(0, E_PAD)
        in_d = d < D
        in_e = e < E
        head = h * GROUP + g
        q_at = query + row * query_row + head[:, None] * query_head + d[None, :]
        q = tl.load(q_at, mask=(g < GROUP)[:, None] & in_d[None, :], other=0.0)
        if split == 0:
            k_own = tl.load(key + h * key_head + row * key_row + d, mask=in_d, other=0.0)
            v_own = tl.load(value + h * value_head + row * value_row + e, mask=in_e, other=0.0)
            block = tl.load(blocks + start + own // PLACES).to(tl.int64)
            k_at = keys + h * keys_head + block * keys_block + (own % PLACES) * keys_place
            v_at = values + h * values_head + block * values_block + (own % PLACES) * values_place
            tl.store(k_at + d, k_own, mask=in_d)
            tl.store(v_at + e, v_own, mask=in_e)
            highest = tl.sum(q.to(tl.float32) * k_own.to(tl.float32)[None, :], 1) * scale
            total = tl.full([GROUP_PAD], 1.0, tl.float32)
            seen = tl.zeros([GROUP_PAD, E_PAD], tl.float32) + v_own.to(tl.float32)[None, :]
        else:
            highest = tl.full([GROUP_PAD], HIDE, tl.float32)
            total = tl.zeros([GROUP_PAD], tl.float32)
            seen = tl.zeros([GROUP_PAD, E_PAD], tl.float32)
        for at in range(begin, end, POSITIONS):
            n = at + tl.arange(0, POSITIONS)
            there = n < end
            block = tl.load(blocks + start + n // PLACES, mask=there, other=0).to(tl.int64)
            place = n % PLACES
            k_at = h * keys_head + block * keys_block + place * keys_place
            k = tl.load(keys + k_at[:, None] + d[None, :], mask=there[:, None] & in_d[None, :], other=0.0)
            if EXACT:
                scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            else:
                scores = tl.dot(q, tl.trans(k)) * scale
            scores = tl.where(there[None, :], scores, HIDE)
            higher = tl.maximum(highest, tl.max(scores, 1))
            shares = tl.exp2(scores - higher[:, None])
            fade = tl.exp2(highest - higher)
            total = total * fade + tl.sum(shares, 1)
            v_at = h * values_head + block * values_block + place * values_place
            v = tl.load(values + v_at[:, None] + e[None, :], mask=there[:, None] & in_e[None, :], other=0.0)
            seen = seen * fade[:, None]
            if EXACT:
                seen += tl.dot(shares, v, input_precision="ieee")
            else:
                seen += tl.dot(shares.to(v.dtype), v)
            highest = higher
        kept = (g < GROUP)[:, None] & in_e[None, :]
        if SPLITS == 1:
            o_at = out + (row * HEADS + head)[:, None] * E + e[None, :]
            tl.store(o_at, (seen / total[:, None]).to(out.dtype.element_ty), mask=kept)
        else:
            total = tl.maximum(total, 1e-30)
            at = (b * HEADS + head) * SPLITS + split
            tl.store(partial + at[:, None] * E + e[None, :], seen / total[:, None], mask=kept)
            tl.store(weight + at, highest + tl.log2(total), mask=g < GROUP)


@triton.jit
def _merge(
    partial,  # [B, H, S, E]
    weight,  # [B, H, S]
    rows,
    lengths,
    out,  # [T, H, E]
    HEADS: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    b = tl.program_id(0)
    h = tl.program_id(1)
    if OVERLAP:
        gdc_wait()
    if tl.load(lengths + b) > 0:
        row = tl.load(rows + b).to(tl.int64)
        e = tl.arange(0, E_PAD)
        at = (b * HEADS + h) * SPLITS + tl.arange(0, SPLITS)
        scores = tl.load(weight + at)
        shares = tl.exp2(scores - tl.max(scores, 0))
        found = tl.load(partial + at[:, None] * E + e[None, :], mask=(e < E)[None, :], other=0.0)
        merged = tl.sum(found * shares[:, None], 0) / tl.sum(shares, 0)
        tl.store(out + (row * HEADS + h) * E + e, merged.to(out.dtype.element_ty), mask=e < E)


def num_splits(count: int, kv_heads: int, device: torch.device) -> int:
    """How many programs share a sequence, so that `count` of them occupy the device."""
    splits = 1
    while count * kv_heads * splits < 2 * num_processors(device) - 8 and splits < _MOST_SPLITS:
        splits *= 2
    return splits


def attend_decode(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float,
    window: int,
) -> None:
    """Write single positions' keys and values into their blocks, and what each attends to into `out`.

    Args:
        out: [T, H, E]; only decoding rows are written.
        query, key, value: [H, T, D], [K, T, D] and [K, T, E], of any strides but the last.
        keys, values: [K, N, P, D] and [K, N, P, E], likewise.
        tables: rows [B] of the step; lengths [B], positions in the blocks with the row's own; starts [B] of
            their tables in blocks; and the blocks. A row of length 0 is none.
        window: positions that a row sees, its own included.
    """
    rows, lengths, starts, blocks = tables
    heads, kv_heads, count = query.shape[0], keys.shape[0], len(rows)
    d, e, device = keys.shape[3], values.shape[3], query.device
    assert query.stride(2) == key.stride(2) == value.stride(2) == keys.stride(3) == values.stride(3) == 1
    splits = num_splits(count, kv_heads, device)
    if splits > 1:
        partial = torch.empty((count, heads, splits, e), dtype=torch.float32, device=device)
        weight = torch.empty((count, heads, splits), dtype=torch.float32, device=device)
    else:
        partial = weight = out
    overlap = splits > 1 and can_overlap(device)
    _attend[(count, kv_heads, splits)](
        query,
        key,
        value,
        keys,
        values,
        rows,
        lengths,
        starts,
        blocks,
        out,
        partial,
        weight,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        scale * LOG2_E,
        window,
        HEADS=heads,
        GROUP=heads // kv_heads,
        GROUP_PAD=max(16, triton.next_power_of_2(heads // kv_heads)),
        D=d,
        D_PAD=max(16, triton.next_power_of_2(d)),
        E=e,
        E_PAD=max(16, triton.next_power_of_2(e)),
        PLACES=keys.shape[2],
        POSITIONS=_POSITIONS if max(d, e) <= 128 else _POSITIONS // 2,
        SPLITS=splits,
        HIDE=HIDDEN,
        EXACT=is_exact(query),
        OVERLAP=overlap,
        num_warps=4,
        num_stages=3 if max(d, e) <= 128 else 2,
    )
    if splits > 1:
        _merge[(count, heads)](
            partial,
            weight,
            rows,
            lengths,
            out,
            HEADS=heads,
            E=e,
            E_PAD=max(16, triton.next_power_of_2(e)),
            SPLITS=splits,
            OVERLAP=overlap,
            num_warps=1 if e * splits <= 512 else 4,
            **(dependent(device) if overlap else {}),
        )
