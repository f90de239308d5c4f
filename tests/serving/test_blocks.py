"""The block pool, content keys, and what the scheduler shares: plain Python, no model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from okavango.modalities.content import Media
from okavango.modalities.prompt import Rendered, Span
from okavango.serving.adapters.slots import SlotTable
from okavango.serving.cache.blocks import BlockPool
from okavango.serving.cache.prefix import keys_of
from okavango.serving.scheduler import Limits, Scheduler
from okavango.serving.sequence import Sequence
from okavango.serving.types import AdapterRef, Request

SIZE = 4


def make(tokens, adapter: str | None = None, max_tokens: int = 1, **rendered) -> Sequence:
    ref = AdapterRef("name", 1, adapter) if adapter else None
    return Sequence(Request("id", Rendered(tuple(tokens), **rendered), ref), max_tokens)


def keys(sequence: Sequence) -> list[bytes]:
    return keys_of(sequence, len(sequence.tokens) // SIZE, SIZE)


def step(s: Scheduler) -> dict[Sequence, int]:
    """One step; how many tokens of each sequence it computed."""
    plan = s.schedule()
    s.check_integrity()
    s.commit(plan.chunks)
    for chunk in plan.chunks:
        if chunk.samples:
            chunk.sequence.tokens.append(7)
            if chunk.sequence.num_generated == chunk.sequence.max_tokens:
                s.drop(chunk.sequence)
    s.check_integrity()
    return {chunk.sequence: chunk.count for chunk in plan.chunks}


def scheduler(blocks: int = 64, tokens: int = 64, sequences: int = 8) -> Scheduler:
    return Scheduler(BlockPool(blocks, SIZE), SlotTable(2), Limits(sequences, tokens))


def run(s: Scheduler, sequence: Sequence) -> int:
    """Run a sequence alone to its end; the tokens that were computed."""
    s.add(sequence)
    computed = 0
    while s.has_work:
        computed += step(s)[sequence]
    return computed


# --- keys


def test_a_key_is_over_all_that_stands_before_it():
    one, other = keys(make(range(12))), keys(make([9, *range(1, 12)]))
    assert len(set(one)) == 3
    assert not set(one) & set(other)
    assert keys(make(range(8))) == one[:2]


def test_adapters_have_keys_of_their_own_whatever_they_are_called():
    tokens = range(8)
    assert len({tuple(keys(make(tokens, adapter))) for adapter in (None, "a", "b")}) == 3
    request = replace(make(tokens, "a").request, id="other", adapter=AdapterRef("renamed", 9, "a"))
    assert keys(Sequence(request, 1)) == keys(make(tokens, "a"))


def media_keys(*contents: bytes, at: tuple[int, ...] = (1, 5), length: int = 3) -> tuple[bytes, ...]:
    spans = tuple(Span("image", start, length) for start in at[: len(contents)])
    media = tuple(Media("image", data) for data in contents)
    return tuple(keys(make([0] * 12, spans=spans, media=media)))


def test_placeholders_are_told_apart_by_what_fills_them():
    found = [
        media_keys(),
        media_keys(b"x"),
        media_keys(b"y"),
        media_keys(b"x", b"x"),
        media_keys(b"x", b"y"),
        media_keys(b"y", b"x"),
        media_keys(b"x", at=(0,)),
        media_keys(b"x", at=(2,)),
        media_keys(b"x", length=2),
        media_keys(b"x", length=4),
    ]
    assert len({each[-1] for each in found}) == len(found)


def test_a_medium_over_several_blocks_is_in_all_of_them():
    one, other = (media_keys(data, at=(2,), length=10) for data in (b"x", b"y"))
    assert not set(one) & set(other)


# --- the pool


class Pool(RuleBasedStateMachine):
    """Holders that take, fill, share and release, beside a plain account of what should be so."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, SIZE)
        self.tables: list[list[int]] = [[], [], []]
        self.content: dict[int, bytes] = {}

    @rule(holder=st.integers(0, 2))
    def take(self, holder):
        full = self.pool.num_available == 0
        block = self.pool.take()
        assert (block is None) == full
        if block is not None:
            self.content.pop(block, None)
            self.tables[holder].append(block)

    @rule(holder=st.integers(0, 2), key=st.sampled_from([b"a", b"b", b"c"]))
    def fill(self, holder, key):
        blocks = [b for b in self.tables[holder] if b not in self.content]
        if blocks:
            self.pool.publish(blocks[0], key)
            if key not in self.content.values():
                self.content[blocks[0]] = key

    @rule(holder=st.integers(0, 2), key=st.sampled_from([b"a", b"b", b"c"]))
    def share(self, holder, key):
        block = self.pool.share(key)
        assert block == next((b for b, k in self.content.items() if k == key), None)
        if block is not None:
            self.tables[holder].append(block)

    @rule(holder=st.integers(0, 2))
    def release(self, holder):
        self.pool.release(self.tables[holder])
        self.tables[holder] = []

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def forget(self, data):
        block = data.draw(st.sampled_from(sorted(self.content)))
        self.pool.forget(block)
        del self.content[block]

    @invariant()
    def whole(self):
        self.pool.check_integrity()
        self.pool.check_holders(self.tables)
        held = {block for table in self.tables for block in table}
        assert self.pool.num_used == len(held)
        assert self.pool.num_available == 6 - len(held)
        assert all(self.pool.is_known(key) for key in self.content.values())


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_the_longest_idle_goes_first_and_a_prompts_end_before_its_beginning():
    pool = BlockPool(3, SIZE)
    blocks = [pool.take() for _ in range(3)]
    for block, key in zip(blocks, (b"1", b"2", b"3"), strict=True):
        pool.publish(block, key)
    pool.release(blocks)
    assert pool.take() == blocks[2]
    assert [pool.is_known(key) for key in (b"1", b"2", b"3")] == [True, True, False]


