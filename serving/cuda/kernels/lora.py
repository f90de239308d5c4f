"""Low-rank updates of rows that each have their own adapter: shrink to the rank, expand to the outputs.

Rows of one slot come in tiles (SGMV, Chen et al. 2023). Layers that see the same input, as q, k and v do, are
one group: one launch shrinks for all of them, one expands. A slot holds its adapter at the adapter's own
rank, so that no program reads padding:

    slot's begin + rank * group's offset:  A [J, rank, I], then B [rank, O] of each of the J layers
"""

# Shapes: T rows of the step, L tiles, J layers of the group, I inputs, O outputs of one of them, R highest
#         rank, S parts that the inputs are split into

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from okavango.serving.cuda.kernels.launch import can_overlap, dependent, is_exact, num_processors

_RANKS = 16  # of an adapter that are computed at a time
_MOST_PARTS = 8
_FEW_ROWS = 2  # of a tile: so few are computed one by one, without matrix units


@dataclass(frozen=True)
class Factors:
    """Where a group's factors are.

    Attributes:
        arena: [slots, elements a slot], of slot 1 on: slot 0 is the bare base.
        ranks: [slots + 1], 0 for a slot that adapts nothing.
        offset: [1], of the group in a slot of rank 1.
        widths: outputs of each of its layers; three at most.
        max_rank: the highest that a slot holds.
        aligned: all places are multiples of 16 elements.
    """

    arena: Tensor
    ranks: Tensor
    offset: Tensor
    widths: tuple[int, ...]
    max_rank: int
    aligned: bool


@dataclass(frozen=True)
class Tiles:
    """Rows that share a slot: first row [L], rows [L], slot [L]; slot 0 is the bare base. `height`: most rows
    a tile."""

    rows: Tensor
    counts: Tensor
    slots: Tensor
    height: int


