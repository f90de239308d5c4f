"""Attention of chunks of prompts over paged keys and values, behind what is in the cache already.

A tile is some consecutive positions of one chunk; with all heads that share a kv head it is one program's
matrix (FlashAttention-2, Dao 2023). Chunks of any lengths, cached prefixes and windows mix in one launch.
"""

# Shapes: T rows of the step, C chunks, Q tiles, H heads, K kv heads, G = H / K, D key width, E value width,
#         N blocks, P positions a block, M rows of a tile's matrix: positions times G

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from okavango.serving.cuda.kernels.launch import HIDDEN, LOG2_E, is_exact

_EXACT_ROWS, _ROWS, _WIDE = 32, 128, 128


@triton.jit
def _write(
    key,  # [K, T, D]
    value,  # [K, T, E]
    keys,  # [K, N, P, D]
    values,  # [K, N, P, E]
    tile_chunks,
    tile_firsts,
    chunk_rows,
    chunk_counts,
    chunk_seen,
    chunk_starts,
    blocks,
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
    TOKENS: tl.constexpr,
    TOKENS_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    PLACES: tl.constexpr,
):
    tile = tl.program_id(0)
    h = tl.program_id(1)
    chunk = tl.load(tile_chunks + tile)
    if chunk >= 0:
        t = tl.arange(0, TOKENS_PAD)
        token = tl.load(tile_firsts + tile) + t
        there = (t < TOKENS) & (token < tl.load(chunk_counts + chunk))
        row = (tl.load(chunk_rows + chunk) + token).to(tl.int64)
        position = tl.load(chunk_seen + chunk) + token
        start = tl.load(chunk_starts + chunk)
        block = tl.load(blocks + start + position // PLACES, mask=there, other=0).to(tl.int64)
        place = position % PLACES
        d = tl.arange(0, D_PAD)
        kept = there[:, None] & (d < D)[None, :]
        k = tl.load(key + h * key_head + row[:, None] * key_row + d[None, :], mask=kept, other=0.0)
        k_at = h * keys_head + block * keys_block + place * keys_place
        tl.store(keys + k_at[:, None] + d[None, :], k, mask=kept)
        e = tl.arange(0, E_PAD)
        kept = there[:, None] & (e < E)[None, :]
        v = tl.load(value + h * value_head + row[:, None] * value_row + e[None, :], mask=kept, other=0.0)
        v_at = h * values_head + block * values_block + place * values_place
        tl.store(values + v_at[:, None] + e[None, :], v, mask=kept)


@triton.jit
def _attend(
    query,  # [H, T, D]
    keys,  # [K, N, P, D]
    values,  # [K, N, P, E]
    tile_chunks,
    tile_firsts,
    chunk_rows,
    chunk_counts,
    chunk_seen,
    chunk_starts,
    blocks,
    out,  # [T, H, E]
    query_head,
    query_row,
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
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    PLACES: tl.constexpr,
    POSITIONS: tl.constexpr,
    HIDE: tl.constexpr,
    EXACT: tl.constexpr,
):
    tile = tl.program_id(1)
    h = tl.program_id(0)
    chunk = tl.load(tile_chunks + tile)
    if chunk >= 0:
        first = tl.load(tile_firsts + tile)
        count = tl.load(chunk_counts + chunk)
        before = tl.load(chunk_seen + chunk)
        start = tl.load(chunk_starts + chunk)
        m = tl.arange(0, ROWS)
        token = first + m // GROUP
        head = h * GROUP + m % GROUP
        there = (m < TOKENS * GROUP) & (token < count)
        row = (tl.load(chunk_rows + chunk) + token).to(tl.int64)
        position = before + token
        d = tl.arange(0, D_PAD)
        e = tl.arange(0, E_PAD)
        in_d = d < D
        in_e = e < E
        q_at = query + row * query_row + head * query_head
        q = tl.load(q_at[:, None] + d[None, :], mask=there[:, None] & in_d[None, :], other=0.0)
        end = before + tl.minimum(first + TOKENS, count)
        begin = tl.maximum(before + first + 1 - window, 0) // POSITIONS * POSITIONS
        highest = tl.full([ROWS], HIDE, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        seen = tl.zeros([ROWS, E_PAD], tl.float32)
        for at in range(begin, end, POSITIONS):
            n = at + tl.arange(0, POSITIONS)
            in_n = n < end
            block = tl.load(blocks + start + n // PLACES, mask=in_n, other=0).to(tl.int64)
            place = n % PLACES
            k_at = h * keys_head + block * keys_block + place * keys_place
            k = tl.load(keys + k_at[:, None] + d[None, :], mask=in_n[:, None] & in_d[None, :], other=0.0)
            if EXACT:
                scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            else:
                scores = tl.dot(q, tl.trans(k)) * scale
            is_seen = (n[None, :] <= position[:, None]) & (n[None, :] > position[:, None] - window)
            scores = tl.where(is_seen & in_n[None, :], scores, HIDE)
            higher = tl.maximum(highest, tl.max(scores, 1))
            shares = tl.exp2(scores - higher[:, None])
            fade = tl.exp2(highest - higher)
            total = total * fade + tl.sum(shares, 1)
            v_at = h * values_head + block * values_block + place * values_place
            v = tl.load(values + v_at[:, None] + e[None, :], mask=in_n[:, None] & in_e[None, :], other=0.0)
            seen = seen * fade[:, None]
            if EXACT:
                seen += tl.dot(shares, v, input_precision="ieee")
            else:
                seen += tl.dot(shares.to(v.dtype), v)
            highest = higher
        o_at = out + (row * HEADS + head)[:, None] * E + e[None, :]
        found = (seen / total[:, None]).to(out.dtype.element_ty)
        tl.store(o_at, found, mask=there[:, None] & in_e[None, :])


def tile_rows(exact: bool, width: int) -> int:
    """Rows of a tile's matrix."""
    if exact:
        return _EXACT_ROWS
    return _ROWS if width <= _WIDE else _ROWS // 2


def tile_tokens(exact: bool, width: int, group: int) -> int:
    """Positions of a chunk that one tile holds."""
    return max(1, tile_rows(exact, width) // group)


def attend_prefill(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    tokens: int,
    scale: float,
    window: int,
) -> None:
    """Write chunks' keys and values into their blocks, and what each position attends to into `out`.

    Args:
        out: [T, H, E]; only rows of chunks are written.
        query, key, value, keys, values, window: as in `attend_decode`.
        tables: of tiles [Q], the chunk (-1 for none) and the first position in it; of chunks [C], the first
            row, positions, positions before it in its blocks, and the start of its table; and the blocks.
        tokens: positions a tile, as `tile_tokens` says, or fewer.
    """
    heads, kv_heads, count = query.shape[0], keys.shape[0], len(tables[0])
    d, e, exact = keys.shape[3], values.shape[3], is_exact(query)
    assert query.stride(2) == key.stride(2) == value.stride(2) == keys.stride(3) == values.stride(3) == 1
    pads = {"D_PAD": max(16, triton.next_power_of_2(d)), "E_PAD": max(16, triton.next_power_of_2(e))}
    cache_strides = (*keys.stride()[:3], *values.stride()[:3])
    _write[(count, kv_heads)](
        key,
        value,
        keys,
        values,
        *tables,
        *key.stride()[:2],
        *value.stride()[:2],
        *cache_strides,
        TOKENS=tokens,
        TOKENS_PAD=triton.next_power_of_2(tokens),
        D=d,
        E=e,
        PLACES=keys.shape[2],
        num_warps=4,
        **pads,
    )
    rows = max(16, tile_rows(exact, max(d, e)), triton.next_power_of_2(heads // kv_heads))
    wide = max(d, e) > _WIDE
    _attend[(kv_heads, count)](
        query,
        keys,
        values,
        *tables,
        out,
        *query.stride()[:2],
        *cache_strides,
        scale * LOG2_E,
        window,
        HEADS=heads,
        GROUP=heads // kv_heads,
        TOKENS=tokens,
        ROWS=rows,
        D=d,
        E=e,
        PLACES=keys.shape[2],
        POSITIONS=32 if exact else 64,
        HIDE=HIDDEN,
        EXACT=exact,
        num_warps=4 if exact or wide else 8,
        num_stages=1 if exact else 2 if wide else 3,
        **pads,
    )
