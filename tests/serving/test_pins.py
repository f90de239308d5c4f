"""Pinned adapters: loaded ahead of requests, never evicted, and nobody starves beside them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_fixtures import wait_until

from okavango.modalities.prompt import Rendered
from okavango.platform.errors import ConfigError, UnsupportedError
from okavango.serving.adapters.pins import Preloads
from okavango.serving.adapters.slots import Lease, SlotTable
from okavango.serving.cache.blocks import BlockPool
from okavango.serving.scheduler import Limits, Scheduler
from okavango.serving.sequence import Sequence
from okavango.serving.step import Load
from okavango.serving.types import AdapterRef, Request


def test_a_pinned_adapter_is_not_evicted_and_an_unpinned_one_is_again():
    table = SlotTable(2)
    table.pin({"a"})
    for digest in "ab":
        table.acquire(digest)
        table.release(digest)
    assert table.acquire("c") == Lease(2, load=True)
    assert not table.has_room("d")
    table.pin({"c"})
    assert table.acquire("d") == Lease(1, load=True)
    table.check_integrity()


def test_pins_leave_a_slot():
    with pytest.raises(AssertionError, match="leave no slot"):
        SlotTable(2).pin({"a", "b"})


@given(
    st.lists(st.tuples(st.sampled_from(["take", "leave", "pin"]), st.sampled_from("abcdef")), max_size=80),
    st.integers(2, 4),
)
def test_slots_stay_whole_with_pins(moves, slots):
    table, leased, kept = SlotTable(slots), [], set()
    for move, digest in moves:
        if move == "pin":
            pins = {*sorted(table.pinned)[-(slots - 2) :], digest} if slots > 2 else {digest}
            table.pin(pins)
            kept = pins & set(table.residents)
        elif move == "take" and table.has_room(digest):
            table.acquire(digest)
            leased.append(digest)
        elif move == "leave" and digest in leased:
            leased.remove(digest)
            table.release(digest)
        table.check_integrity()
        table.check_holders(leased)
        kept |= table.pinned & set(table.residents)
        assert kept | set(leased) <= set(table.residents)


def test_who_has_no_slot_yet_gets_the_first_that_comes_free():
    table = SlotTable(2)
    preloads = Preloads(table)
    for digest in "xy":
        table.acquire(digest)
    preloads.pin({"a": "weights"})
    assert preloads.begin() == []
    assert preloads
    table.release("y")
    assert preloads.begin() == [Load(2, "a", "weights")]
    assert not preloads
    assert table.residents == ("x", "a")
    preloads.pin({"a": "weights"})
    assert not preloads  # it has one


def scheduler(slots: int) -> Scheduler:
    return Scheduler(BlockPool(64, 4), SlotTable(slots), Limits(8, 64, slot_patience=16))


def ask(s: Scheduler, name: str, count: int = 1) -> list[Sequence]:
    found = []
    for i in range(count):
        ref = AdapterRef(name, 1, name)
        found.append(Sequence(Request(f"{name}{i}-{id(found)}", Rendered((1, 2, 3)), ref), 8, weights=name))
        s.add(found[-1])
    return found


def run(s: Scheduler, steps: int) -> list[Load]:
    loads = []
    for _ in range(steps):
        step = s.schedule()
        loads += step.loads
        s.commit(step.chunks)
        for sequence in [chunk.sequence for chunk in step.chunks if chunk.samples]:
            sequence.tokens.append(0)
            if sequence.num_generated == sequence.max_tokens:
                s.drop(sequence)
        s.check_integrity()
    return loads


def test_a_pin_is_loaded_by_a_step_without_requests():
    s = scheduler(2)
    s.preloads.pin({"a": "weights"})
    assert s.has_work
    step = s.schedule()
    assert (step.loads, step.chunks) == ((Load(1, "a", "weights"),), ())
    assert not s.has_work
    ask(s, "a")
    assert s.schedule().loads == ()


def test_others_share_the_slots_that_are_left_and_all_finish():
    s = scheduler(3)
    s.preloads.pin({"a": 0, "b": 0})
    waiting = [*ask(s, "a", 3), *ask(s, "x", 3), *ask(s, "b", 3), *ask(s, "y", 3), *ask(s, "z", 3)]
    loads = run(s, 80)
    assert sorted(load.digest for load in loads) == ["a", "b", "x", "y", "z"]
    assert all(sequence.num_generated == 8 for sequence in waiting)


def test_a_hot_pinned_adapter_is_not_asked_to_leave_for_others():
    s = scheduler(2)
    s.preloads.pin({"a": 0})
    hot = ask(s, "a", 2)
    run(s, 2)
    cold = [*ask(s, "x"), *ask(s, "y")]  # one slot for two, and "a" far ahead of both
    run(s, 3)
    hot += ask(s, "a")
    run(s, 1)
    assert hot[-1] in s.running
    run(s, 40)
    assert all(sequence.num_generated == 8 for sequence in hot + cold)


def test_the_engine_keeps_what_is_pinned(make_harness):
    harness = make_harness(slots=2, host_cache_bytes=1)
    engine = harness.engine
    engine.pin([harness.ref("r4")])
    for name in ("r8", "r16", "r8"):
        harness.tokens([harness.request("hello", name)])
        assert engine.stats().slots == (harness.bundles.digests["r4"], harness.bundles.digests[name])
    assert engine._host.peek(harness.bundles.digests["r4"]) is not None
    engine._host.check_integrity()


def test_a_pinned_adapter_answers_as_the_reference_does(harness, reference):
    harness.engine.pin([harness.ref("r4"), harness.ref("r16")])
    requests = [harness.request("some words", name) for name in ("r4", "r8", "r16", None)]
    assert harness.tokens(requests) == [reference.tokens(request) for request in requests]


def test_pins_that_cannot_be_change_nothing(make_harness):
    harness = make_harness(slots=2, max_rank=8)
    engine = harness.engine
    engine.pin([harness.ref("r4")])
    with pytest.raises(ConfigError, match=r"2 pins leave none of 2 slots .* --slots 3"):
        engine.pin([harness.ref("r4"), harness.ref("r8")])
    with pytest.raises(UnsupportedError, match="rank 16, over the limit of 8"):
        engine.pin([harness.ref("r16")])
    harness.tokens([harness.request("hello", "r8")])
    assert engine.stats().slots == (harness.bundles.digests["r4"], harness.bundles.digests["r8"])


def test_a_load_of_a_pin_that_fails_is_left_to_its_requests(make_harness, reference):
    harness = make_harness(slots=2)
    runner = harness.engine.core.runner
    load, failed = runner.load, []

    def fail(slot, packed) -> None:
        if not failed:
            failed.append(slot)
            raise RuntimeError("no")
        load(slot, packed)

    runner.load = fail
    harness.engine.pin([harness.ref("r4")])
    wait_until(lambda: failed and not harness.engine.core.scheduler.has_work)
    request = harness.request("hello", "r4")
    assert harness.tokens([request]) == [reference.tokens(request)]
    assert harness.engine.core.scheduler.slots.pinned == {harness.bundles.digests["r4"]}