@triton.jit
def _shrink(
    x,
    arena,
    offset,
    ranks,
    tile_rows,
    tile_counts,
    tile_slots,
    low,
    x_row,
    slot_size,
    num_rows,
    inputs,
    share,
    LAYERS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANKS: tl.constexpr,
    HEIGHT: tl.constexpr,
    FEW: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    EXACT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """low = x Aᵀ"""
    tile = tl.program_id(0)
    j = tl.program_id(1)
    part = tl.program_id(2)
    count = tl.load(tile_counts + tile)
    slot = tl.load(tile_slots + tile).to(tl.int64)
    row = tl.load(tile_rows + tile).to(tl.int64)
    group = tl.load(offset)
    rank = tl.load(ranks + slot)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    if (rank > 0) & (count > 0):
        begin = (slot - 1) * slot_size + (group + j * inputs) * rank
        if ALIGNED:
            begin = tl.multiple_of(begin, 16)
        first = part * share
        end = tl.minimum(first + share, inputs)
        low += (part * num_rows * LAYERS + j) * MAX_RANK
        if count <= FEW:
            for number in range(count):
                at_x = x + (row + number) * x_row
                at_low = low + (row + number) * LAYERS * MAX_RANK
                for rank_at in range(0, rank, RANKS):
                    r = rank_at + tl.arange(0, RANKS)
                    found = tl.zeros([RANKS, DEPTH], tl.float32)
                    for at in range(first, end, DEPTH):
                        i = at + tl.arange(0, DEPTH)
                        is_in = tl.full([DEPTH], True, tl.int1) if WHOLE else i < end
                        own = tl.load(at_x + i, mask=is_in, other=0.0).to(tl.float32)
                        a_at = arena + begin + r[:, None] * inputs + i[None, :]
                        a = tl.load(a_at, mask=(r < rank)[:, None] & is_in[None, :], other=0.0)
                        found += a.to(tl.float32) * own[None, :]
                    tl.store(at_low + r, tl.sum(found, 1), mask=r < rank)
        else:
            m = tl.arange(0, HEIGHT)
            there = m < count
            rows = row + m
            for rank_at in range(0, rank, RANKS):
                high = rank_at + tl.arange(0, RANKS)
                sums = tl.zeros([HEIGHT, RANKS], tl.float32)
                for begins in range(first, end, 64):
                    depth = begins + tl.arange(0, 64)
                    x_in = there[:, None] & (depth < end)[None, :]
                    inputs_of = tl.load(x + rows[:, None] * x_row + depth[None, :], mask=x_in, other=0.0)
                    factor_at = arena + begin + high[:, None] * inputs + depth[None, :]
                    factor = tl.load(
                        factor_at, mask=(high < rank)[:, None] & (depth < end)[None, :], other=0.0
                    )
                    if EXACT:
                        sums += tl.dot(inputs_of, tl.trans(factor), input_precision="ieee")
                    else:
                        sums += tl.dot(inputs_of, tl.trans(factor))
                at_lows = low + rows[:, None] * LAYERS * MAX_RANK + high[None, :]
                tl.store(at_lows, sums, mask=there[:, None] & (high < rank)[None, :])


@triton.jit
def _layer_of(
    panel, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, WIDTH_2: tl.constexpr, COLUMNS: tl.constexpr
):
    """Which layer a panel of output columns belongs to: its number, width, first output and panel in it."""
    end_0: tl.constexpr = (WIDTH_0 + COLUMNS - 1) // COLUMNS
    end_1: tl.constexpr = end_0 + (WIDTH_1 + COLUMNS - 1) // COLUMNS
    j = 0
    width = WIDTH_0
    before = 0
    if panel >= end_0:
        j = 1
        width = WIDTH_1
        before = WIDTH_0
        panel -= end_0
        if panel >= end_1 - end_0:
            j = 2
            width = WIDTH_2
            before = WIDTH_0 + WIDTH_1
            panel -= end_1 - end_0
    return j, width, before, panel


@triton.jit
def _expand(
    y,
    low,
    arena,
    offset,
    ranks,
    tile_rows,
    tile_counts,
    tile_slots,
    y_row,
    slot_size,
    num_rows,
    inputs,
    WIDTH_0: tl.constexpr,
    WIDTH_1: tl.constexpr,
    WIDTH_2: tl.constexpr,
    LAYERS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANKS: tl.constexpr,
    HEIGHT: tl.constexpr,
    FEW: tl.constexpr,
    COLUMNS: tl.constexpr,
    NARROW: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """y += low B; B is read before the shrink ends."""
    tile = tl.program_id(1)
    count = tl.load(tile_counts + tile)
    slot = tl.load(tile_slots + tile).to(tl.int64)
    row = tl.load(tile_rows + tile).to(tl.int64)
    group = tl.load(offset)
    rank = tl.load(ranks + slot)
    if (rank > 0) & (count > 0):
        j, width, before, panel = _layer_of(tl.program_id(0), WIDTH_0, WIDTH_1, WIDTH_2, COLUMNS)
        begin = (slot - 1) * slot_size + (group + LAYERS * inputs + before) * rank
        if ALIGNED:
            begin = tl.multiple_of(begin, 16)
        low += j * MAX_RANK
        part_size = num_rows * LAYERS * MAX_RANK
        if count <= FEW:
            column = panel * COLUMNS + tl.arange(0, COLUMNS)
            r = tl.arange(0, RANKS)
            first_at = arena + begin + r[:, None] * width + column[None, :]
            b = tl.load(first_at, mask=(r < rank)[:, None] & (column < width)[None, :], other=0.0)
            if OVERLAP:
                gdc_wait()
            for number in range(count):
                at_low = low + (row + number) * LAYERS * MAX_RANK
                shrunk = tl.zeros([RANKS], tl.float32)
                for part in tl.static_range(PARTS):
                    shrunk += tl.load(at_low + part * part_size + r, mask=r < rank, other=0.0)
                found = tl.sum(b.to(tl.float32) * shrunk[:, None], 0)
                if MAX_RANK > RANKS:
                    for rank_at in range(RANKS, rank, RANKS):
                        more = rank_at + r
                        b_at = arena + begin + more[:, None] * width + column[None, :]
                        kept = (more < rank)[:, None] & (column < width)[None, :]
                        b_more = tl.load(b_at, mask=kept, other=0.0)
                        shrunk = tl.zeros([RANKS], tl.float32)
                        for part in tl.static_range(PARTS):
                            at_more = at_low + part * part_size + more
                            shrunk += tl.load(at_more, mask=more < rank, other=0.0)
                        found += tl.sum(b_more.to(tl.float32) * shrunk[:, None], 0)
                at = y + (row + number) * y_row + before + column
                own = tl.load(at, mask=column < width, other=0.0).to(tl.float32)
                tl.store(at, (own + found).to(y.dtype.element_ty), mask=column < width)
        else:
            if OVERLAP:
                gdc_wait()
            m = tl.arange(0, HEIGHT)
            there = m < count
            rows = row + m
            for column_at in range(panel * COLUMNS, tl.minimum(panel * COLUMNS + COLUMNS, width), NARROW):
                columns = column_at + tl.arange(0, NARROW)
                sums = tl.zeros([HEIGHT, NARROW], tl.float32)
                for rank_at in range(0, rank, RANKS):
                    high = rank_at + tl.arange(0, RANKS)
                    factor_at = arena + begin + high[:, None] * width + columns[None, :]
                    factor = tl.load(
                        factor_at, mask=(high < rank)[:, None] & (columns < width)[None, :], other=0.0
                    )
                    lows = tl.zeros([HEIGHT, RANKS], tl.float32)
                    for part in tl.static_range(PARTS):
                        at_lows = low + part * part_size + rows[:, None] * LAYERS * MAX_RANK + high[None, :]
                        lows += tl.load(at_lows, mask=there[:, None] & (high < rank)[None, :], other=0.0)
                    if EXACT:
                        sums += tl.dot(lows, factor, input_precision="ieee")
                    else:
                        sums += tl.dot(lows.to(factor.dtype), factor)
                at_y = y + rows[:, None] * y_row + (before + columns)[None, :]
                written = there[:, None] & (columns < width)[None, :]
                was = tl.load(at_y, mask=written, other=0.0).to(tl.float32)
                tl.store(at_y, (was + sums).to(y.dtype.element_ty), mask=written)
    elif OVERLAP:
        gdc_wait()  # who ends without it would let the next kernel begin before the last but one is done


def _num_parts(tiles: int, layers: int, inputs: int, device: torch.device) -> int:
    """How many programs share a row's inputs, so that all of them occupy the device."""
    parts = 1
    while (
        parts < _MOST_PARTS
        and tiles * layers * parts < 3 * num_processors(device)
        and inputs // (parts * 2) >= 256
    ):
        parts *= 2
    return parts


def _share_of(inputs: int, parts: int, depth: int) -> int:
    """Inputs a part, in whole steps of `depth`."""
    return triton.cdiv(triton.cdiv(inputs, parts), depth) * depth


def _panels_of(widths: tuple[int, ...], columns: int) -> int:
    return sum(triton.cdiv(width, columns) for width in widths)


def _padded(widths: tuple[int, ...]) -> dict[str, int]:
    """Widths as kernels take them: of three layers, those that are missing have none."""
    return {f"WIDTH_{i}": width for i, width in enumerate((*widths, 0, 0)[:3])}


def _columns_for(tiles: int, widths: tuple[int, ...], device: torch.device) -> int:
    """Outputs a program expands to: as many as leave a program or two for each multiprocessor."""
    columns = 512
    while columns > 256 and _panels_of(widths, columns) * tiles < 2 * num_processors(device):
        columns //= 2
    return columns


def add_lora(y: Tensor, x: Tensor, factors: Factors, tiles: Tiles) -> None:
    """y += (x Aᵀ) B, each row with its slot's factors; rows of slot 0 stay.

    Args:
        y: [T, sum of widths], the group's outputs side by side.
        x: [T, I].
    """
    assert y.stride(1) == x.stride(1) == 1
    layers, inputs, device = len(factors.widths), x.shape[1], x.device
    exact, overlap = is_exact(x), can_overlap(device)
    depth = 64 if exact else 256
    columns = 64 if exact else _columns_for(len(tiles.rows), factors.widths, device)
    parts = _num_parts(len(tiles.rows), layers, inputs, device)
    share = _share_of(inputs, parts, depth)
    low = torch.empty((parts, len(x), layers, factors.max_rank), dtype=torch.float32, device=device)
    common = {
        "LAYERS": layers,
        "MAX_RANK": factors.max_rank,
        "RANKS": _RANKS,
        "HEIGHT": tiles.height,
        "FEW": _FEW_ROWS,
        "ALIGNED": factors.aligned,
        "EXACT": exact,
        "OVERLAP": overlap,
        **(dependent(device) if overlap else {}),
    }
    tables = (factors.offset, factors.ranks, tiles.rows, tiles.counts, tiles.slots)
    _shrink[(len(tiles.rows), layers, parts)](
        x,
        factors.arena,
        *tables,
        low,
        x.stride(0),
        factors.arena.stride(0),
        len(x),
        inputs,
        share,
        DEPTH=depth,
        WHOLE=inputs % depth == 0,
        num_warps=4,
        num_stages=3,
        **common,
    )
    _expand[(_panels_of(factors.widths, columns), len(tiles.rows))](
        y,
        low,
        factors.arena,
        *tables,
        y.stride(0),
        factors.arena.stride(0),
        len(x),
        inputs,
        COLUMNS=columns,
        NARROW=64,
        PARTS=parts,
        num_warps=4,
        num_stages=1,
        **_padded(factors.widths),
        **common,
    )
