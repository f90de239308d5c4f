"""Preempted sequences' blocks on the host: decided in plain Python, against a model of the cache."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from okavango.modalities.prompt import Rendered
from okavango.serving.adapters.slots import SlotTable
from okavango.serving.cache.blocks import BlockPool
from okavango.serving.cache.parking import Parked, Parking
from okavango.serving.scheduler import Limits, Scheduler
from okavango.serving.sequence import Sequence
from okavango.serving.types import Request

SIZE = 4


class Cache:
    """Blocks that hold, at each position, the tokens up to it; what the runner does, without numbers."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.parks = 0
        self._at: dict[tuple[int, int], tuple[int, ...]] = {}

    def step(self) -> None:
        step = self.scheduler.schedule()
        for move in step.parks:
            self.parks += 1
            data = [[self._at.get((block, i)) for i in range(SIZE)] for block in move.blocks]
            move.sequence.parked = Parked(move.tokens, len(move.blocks), data)
        for move in step.restores:
            parked = move.sequence.parked
            for n, block in enumerate(move.blocks, move.first):
                for i in range(SIZE):
                    self._at[block, i] = parked.data[n][i]
            move.sequence.parked = None
        for chunk in step.chunks:
            self._compute(chunk.sequence, chunk.start, chunk.end)
        self.scheduler.commit(step.chunks)
        self.scheduler.check_integrity()
        for chunk in step.chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(len(chunk.sequence.tokens) % 3)
                if chunk.sequence.num_generated == chunk.sequence.max_tokens:
                    self.scheduler.drop(chunk.sequence)

    def _compute(self, sequence: Sequence, start: int, end: int) -> None:
        for p in range(start, end):
            self._at[sequence.blocks[p // SIZE], p % SIZE] = tuple(sequence.tokens[: p + 1])
        for p in range(end):
            assert self._at[sequence.blocks[p // SIZE], p % SIZE] == tuple(sequence.tokens[: p + 1])


def scheduler(blocks: int, parking: int, tokens: int = 16) -> Scheduler:
    s = Scheduler(BlockPool(blocks, SIZE), SlotTable(1), Limits(6, tokens), parking)
    s.parking.saw_computing(1, 1.0)
    return s


def make(prompt: list[int], tokens: int) -> Sequence:
    return Sequence(Request(f"r{id(prompt)}", Rendered(tuple(prompt))), tokens)


def squeeze_two(parking: int) -> tuple[Cache, Sequence]:
    """Two sequences with room for one and a half: the second one is preempted."""
    cache = Cache(scheduler(8, parking))
    first, second = make([1] * 9, 16), make([2] * 9, 16)
    cache.scheduler.add(first)
    cache.scheduler.add(second)
    while not second.num_preempted:
        cache.step()
    return cache, second


def test_what_was_parked_is_not_computed_again():
    cache, second = squeeze_two(parking=100)
    assert second.parked is not None
    computed = second.parked.tokens
    assert len(second.tokens) == computed + 1
    restored = again = 0
    while cache.scheduler.has_work:
        cache.step()
        restored += cache.scheduler.tally.restored_tokens
        again += cache.scheduler.tally.prefill_tokens
    assert again == 0
    assert 0 < restored <= computed
    assert second.parked is None


def test_without_room_on_the_host_it_is_computed_again():
    cache, second = squeeze_two(parking=2)
    assert second.parked is None
    while cache.scheduler.has_work:
        cache.step()
    assert second.num_generated == 16


def test_parking_is_left_where_computing_is_quicker():
    parking = Parking(100, BlockPool(8, SIZE))
    assert not parking.pays(64, 16)  # nothing is known yet, and there is nothing to save
    parking.saw_computing(100, 1.0)
    assert parking.pays(64, 16)  # the first copy shows what it costs
    parking.saw_copying(10, 1.0)
    assert not parking.pays(64, 16)
    for _ in range(50):
        parking.saw_copying(10, 0.01)
    assert parking.pays(64, 16)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=14), st.integers(1, 20)),
        min_size=1,
        max_size=10,
    ),
    st.integers(9, 16),
    st.sampled_from([0, 6, 12, 100]),
    st.integers(7, 20),
)
def test_what_comes_back_is_what_went(mix, blocks, parking, tokens):
    cache = Cache(scheduler(blocks, parking, tokens))
    for prompt, generated in mix:
        cache.scheduler.add(make(prompt, generated))
    for _ in range(2000):
        if not cache.scheduler.has_work:
            break
        cache.step()
    assert not cache.scheduler.has_work
    assert cache.scheduler.pool.num_used == 0


def test_under_pressure_parking_happens():
    cache = Cache(scheduler(12, 100))
    for i in range(6):
        cache.scheduler.add(make([i] * 6, 30))
    while cache.scheduler.has_work:
        cache.step()
    assert cache.parks > 2
