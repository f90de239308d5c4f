"""Decoders whose layers all have a sliding window: blocks that no token to come can see are given up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_fixtures import Bundles

from okavango.modalities.prompt import Rendered
from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tiny_bundle import write_tiny_bundle
from okavango.serving.adapters.slots import SlotTable
from okavango.serving.cache import tables
from okavango.serving.cache.blocks import BlockPool
from okavango.serving.cache.parking import Parked
from okavango.serving.cache.tables import NO_BLOCK, drop, span
from okavango.serving.scheduler import Limits, Scheduler
from okavango.serving.sequence import Sequence
from okavango.serving.types import Request, SamplingParams

SIZE, WINDOW = 4, 24
WORDS = "pack my box with five dozen liquor jugs; how vexingly quick daft zebras jump over them all! "


class Cache:
    """Blocks that hold, at each position, the tokens up to it. Reads as much as the native kernels do."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.most = self.parks = 0
        self._at: dict[tuple[int, int], tuple[int, ...]] = {}

    def step(self) -> None:
        step = self.scheduler.schedule()
        self.scheduler.check_integrity()
        for move in step.parks:
            self.parks += 1
            data = [[self._at.get((block, i)) for i in range(SIZE)] for block in move.blocks]
            move.sequence.parked = Parked(move.tokens, len(move.blocks), data)
        for move in step.restores:
            for n, block in enumerate(move.blocks, move.first):
                self._at |= {(block, i): move.sequence.parked.data[n][i] for i in range(SIZE)}
            move.sequence.parked = None
        for chunk in step.chunks:
            for p in range(chunk.start, chunk.end):
                self._at[self._place(chunk.sequence, p)] = tuple(chunk.sequence.tokens[: p + 1])
        for chunk in step.chunks:
            seen = max(0, chunk.start - self.scheduler.window + 1) // tables.GROUP * tables.GROUP
            for p in range(seen, chunk.end):
                assert self._at[self._place(chunk.sequence, p)] == tuple(chunk.sequence.tokens[: p + 1])
            self.most = max(self.most, len(chunk.sequence.held))
        self.scheduler.commit(step.chunks)
        self.scheduler.check_integrity()
        for chunk in step.chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(len(chunk.sequence.tokens) % 3)
                if chunk.sequence.num_generated == chunk.sequence.max_tokens:
                    self.scheduler.drop(chunk.sequence)

    def _place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        block = sequence.blocks[position // SIZE]
        assert block != NO_BLOCK
        return block, position % SIZE


def scheduler(blocks: int, window: int, tokens: int = 16, parking: int = 0) -> Scheduler:
    s = Scheduler(BlockPool(blocks, SIZE), SlotTable(1), Limits(6, tokens), parking, window)
    s.parking.saw_computing(1, 1.0)
    return s


def make(prompt: list[int], tokens: int) -> Sequence:
    return Sequence(Request(f"r{id(prompt)}", Rendered(tuple(prompt))), tokens)


def run(cache: Cache) -> None:
    for _ in range(3000):
        if not cache.scheduler.has_work:
            break
        cache.step()
    assert not cache.scheduler.has_work
    assert cache.scheduler.pool.num_used == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=50), st.integers(1, 40)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 20),
    st.sampled_from([4, 8, 16]),
    st.integers(0, 12),
    st.sampled_from([0, 6, 100]),
    st.integers(7, 20),
)
def test_nothing_is_read_that_was_given_up(mix, window, group, spare, parking, tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "GROUP", group)
        most = span(window, tokens, BlockPool(1, SIZE))
        cache = Cache(scheduler(most + spare, window, tokens, parking))
        for prompt, generated in mix:
            cache.scheduler.add(make(prompt, generated))
        run(cache)
        assert cache.most <= most


def test_a_sequence_of_any_length_takes_what_its_window_takes():
    most = span(WINDOW, 16, BlockPool(1, SIZE))
    cache = Cache(scheduler(most, WINDOW))
    assert cache.scheduler.longest is None
    cache.scheduler.add(make([1] * 1000, 300))
    run(cache)
    assert cache.most <= most < 1300 // SIZE
    assert scheduler(most - 1, WINDOW).longest == (most - 1) * SIZE


def test_a_long_prompt_is_admitted_beside_others_for_what_it_takes_at_a_time():
    most = span(WINDOW, 16, BlockPool(1, SIZE))
    s = scheduler(2 * most + 2, WINDOW)
    for token in (1, 2):
        s.add(make([token] * 1000, 1))
    s.schedule()
    assert len(s.running) == 2


