"""The scheduler, the block pool and the slot table, without a model: plain Python in milliseconds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from okavango.modalities.prompt import Rendered
from okavango.serving.adapters.slots import Lease, SlotTable
from okavango.serving.cache.blocks import BlockPool
from okavango.serving.scheduler import Limits, Scheduler
from okavango.serving.sequence import Sequence
from okavango.serving.types import AdapterRef, Request


def make(prompt: int, max_tokens: int, adapter: str | None = None) -> Sequence:
    ref = AdapterRef(adapter, 1, adapter) if adapter else None
    return Sequence(Request(f"r{id(object())}", Rendered(tuple(range(prompt))), ref), max_tokens)


def scheduler(blocks=64, size=4, slots=2, sequences=4, tokens=16) -> Scheduler:
    return Scheduler(BlockPool(blocks, size), SlotTable(slots), Limits(sequences, tokens))


def advance(s: Scheduler) -> list[Sequence]:
    """One step with a made-up token for each sequence that samples; those that finished."""
    step = s.schedule()
    s.check_integrity()
    finished = []
    for chunk in step.chunks:
        sequence = chunk.sequence
        sequence.num_computed = chunk.end
        if chunk.end == len(sequence.tokens):
            sequence.tokens.append(0)
            if sequence.num_generated == sequence.max_tokens:
                s.drop(sequence)
                finished.append(sequence)
    return finished


def test_running_sequences_decode_while_a_long_prompt_is_computed_in_chunks():
    s = scheduler()
    short = make(3, 50)
    s.add(short)
    advance(s)
    long = make(40, 2)
    s.add(long)
    counts = []
    while long.num_computed < 40:
        step = s.schedule()
        counts.append({chunk.sequence is long: chunk.count for chunk in step.chunks})
        for chunk in step.chunks:
            chunk.sequence.num_computed = chunk.end
            if chunk.samples:
                chunk.sequence.tokens.append(0)
    assert counts == [{False: 1, True: 15}, {False: 1, True: 15}, {False: 1, True: 10}]


def test_rows_of_one_slot_are_adjacent_and_the_base_has_no_segment():
    s = scheduler(slots=3, sequences=8)
    for adapter in ("a", None, "b", "a", None):
        s.add(make(2, 1, adapter))
    step = s.schedule()
    slots = [chunk.sequence.slot for chunk in step.chunks]
    assert slots == sorted(slots)
    assert step.segments == ((1, 4, 8), (2, 8, 10))
    assert [sequence.digest for sequence in step.loads] == ["a", "b"]


def test_admission_reserves_what_a_sequence_may_need():
    s = scheduler(blocks=10, size=4)
    for _ in range(3):
        s.add(make(8, 8))  # four blocks each
    s.schedule()
    assert (len(s.running), len(s.waiting)) == (2, 1)
    assert s.pool.num_used == 4
    assert s.pool.num_available == 2


def test_a_sequence_without_a_free_slot_waits_and_gives_its_blocks_back():
    s = scheduler(slots=1)
    first, second = make(2, 2, "a"), make(2, 1, "b")
    s.add(first)
    s.add(second)
    s.schedule()
    assert s.running == [first]
    assert s.pool.num_available + 1 == s.pool.num_blocks
    s.drop(first)
    assert s.schedule().loads == (second,)


def test_dropping_frees_everything_at_once():
    s = scheduler()
    running, waiting = make(30, 9, "a"), make(3, 1)
    s.add(running)
    s.schedule()
    s.add(waiting)
    s.drop(running)
    s.drop(waiting)
    s.drop(running)
    s.check_integrity()
    assert not s.has_work
    assert s.pool.num_used == 0
    assert s.pool.num_available == s.pool.num_blocks


requests = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 12), st.sampled_from([None, "a", "b", "c"])), max_size=25
)


@given(requests, st.lists(st.integers(0, 24), max_size=6), st.integers(1, 3), st.integers(13, 30))
def test_every_sequence_finishes_whatever_comes_and_goes(mix, cancelled, slots, blocks):
    s = scheduler(blocks=blocks, slots=slots)
    sequences = [make(*item) for item in mix]
    for sequence in sequences:
        s.add(sequence)
    left = set(sequences)
    for turn in range(2000):
        if not s.has_work:
            break
        if turn < len(cancelled) and cancelled[turn] < len(sequences):
            s.drop(sequences[cancelled[turn]])
            left.discard(sequences[cancelled[turn]])
        left.difference_update(advance(s))
    assert not left
    assert s.pool.num_used == 0
    assert s.pool.num_available == blocks


def test_slots_evict_the_longest_idle_and_never_a_leased_one():
    table = SlotTable(2)
    assert table.acquire("a") == Lease(1, load=True)
    assert table.acquire("b") == Lease(2, load=True)
    assert table.acquire("c") is None
    table.release("b")
    table.release("a")
    assert table.acquire("b") == Lease(2, load=False)
    assert table.acquire("c") == Lease(1, load=True)
    assert table.residents == ("b", "c")


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef")), max_size=60), st.integers(1, 4))
def test_slots_stay_whole(moves, slots):
    table, leased = SlotTable(slots), []
    for acquire, digest in moves:
        if acquire and table.acquire(digest) is not None:
            leased.append(digest)
        elif not acquire and digest in leased:
            leased.remove(digest)
            table.release(digest)
        table.check_integrity()
        assert set(leased) <= set(table.residents)


def test_a_lost_block_is_noticed():
    pool = BlockPool(4, 16)
    assert pool.reserve(2)
    pool.take()
    pool._refs.clear()
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity()
