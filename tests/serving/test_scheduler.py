"""The scheduler without a model: plain Python in milliseconds."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from okavango.modalities.prompt import Rendered
from okavango.serving.adapters.slots import SlotTable
from okavango.serving.cache.blocks import BlockPool
from okavango.serving.scheduler import Limits, Scheduler
from okavango.serving.sequence import Sequence
from okavango.serving.step import Load
from okavango.serving.types import AdapterRef, Request

_made = 0


def make(
    prompt: int, max_tokens: int, adapter: str | None = None, *, text: int | None = None, **fields
) -> Sequence:
    """`text`: sequences with the same one begin alike; every other prompt is its own."""
    global _made
    _made += 1
    ref = AdapterRef(adapter, 1, adapter) if adapter else None
    first = 1_000_000 * (_made if text is None else -1 - text)
    return Sequence(
        Request(f"r{_made}", Rendered(tuple(range(first, first + prompt))), ref, **fields), max_tokens
    )


def scheduler(blocks=64, size=4, slots=2, sequences=4, tokens=16, **limits) -> Scheduler:
    return Scheduler(BlockPool(blocks, size), SlotTable(slots), Limits(sequences, tokens, **limits))


def advance(s: Scheduler) -> list[Sequence]:
    """One step with a made-up token for each sequence that samples; those that finished."""
    step = s.schedule()
    s.check_integrity()
    assert step.num_tokens <= s.limits.max_step_tokens
    s.commit(step.chunks)
    finished = []
    for chunk in step.chunks:
        if chunk.samples:
            chunk.sequence.tokens.append(len(chunk.sequence.tokens))
            if chunk.sequence.num_generated == chunk.sequence.max_tokens:
                s.drop(chunk.sequence)
                finished.append(chunk.sequence)
    s.check_integrity()
    return finished


def run(s: Scheduler, steps: int = 20_000) -> list[Sequence]:
    """Until nothing is left; in the order in which they finished."""
    finished = []
    for _ in range(steps):
        if not s.has_work:
            return finished
        finished += advance(s)
    raise AssertionError("it does not come to an end")


def counts(s: Scheduler, names: dict[Sequence, str]) -> dict[str, int]:
    step = s.schedule()
    s.check_integrity()
    s.commit(step.chunks)
    for chunk in step.chunks:
        if chunk.samples:
            chunk.sequence.tokens.append(0)
    return {names[chunk.sequence]: chunk.count for chunk in step.chunks}


def test_running_sequences_decode_while_a_long_prompt_is_computed_in_chunks():
    s = scheduler()
    short, long = make(3, 50), make(40, 2)
    s.add(short)
    advance(s)
    s.add(long)
    names = {short: "short", long: "long"}
    assert [counts(s, names)["long"] for _ in range(3)] == [15, 15, 10]
    assert counts(s, names) == {"short": 1, "long": 1}


def test_while_anybody_generates_prompts_have_a_cap():
    s = scheduler(tokens=64, max_prefill_tokens=8)
    first, second = make(30, 50), make(30, 50)
    names = {first: "first", second: "second"}
    s.add(first)
    assert counts(s, names) == {"first": 30}
    s.add(second)
    assert counts(s, names) == {"first": 1, "second": 8}


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_a_long_one_for_many_short_ones():
    s = scheduler(tokens=16, sequences=16)
    long, short = make(100, 1), make(6, 1)
    s.add(long)
    s.add(short)
    assert counts(s, {long: "long", short: "short"}) == {"long": 10, "short": 6}
    for _ in range(12):
        s.add(make(30, 1))
    for _ in range(3):
        before = long.num_computed
        advance(s)
        assert long.num_computed >= before + 7  # half of what those that generate leave


def test_rows_of_one_slot_are_adjacent_and_the_base_has_no_segment():
    s = scheduler(slots=3, sequences=8)
    for adapter in ("a", None, "b", "a", None):
        s.add(make(2, 1, adapter))
    step = s.schedule()
    slots = [chunk.sequence.slot for chunk in step.chunks]
    assert slots == sorted(slots)
    assert step.segments == ((1, 4, 8), (2, 8, 10))
    assert [sequence.digest for sequence in step.loads] == ["a", "b"]


def test_a_sequence_is_admitted_with_the_blocks_of_its_prompt_not_of_its_answer():
    s = scheduler(blocks=10, size=4)
    for _ in range(3):
        s.add(make(8, 24))  # two blocks now, eight in the end
    s.schedule()
    assert (len(s.running), len(s.waiting)) == (3, 0)
    s = scheduler(blocks=10, size=4)
    for _ in range(3):
        s.add(make(16, 1))
    s.schedule()
    assert (len(s.running), len(s.waiting)) == (2, 1)
    assert s.tally.waits == Counter(blocks=1)


def test_the_last_to_come_is_preempted_and_goes_on_where_it_was():
    s = scheduler(blocks=8, size=4)
    first, second = make(8, 16), make(8, 16)
    s.add(first)
    s.add(second)
    while not second.num_preempted:
        advance(s)
    assert s.running == [first]
    assert list(s.waiting) == [second]
    kept = list(second.tokens)
    assert len(kept) > 8
    assert run(s) == [first, second]
    assert second.tokens[: len(kept)] == kept
    assert (first.num_preempted, second.num_preempted) == (0, 1)


def test_of_one_flow_the_less_urgent_is_preempted():
    s = scheduler(blocks=8, size=4)
    urgent, other = make(8, 16, priority=-1), make(8, 16)
    s.add(other)
    advance(s)
    s.add(urgent)
    run(s)
    assert (urgent.num_preempted, other.num_preempted) == (0, 1)


def test_the_preempted_are_admitted_before_anybody_new():
    s = scheduler(blocks=8, size=4)
    first, second = make(8, 16), make(8, 16)
    s.add(first)
    s.add(second)
    while not second.num_preempted:
        advance(s)
    small = make(1, 1)
    s.add(small)
    while second not in s.running:
        assert small not in s.running  # it would fit, and take what the second one waits for
        advance(s)
    run(s)
    assert (second.num_generated, small.num_generated) == (16, 1)


def test_a_sequence_without_a_free_slot_is_passed_over():
    s = scheduler(slots=1)
    first, second, bare = make(2, 2, "a"), make(2, 1, "b"), make(2, 3)
    for sequence in (first, second, bare):
        s.add(sequence)
    s.schedule()
    assert s.running == [first, bare]
    assert s.tally.waits == Counter(slot=1)
    s.drop(first)
    assert s.schedule().loads == (Load(1, "b", None),)


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
    st.tuples(
        st.integers(1, 40),
        st.integers(1, 12),
        st.sampled_from([None, "a", "b", "c"]),
        st.one_of(st.none(), st.integers(0, 1)),
        st.sampled_from(["p", "q"]),
        st.integers(-1, 1),
    ),
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(
    requests,
    st.lists(st.integers(0, 24), max_size=6),
    st.integers(1, 3),
    st.integers(13, 30),
    st.sampled_from([None, 1, 5]),
    st.sampled_from([0, 20, 1000]),
)
def test_every_sequence_finishes_whatever_comes_and_goes(mix, cancelled, slots, blocks, cap, patience):
    s = scheduler(blocks=blocks, slots=slots, max_prefill_tokens=cap, slot_patience=patience)
    sequences = [
        make(prompt, tokens, adapter, text=text, principal=principal, priority=priority)
        for prompt, tokens, adapter, text, principal, priority in mix
    ]
    for sequence in sequences:
        s.add(sequence)
    left = set(sequences)
    for turn in range(3000):
        if not s.has_work:
            break
        if turn < len(cancelled) and cancelled[turn] < len(sequences):
            s.drop(sequences[cancelled[turn]])
            left.discard(sequences[cancelled[turn]])
        left.difference_update(advance(s))
    assert not left
    assert s.pool.num_used == 0
    assert s.pool.num_available == blocks


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 16), st.integers(1, 30)), min_size=2, max_size=8), st.integers(0, 9))
def test_with_room_for_one_alone_all_finish_and_no_step_is_lost_for_long(mix, later):
    blocks = max(-(-(prompt + tokens) // 4) for prompt, tokens in mix)
    s = scheduler(blocks=blocks, sequences=8)
    sequences = [make(prompt, tokens, text=0) for prompt, tokens in mix]
    empty = 0
    for turn in range(5000):
        if turn % (later + 1) == 0 and sequences:
            s.add(sequences.pop())
        step = s.schedule()
        empty = 0 if step.chunks or not s.has_work else empty + 1
        assert empty < len(mix)
        s.check_integrity()
        s.commit(step.chunks)
        for chunk in step.chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(turn)
                if chunk.sequence.num_generated == chunk.sequence.max_tokens:
                    s.drop(chunk.sequence)
        if not s.has_work and not sequences:
            return
    raise AssertionError("it does not come to an end")


def test_where_it_had_to_preempt_it_admits_with_more_care_and_forgets_in_time():
    s = scheduler(blocks=24, size=4, sequences=16)
    for _ in range(40):
        s.add(make(8, 64))
    preempted = 0
    for _ in range(1000):
        advance(s)
        preempted += s.tally.preempted
    assert preempted > 0
    assert s._caution > 0
    while s.has_work:
        s.drop(next(iter([*s.waiting, *s.running])))
    for _ in range(400):
        s.schedule()
    assert s._caution < 0.001
