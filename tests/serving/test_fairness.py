"""Fair shares and slots, simulated: plain Python, a step at a time."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from okavango.modalities.prompt import Rendered
from okavango.serving.adapters.slots import SlotTable
from okavango.serving.cache.blocks import BlockPool
from okavango.serving.fairness import FairQueue
from okavango.serving.scheduler import Limits, Scheduler
from okavango.serving.sequence import Sequence
from okavango.serving.types import AdapterRef, Request

SLOTS, SEATS, PATIENCE = 8, 32, 256


class Machine:
    """A scheduler whose steps are counted, and what became of each sequence in which step."""

    def __init__(self, slots: int = SLOTS, seats: int = SEATS, blocks: int = 4096, **limits) -> None:
        limits = {"max_step_tokens": 64, "slot_patience": PATIENCE, **limits}
        self.scheduler = Scheduler(BlockPool(blocks, 4), SlotTable(slots), Limits(seats, **limits))
        self.now = 0
        self.came: dict[Sequence, int] = {}
        self.finished: dict[Sequence, int] = {}
        self.served: Counter[tuple[str, str | None]] = Counter()
        self._made = 0

    def ask(
        self, adapter: str | None, principal: str = "p", prompt: int = 12, tokens: int = 12, priority: int = 0
    ) -> Sequence:
        self._made += 1
        ref = AdapterRef(adapter, 1, adapter) if adapter else None
        text = Rendered(tuple(range(100 * self._made, 100 * self._made + prompt)))
        request = Request(f"r{self._made}", text, ref, principal=principal, priority=priority)
        sequence = Sequence(request, tokens)
        self.came[sequence] = self.now
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        self.now += 1
        step = self.scheduler.schedule()
        self.scheduler.check_integrity()
        self.scheduler.commit(step.chunks)
        for chunk in step.chunks:
            sequence = chunk.sequence
            self.served[sequence.flow] += chunk.count
            if chunk.samples:
                sequence.tokens.append(0)
                if sequence.num_generated == sequence.max_tokens:
                    self.scheduler.drop(sequence)
                    self.finished[sequence] = self.now

    def keep_waiting(self, waiting: dict[str | None, int], **request) -> None:
        """Top flows up, so that so many of each wait."""
        have = Counter(sequence.digest for sequence in self.scheduler.waiting)
        for adapter, count in waiting.items():
            for _ in range(count - have[adapter]):
                self.ask(adapter, **request)

    def longest_wait(self, sequences) -> int:
        return max(self.finished[sequence] - self.came[sequence] for sequence in sequences)


# 12 prompt tokens and 12 more: a sequence that runs is done in so many steps, its prompt's turn included.
SERVICE = 12 + 6


def test_a_thousand_cold_adapters_beside_a_hot_one_are_all_served_in_turn():
    """The bound: the hot flow's patience and rest, then all of them, one a slot at a time."""
    machine = Machine()
    for _ in range(50):  # the hot one has every seat
        machine.keep_waiting({"hot": 40})
        machine.step()
    assert {sequence.digest for sequence in machine.scheduler.running} == {"hot"}
    cold = [machine.ask(f"cold-{i}") for i in range(1000)]
    while not machine.finished.keys() >= set(cold):
        machine.keep_waiting({"hot": 40})
        machine.step()
    assert machine.longest_wait(cold) <= SERVICE + -(-1000 // SLOTS) * SERVICE
    order = sorted(cold, key=machine.finished.__getitem__)
    overtaken = max(abs(i - cold.index(sequence)) for i, sequence in enumerate(order[::10]) for i in [i * 10])
    assert overtaken <= 2 * SEATS  # first come, first served among equals


def test_cold_adapters_that_trickle_in_are_served_soon_though_hot_ones_fill_all_slots():
    """The bound: the hot flows get ahead by their patience, one's sequences end, and the cold one runs."""
    machine = Machine()
    hot: dict[str | None, int] = {f"hot-{i}": 10 for i in range(SLOTS)}
    cold = []
    for turn in range(1500):
        machine.keep_waiting(hot)
        if turn > 100 and turn % 10 == 0:
            cold.append(machine.ask(f"cold-{turn}"))
        machine.step()
    for _ in range(100):
        machine.keep_waiting(hot)
        machine.step()
    patience = PATIENCE * SLOTS // (SEATS // 2)  # steps in which all hot flows get that many tokens each
    assert len(cold) == 139
    assert machine.longest_wait(cold) <= patience + 3 * SERVICE
    hot_tokens = sum(count for (_, adapter), count in machine.served.items() if adapter in hot)
    assert hot_tokens > 0.7 * sum(machine.served.values())  # and the hot ones go on meanwhile


def test_without_patience_for_them_cold_adapters_would_wait_for_ever():
    """That the test above shows something: hot adapters that are never told to make room do not."""
    machine = Machine(slot_patience=1 << 40)
    for _ in range(30):
        machine.keep_waiting({f"hot-{i}": 10 for i in range(SLOTS)})
        machine.step()
    cold = machine.ask("cold")
    for _ in range(1000):
        machine.keep_waiting({f"hot-{i}": 10 for i in range(SLOTS)})
        machine.step()
    assert cold not in machine.finished


@pytest.mark.parametrize("adapters", [("a", "b"), (None, "a")])
def test_two_flows_get_the_same_however_many_requests_each_has(adapters):
    machine = Machine(seats=8)
    few, many = adapters
    for _ in range(1000):
        machine.keep_waiting({few: 2, many: 100})
        machine.step()
    shares = [machine.served["p", adapter] for adapter in adapters]
    assert shares[0] == pytest.approx(shares[1], rel=0.1)


def test_principals_share_by_weight_also_one_adapter():
    machine = Machine(seats=8, weights={"paying": 3.0})
    for _ in range(1000):
        for principal in ("paying", "other"):
            if sum(s.request.principal == principal for s in machine.scheduler.waiting) < 10:
                machine.ask("a", principal)
        machine.step()
    assert machine.served["paying", "a"] == pytest.approx(3 * machine.served["other", "a"], rel=0.15)


def test_long_prompts_cost_their_flow_what_they_take():
    machine = Machine(seats=8)
    for _ in range(1500):
        for principal, prompt in (("long", 90), ("short", 2)):
            if sum(s.request.principal == principal for s in machine.scheduler.waiting) < 10:
                machine.ask(None, principal, prompt=prompt)
        machine.step()
    assert machine.served["long", None] == pytest.approx(machine.served["short", None], rel=0.15)


def test_being_away_saves_nothing_up():
    machine = Machine(seats=4)
    machine.ask(None, "idle", tokens=40)  # keeps the idle one's account open a while
    for _ in range(300):
        if len(machine.scheduler.waiting) < 8:
            machine.ask(None, "busy")
        machine.step()
    machine.served.clear()
    for _ in range(300):
        for principal in ("idle", "busy"):
            if sum(s.request.principal == principal for s in machine.scheduler.waiting) < 8:
                machine.ask(None, principal)
        machine.step()
    assert machine.served["idle", None] == pytest.approx(machine.served["busy", None], rel=0.2)


def test_within_a_flow_the_lower_priority_number_goes_first_and_no_other_flow_notices():
    machine = Machine(seats=1)
    machine.ask(None)
    machine.step()
    later = [machine.ask(None, priority=p) for p in (5, 0, -5)]
    other = machine.ask(None, "q", priority=9)
    while machine.scheduler.has_work:
        machine.step()
    order = sorted(machine.finished, key=machine.finished.__getitem__)
    assert [s for s in order if s in later] == later[::-1]
    assert order.index(other) <= 2


def test_samples_of_one_prompt_are_charged_for_it_once():
    machine = Machine()
    queue = machine.scheduler.waiting
    prompt = Rendered(tuple(range(40)))
    samples = [Sequence(Request(f"s{i}", prompt), 5) for i in range(4)]
    for sample in samples:
        machine.scheduler.add(sample)
    machine.scheduler.schedule()
    assert queue.virtual(samples[0]) == 40 + 3 * 4  # its last block is each one's own


def test_what_is_computed_again_is_free():
    machine = Machine(blocks=8)
    first, second = machine.ask(None, "p", 8, 16), machine.ask(None, "q", 8, 16)
    virtual = defaultdict(float)
    while machine.scheduler.has_work:
        machine.step()
        for sequence in (first, second):
            if sequence not in machine.finished:
                virtual[sequence] = machine.scheduler.waiting.virtual(sequence)
    assert first.num_preempted + second.num_preempted > 0
    assert all(value <= 8 + 16 for value in virtual.values())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 60),  # when it comes
            st.sampled_from([None, *"abcdefgh"]),
            st.sampled_from("pqr"),
            st.integers(1, 20),
            st.integers(1, 20),
            st.integers(-1, 1),
        ),
        max_size=60,
    ),
    st.integers(1, 3),
    st.integers(10, 40),
    st.sampled_from([0, 30, 1 << 20]),
)
def test_random_arrivals_all_finish(mix, slots, blocks, patience):
    machine = Machine(slots=slots, seats=6, blocks=blocks, slot_patience=patience)
    arrivals = sorted(mix, key=lambda item: item[0])
    while arrivals or machine.scheduler.has_work:
        while arrivals and arrivals[0][0] <= machine.now:
            _, adapter, principal, prompt, tokens, priority = arrivals.pop(0)
            machine.ask(adapter, principal, prompt, tokens, priority)
        machine.step()
        assert machine.now < 5000
    assert len(machine.finished) == len(mix)
    assert machine.scheduler.slots._leases == {}


def test_a_queue_that_lost_count_is_noticed():
    queue = FairQueue()
    sequence = Sequence(Request("r", Rendered((1, 2))), 1)
    queue.add(sequence)
    queue.check_integrity([])
    queue._flows[sequence.flow].members = 2
    with pytest.raises(AssertionError, match="lost count"):
        queue.check_integrity([])


def test_callers_who_come_once_each_are_not_remembered_for_ever():
    queue = FairQueue()
    stays = Sequence(Request("r", Rendered((1,)), principal="stays"), 1)
    queue.add(stays)
    queue.take(stays)
    queue.charge(stays, 10)
    for i in range(5000):
        visitor = Sequence(Request("r", Rendered((1,)), principal=f"caller {i}"), 1)
        queue.add(visitor)
        queue.take(visitor)
        queue.charge(visitor, 1 + i % 7)
        queue.leave(visitor)
        assert len(queue._flows) <= 1026
    assert queue.virtual(stays) == 10
    queue.check_integrity([stays])
