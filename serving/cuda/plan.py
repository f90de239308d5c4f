"""A step as tables of numbers, the way the kernels read it. No torch: plain Python and numpy.

All tables of a step lie in one piece of memory, so that one copy brings them to the device. Each begins where
the room says: a step's own room, or that of a graph, whose kernels look for them in fixed places.
"""

# Shapes: T rows of the step, O rows whose logits are wanted, B decoding rows, C chunks of more than one row,
#         Q tiles of such chunks, L tiles of rows that share a slot

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from okavango.serving.step import Chunk, Step

# tables by name; of which number each has as many entries; what stands for none
_TABLES = {
    "tokens": ("rows", 0),
    "positions": ("rows", 0),
    "outputs": ("outputs", 0),
    "decode_rows": ("decodes", 0),
    "decode_lengths": ("decodes", 0),
    "decode_starts": ("decodes", 0),
    "chunk_rows": ("chunks", 0),
    "chunk_counts": ("chunks", 0),
    "chunk_seen": ("chunks", 0),
    "chunk_starts": ("chunks", 0),
    "tile_chunks": ("query_tiles", -1),
    "tile_firsts": ("query_tiles", 0),
    "slot_rows": ("slot_tiles", 0),
    "slot_counts": ("slot_tiles", 0),
    "slots": ("slot_tiles", 0),
    "blocks": ("blocks", 0),
}
_ALIGNED = 4  # entries; a kernel that finds a table at 16 bytes reads it so, and is compiled for that


@dataclass(frozen=True)
class Sizes:
    """What tables are cut to: positions a block, positions a tile of a chunk, rows a tile of one slot."""

    block: int
    query_tile: int
    slot_tile: int


@dataclass(frozen=True)
class Room:
    """How many of each a step has, or a graph has room for."""

    rows: int = 0
    outputs: int = 0
    decodes: int = 0
    chunks: int = 0
    query_tiles: int = 0
    slot_tiles: int = 0
    blocks: int = 0

    def holds(self, other: Room) -> bool:
        return all(own >= needed for own, needed in zip(astuple(self), astuple(other), strict=True))

    @property
    def size(self) -> int:
        """Entries of all tables."""
        return sum(_aligned(getattr(self, of)) for of, _ in _TABLES.values())

    def views(self, memory: Any) -> dict[str, Any]:
        """The tables by name, as views of an array or tensor [size]."""
        found, begin = {}, 0
        for name, (of, _) in _TABLES.items():
            count = getattr(self, of)
            found[name] = memory[begin : begin + count]
            begin += _aligned(count)
        return found


@dataclass(frozen=True)
class Plan:
    """A step's tables, of which each has as many entries as it needs. `room` is what they take."""

    tables: Mapping[str, list[int]]
    room: Room
    uses_slots: bool

    def write(self, room: Room, memory: NDArray[np.int32]) -> int:
        """Fill tables of that room, and tell how many entries of the memory are in use."""
        assert room.holds(self.room), f"{self.room} is more than {room}"
        for name, table in room.views(memory).items():
            own = self.tables[name]
            table[: len(own)] = own
            if name != "blocks":
                table[len(own) :] = _TABLES[name][1]
        return room.size - _aligned(room.blocks) + len(self.tables["blocks"])


def plan_step(step: Step, outputs: Sequence[int], sizes: Sizes) -> Plan:
    """The step's tables.

    Positions are counted from the first block that a sequence still holds: no row sees what stood before.
    """
    tables: dict[str, list[int]] = {name: [] for name in _TABLES}
    tables["outputs"] += outputs
    row = 0
    for chunk in step.chunks:
        _add_rows(tables, chunk)
        (_add_decode if chunk.count == 1 else _add_chunk)(tables, chunk, row, sizes)
        tables["blocks"] += chunk.sequence.held
        row += chunk.count
    segments = step.segments
    for slot, first, end in _with_base(segments, row):
        starts = range(first, end, sizes.slot_tile)
        tables["slot_rows"] += starts
        tables["slot_counts"] += (min(sizes.slot_tile, end - start) for start in starts)
        tables["slots"] += repeat(slot, len(starts))
    counts = {of: len(tables[name]) for name, (of, _) in _TABLES.items()}
    return Plan(tables, Room(**counts), bool(segments))


def decode_room(rows: int, slots: int, sequence_blocks: int, sizes: Sizes) -> Room:
    """Room for a step of up to so many single tokens. `slots`: adapters that it may use at once;
    `sequence_blocks`: most blocks of one sequence."""
    tiles = _most_slot_tiles(rows, rows, slots, sizes)
    return Room(rows, rows, rows, 0, 0, tiles, rows * sequence_blocks)


def mixed_room(rows: int, sequences: int, slots: int, sequence_blocks: int, sizes: Sizes) -> Room:
    """Room for a step of up to so many tokens of any chunks, of so many sequences."""
    sequences = min(rows, sequences)
    query_tiles = rows // sizes.query_tile + min(sequences, rows // 2)
    tiles = _most_slot_tiles(rows, sequences, slots, sizes)
    chunks = min(sequences, rows // 2)
    return Room(rows, sequences, sequences, chunks, query_tiles, tiles, sequences * sequence_blocks)


def _most_slot_tiles(rows: int, sequences: int, slots: int, sizes: Sizes) -> int:
    """Each run of one slot's rows, the base's among them, has at most one tile that is not full."""
    runs = min(sequences, slots + 1)
    return min(rows, runs + rows // sizes.slot_tile)


def _add_rows(tables: Mapping[str, list[int]], chunk: Chunk) -> None:
    tables["tokens"] += chunk.tokens or [0]  # one that only the device knows
    tables["positions"] += range(chunk.start, chunk.end)


def _add_decode(tables: Mapping[str, list[int]], chunk: Chunk, row: int, sizes: Sizes) -> None:
    tables["decode_rows"].append(row)
    tables["decode_lengths"].append(chunk.end - chunk.sequence.num_dropped * sizes.block)
    tables["decode_starts"].append(len(tables["blocks"]))


def _add_chunk(tables: Mapping[str, list[int]], chunk: Chunk, row: int, sizes: Sizes) -> None:
    firsts = range(0, chunk.count, sizes.query_tile)
    tables["tile_chunks"] += repeat(len(tables["chunk_rows"]), len(firsts))
    tables["tile_firsts"] += firsts
    tables["chunk_rows"].append(row)
    tables["chunk_counts"].append(chunk.count)
    tables["chunk_seen"].append(chunk.start - chunk.sequence.num_dropped * sizes.block)
    tables["chunk_starts"].append(len(tables["blocks"]))


def _with_base(segments: Sequence[tuple[int, int, int]], rows: int) -> list[tuple[int, int, int]]:
    """The segments, and between them those of the bare base, as slot 0."""
    found, done = [], 0
    for slot, first, end in segments:
        if done < first:
            found.append((0, done, first))
        found.append((slot, first, end))
        done = end
    if done < rows:
        found.append((0, done, rows))
    return found


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED


assert {of for of, _ in _TABLES.values()} == {field.name for field in fields(Room)}