def test_a_lost_block_is_noticed():
    pool = BlockPool(4, 16)
    pool.take()
    pool._refs.clear()
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity()


def test_a_table_that_holds_what_the_pool_does_not_know_of_is_noticed():
    s = scheduler()
    sequence = make(range(10), max_tokens=9)
    s.add(sequence)
    step(s)
    sequence.blocks[1] = 40
    with pytest.raises(AssertionError, match="disagree"):
        s.check_integrity()


# --- what the scheduler shares


def test_a_prompt_that_came_before_costs_its_last_block_alone():
    s = scheduler()
    assert run(s, make(range(14))) == 14
    again = make(range(14))
    assert run(s, again) == 2
    assert again.num_reused == 12
    assert run(s, make([*range(10), 99, 98])) == 4
    assert run(s, make(range(14), "a")) == 14


@pytest.mark.parametrize("shared", [False, True])
def test_a_principal_finds_what_another_computed_only_where_that_is_wanted(shared):
    limits = Limits(8, 64, share_prefixes=shared)
    s = Scheduler(BlockPool(64, SIZE), SlotTable(2), limits)
    prompt = Rendered(tuple(range(14)))
    computed = [run(s, Sequence(Request("id", prompt, principal=name), 1)) for name in ("p", "q", "p")]
    assert computed == [14, 2 if shared else 14, 2]


def test_the_last_token_is_always_computed():
    s = scheduler()
    run(s, make(range(12)))
    assert run(s, make(range(12))) == 4


def test_an_answer_is_reused_by_the_turn_after_it():
    s = scheduler()
    first = make(range(6), max_tokens=9)
    run(s, first)
    assert run(s, make([*first.tokens, 1, 2])) == 5  # 14 positions were computed: three full blocks


def test_samples_of_one_prompt_compute_it_once_and_share_its_blocks():
    s = scheduler(tokens=16)
    samples = [make(range(30), max_tokens=6) for _ in range(5)]
    for sample in samples:
        s.add(sample)
    computed: Counter[Sequence] = Counter()
    computed.update(step(s))
    assert s.tally.waits["prefix"] == 4
    while any(sample.num_generated == 0 for sample in samples):
        computed.update(step(s))
    assert [sample.blocks[:7] for sample in samples] == [samples[0].blocks[:7]] * 5
    assert sum(computed.values()) < 30 + 5 * 8
    assert s.pool.num_used == 7 + 5


def test_who_waits_for_a_block_goes_on_when_the_one_that_computes_it_leaves():
    s = scheduler(tokens=8)
    first, second = make(range(30)), make(range(30))
    s.add(first)
    s.add(second)
    assert step(s) == {first: 8}
    s.drop(first)
    assert step(s) == {second: 8}
    assert second.num_reused == 8


def test_a_failed_steps_blocks_are_not_kept_and_those_before_it_are():
    s = scheduler(tokens=8)
    failing = make(range(20))
    s.add(failing)
    step(s)
    s.schedule()
    s.drop(failing)  # what core does when the step raises: no commit
    s.check_integrity()
    assert run(s, make(range(20))) == 12


def test_what_is_forgotten_is_not_reused():
    s = scheduler(tokens=8)
    broken = make(range(20))
    s.add(broken)
    step(s)
    s.drop(broken, forget=True)
    s.check_integrity()
    assert run(s, make(range(20))) == 20


def test_idle_content_gives_way_to_who_needs_the_block():
    s = scheduler(blocks=8)
    run(s, make(range(28)))
    assert run(s, make(range(100, 132))) == 32
    assert run(s, make(range(28))) == 28


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=14), st.integers(1, 6), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    st.integers(6, 20),
)
def test_whatever_is_shared_every_position_holds_what_its_sequence_says(mix, blocks):
    """A model of the cache: what is written where. Reading it back must give each sequence's own history."""
    s = scheduler(blocks=blocks, tokens=9)
    cache: dict[tuple[int, int], tuple] = {}
    for tokens, generated, adapted in mix:
        s.add(make(tokens, "a" if adapted else None, generated))
    for _ in range(2000):
        if not s.has_work:
            break
        plan = s.schedule()
        for chunk in plan.chunks:
            own = chunk.sequence
            for p in range(chunk.start, chunk.end):
                cache[own.blocks[p // SIZE], p % SIZE] = (own.digest, tuple(own.tokens[: p + 1]))
        for chunk in plan.chunks:
            own = chunk.sequence
            for p in range(chunk.end):
                assert cache[own.blocks[p // SIZE], p % SIZE] == (own.digest, tuple(own.tokens[: p + 1]))
        s.commit(plan.chunks)
        s.check_integrity()
        for chunk in plan.chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(len(chunk.sequence.tokens) % 2)
                if chunk.sequence.num_generated == chunk.sequence.max_tokens:
                    s.drop(chunk.sequence)
    assert not s.has_work
