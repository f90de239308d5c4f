"""Steps that the scheduler plans before the last one is committed. Plain Python in milliseconds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from okavango.modalities.prompt import Rendered
from okavango.serving.adapters.slots import SlotTable
from okavango.serving.cache.blocks import BlockPool
from okavango.serving.scheduler import Limits, Scheduler
from okavango.serving.sequence import Sequence
from okavango.serving.step import Step
from okavango.serving.types import AdapterRef, Request


def sequence(name: str, prompt: int, most: int, adapter: str | None = None) -> Sequence:
    ref = AdapterRef(adapter, 1, adapter) if adapter else None
    return Sequence(Request(name, Rendered(tuple(range(prompt))), ref), most)


def scheduler(blocks: int = 32, window: int | None = None) -> Scheduler:
    return Scheduler(BlockPool(blocks, 4), SlotTable(2), Limits(4, 12), window=window)


def commit(s: Scheduler, step: Step) -> None:
    """What the engine does with a step's results, of those that are still there."""
    chunks = [chunk for chunk in step.chunks if chunk.sequence in s.running]
    s.commit(chunks)
    for chunk in chunks:
        if chunk.samples:
            chunk.sequence.tokens.append(7)
            if chunk.sequence.num_generated == chunk.sequence.max_tokens:
                s.drop(chunk.sequence)


def test_the_next_step_is_the_same_a_position_further() -> None:
    s = scheduler()
    long, short = sequence("long", 3, 9), sequence("short", 3, 2)
    s.add(long)
    s.add(short)
    prompts = s.schedule()
    assert s.follow(prompts) is None  # its chunks are of more than one token
    commit(s, prompts)
    step = s.schedule()
    ahead = s.follow(step)
    assert ahead is not None
    # the short one gets its last token from the step before
    assert [(c.sequence, c.start, c.count) for c in ahead.chunks] == [(long, 4, 1)]
    assert len(long.blocks) == 2  # for the position that begins one
    commit(s, step)
    s.check_integrity()
    assert [c.start for c in s.follow(ahead).chunks] == [5]


def test_where_somebody_waits_nothing_is_begun_ahead() -> None:
    s = scheduler()
    s.add(sequence("first", 3, 9))
    commit(s, s.schedule())
    step = s.schedule()
    s.add(sequence("second", 3, 9))
    assert s.follow(step) is None


def test_what_would_need_a_block_that_is_not_free_waits() -> None:
    s = scheduler(blocks=1)
    only = sequence("only", 3, 5)
    s.add(only)
    commit(s, s.schedule())
    step = s.schedule()
    assert s.follow(step) is None
    assert len(only.blocks) == 1
    s.check_integrity()


def test_who_has_gone_meanwhile_ends_it() -> None:
    s = scheduler()
    first, second = sequence("first", 3, 9), sequence("second", 3, 9)
    s.add(first)
    s.add(second)
    commit(s, s.schedule())
    step = s.schedule()
    ahead = s.follow(step)
    commit(s, step)
    s.drop(first)
    assert s.follow(ahead) is None
    commit(s, ahead)
    assert second.num_computed == 5
    s.check_integrity()


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 20), st.integers(1, 12), st.sampled_from([None, "a", "b", "c"]), st.integers(0, 30)
        ),
        min_size=1,
        max_size=10,
    ),
    st.sampled_from([10, 32]),
    st.sampled_from([None, 6]),
)
def test_everybody_gets_all_tokens_and_nothing_is_lost(visits, blocks, window) -> None:
    s = scheduler(blocks, window)
    sequences = [sequence(str(i), prompt, most, ref) for i, (prompt, most, ref, _) in enumerate(visits)]
    arrivals = [when for *_, when in visits]
    flight: Step | None = None
    for now in range(3000):
        for each, when in zip(sequences, arrivals, strict=True):
            if when == now:
                s.add(each)
        if not s.has_work and now > max(arrivals):
            break
        if flight is None and not s.has_work:
            continue
        step = flight or s.schedule()
        flight = s.follow(step)
        s.check_integrity()
        commit(s, step)
        s.check_integrity()
    assert [each.num_generated for each in sequences] == [most for _, most, _, _ in visits]
    assert s.pool.num_used == 0
