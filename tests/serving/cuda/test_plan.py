"""A step as tables: what each row is told, and what pads a graph."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from okavango.modalities.prompt import Rendered
from okavango.serving.cuda.plan import Room, Sizes, decode_room, mixed_room, plan_step
from okavango.serving.sequence import Sequence
from okavango.serving.step import Chunk, Step
from okavango.serving.types import Request

SIZES = Sizes(block=4, query_tile=8, slot_tile=3)


def chunk(start: int, count: int, slot: int = 0, blocks: tuple[int, ...] = (), dropped: int = 0) -> Chunk:
    tokens = tuple(100 * slot + i for i in range(start + count))
    sequence = Sequence(Request("r", Rendered(tokens)), max_tokens=1)
    sequence.slot, sequence.num_dropped = slot, dropped
    sequence.blocks = [-1] * dropped + list(blocks)
    return Chunk(sequence, start, count)


def test_tables_of_a_mixed_step():
    step = Step(
        (),
        (chunk(6, 1, 0, (9, 2)), chunk(4, 9, 1, (5, 6, 7, 8)), chunk(13, 1, 2, (1, 3), dropped=2)),
    )
    plan = plan_step(step, [0, 9, 10], SIZES)
    assert plan.uses_slots
    assert plan.tables == {
        "tokens": [6, *range(104, 113), 213],
        "positions": [6, *range(4, 13), 13],
        "outputs": [0, 9, 10],
        "decode_rows": [0, 10],
        "decode_lengths": [7, 6],  # the last one counts from the first block that it still holds
        "decode_starts": [0, 6],
        "chunk_rows": [1],
        "chunk_counts": [9],
        "chunk_seen": [4],
        "chunk_starts": [2],
        "tile_chunks": [0, 0],
        "tile_firsts": [0, 8],
        "slot_rows": [0, 1, 4, 7, 10],
        "slot_counts": [1, 3, 3, 3, 1],
        "slots": [0, 1, 1, 1, 2],
        "blocks": [9, 2, 5, 6, 7, 8, 1, 3],
    }


def test_a_token_that_only_the_device_knows_has_its_place():
    known = chunk(6, 1, 0, (1, 2))
    step = Step((), (Chunk(known.sequence, 7, 1),))
    plan = plan_step(step, [0], SIZES)
    assert (plan.tables["tokens"], plan.tables["positions"], plan.tables["decode_lengths"]) == ([0], [7], [8])


def test_what_pads_a_graph_is_none():
    plan = plan_step(Step((), (chunk(6, 1, 1, (9, 2)),)), [0], SIZES)
    room = decode_room(5, 3, 10, SIZES)
    memory = np.full(room.size, 77, dtype=np.int32)
    used = plan.write(room, memory)
    tables = room.views(memory)
    assert tables["decode_lengths"].tolist() == [7, 0, 0, 0, 0]
    assert tables["slot_counts"].tolist() == [1] + [0] * (room.slot_tiles - 1)
    assert tables["outputs"].tolist() == [0] * 5
    assert tables["blocks"][:2].tolist() == [9, 2]
    # what is copied ends with the last block
    assert used == (tables["blocks"].ctypes.data - memory.ctypes.data) // memory.itemsize + 2


def test_tiles_of_no_chunk_are_marked():
    plan = plan_step(Step((), (chunk(0, 5, 0, (1, 2)),)), [4], SIZES)
    room = mixed_room(16, 4, 3, 10, SIZES)
    tables = room.views(np.full(room.size, 77, dtype=np.int32))
    memory = np.full(room.size, 77, dtype=np.int32)
    plan.write(room, memory)
    tables = room.views(memory)
    assert tables["tile_chunks"].tolist() == [0] + [-1] * (room.query_tiles - 1)


def test_tables_begin_at_sixteen_bytes():
    room = Room(rows=5, outputs=3, decodes=1, chunks=2, query_tiles=7, slot_tiles=1, blocks=9)
    memory = np.zeros(room.size, dtype=np.int32)
    begins = [view.ctypes.data - memory.ctypes.data for view in room.views(memory).values()]
    assert all(begin % 16 == 0 for begin in begins)


def test_a_step_over_the_room_is_refused():
    plan = plan_step(Step((), (chunk(6, 1, 0, (9, 2)), chunk(6, 1, 0, (3, 4)))), [0], SIZES)
    room = decode_room(1, 3, 10, SIZES)
    assert not room.holds(plan.room)
    with pytest.raises(AssertionError):
        plan.write(room, np.zeros(room.size, dtype=np.int32))


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 4)), min_size=1, max_size=12),
    st.integers(1, 4),
)
def test_a_graph_has_room_for_every_step_within_its_limits(given_chunks, tile):
    sizes = Sizes(block=4, query_tile=8, slot_tile=tile)
    chunks = [
        chunk(0, count, slot, tuple(range(8))) for count, slot in sorted(given_chunks, key=lambda c: c[1])
    ]
    step = Step((), tuple(chunks))
    plan = plan_step(step, range(len(chunks)), sizes)
    slots = 4
    assert mixed_room(step.num_tokens, len(chunks), slots, 8, sizes).holds(plan.room)
    if all(each.count == 1 for each in chunks):
        assert decode_room(len(chunks), slots, 8, sizes).holds(plan.room)