def test_what_was_given_up_is_found_by_who_begins_alike():
    s = scheduler(100, WINDOW)
    first, second = make(list(range(300)), 1), make(list(range(300)), 1)
    s.add(first)
    while s.has_work:
        [chunk] = s.schedule().chunks
        s.commit([chunk])
        if chunk.samples:
            assert first.num_dropped > 30
            s.drop(first)
    s.add(second)
    [chunk] = s.schedule().chunks
    assert (chunk.start, chunk.count) == (296, 4)
    assert second.num_dropped > 30  # of what it found, too
    s.check_integrity()


def test_a_shared_block_stays_with_who_still_needs_it():
    pool = BlockPool(8, SIZE)
    one, other = make([1] * 20, 1), make([1] * 20, 1)
    one.blocks = [block for _ in range(4) if (block := pool.take()) is not None]
    for i, block in enumerate(one.blocks):
        pool.publish(block, bytes([i]))
    other.blocks = [pool.share(bytes([i])) for i in range(4)]
    drop(one, 3, pool)
    pool.check_holders([one.held, other.held])
    assert (one.num_dropped, one.blocks[:3], other.num_dropped) == (3, [NO_BLOCK] * 3, 0)
    drop(other, 6, pool)  # more than it has: those to come are not taken
    pool.check_holders([one.held, other.held])
    assert other.blocks == [NO_BLOCK] * 6
    pool.check_integrity()


def test_under_pressure_what_is_parked_is_the_window_alone():
    most = span(WINDOW, 16, BlockPool(1, SIZE))
    cache = Cache(scheduler(most + 20, WINDOW, parking=1000))
    for token in range(4):
        cache.scheduler.add(make([token] * 150, 120))
    run(cache)
    assert cache.parks > 0


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    base = write_tiny_base(folder / "base", architecture="mistral", image=False)
    for rank in (4, 8):
        target = folder / f"r{rank}"
        write_tiny_bundle(target, base, seed=rank, rank=rank, targets="all-linear", head=False, probes=False)
    return base, Bundles({f"r{rank}": folder / f"r{rank}" for rank in (4, 8)})


def poison(harness) -> None:
    """Fill all blocks that nobody holds with what is no number, before every step."""
    runner, pool = harness.engine.core.runner, harness.engine.core.scheduler.pool
    compute = runner.run

    def run_poisoned(step, rows):
        for block in [*pool._idle]:
            pool.forget(block)
        for cache in runner.backend.caches:
            cache.keys[:, pool._free] = float("nan")
            cache.values[:, pool._free] = float("nan")
        return compute(step, rows)

    runner.run = run_poisoned


def squeeze(harness, blocks: int) -> None:
    pool = harness.engine.core.scheduler.pool
    pool._free = pool._free[-blocks:]
    pool.num_blocks = blocks


def requests_of(harness, tokens: int) -> list:
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    lengths, adapters = [1, 230, 170, 90, 300, 16, 200, 260], [None, "r4", "r8"]
    return [
        harness.request((WORDS * 4)[i : i + length], adapters[i % 3], params=params)
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("parking", [0, 1 << 24])
def test_mistral_answers_as_alone_with_less_memory_than_one_conversation(
    mistral, make_harness, make_reference, parking
):
    base, bundles = mistral
    harness = make_harness(base, bundles, slots=2, max_step_tokens=40, parking_bytes=parking)
    scheduler = harness.engine.core.scheduler
    assert scheduler.window == WINDOW
    squeeze(harness, 18)  # 288 tokens
    scheduler.parking.pays = lambda tokens, blocks: True
    requests = requests_of(harness, tokens=60)
    assert max(len(request.prompt.tokens) for request in requests) > 300
    expected = [make_reference(base, bundles).tokens(request) for request in requests]
    assert harness.tokens(requests) == expected


def test_what_is_given_up_may_be_anything(mistral, make_harness):
    base, bundles = mistral
    clean, poisoned = (make_harness(base, bundles, max_step_tokens=40) for _ in range(2))
    poison(poisoned)
    assert poisoned.tokens(requests_of(poisoned, 40)) == clean.tokens(requests_of(clean, 40))


def test_with_a_layer_that_sees_all_nothing_is_given_up(make_harness, tmp_path):
    base = write_tiny_base(tmp_path / "base", architecture="gemma3_text", image=False)
    harness = make_harness(base, Bundles({}))
    assert harness.engine.core.scheduler.window is None
