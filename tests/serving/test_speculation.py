"""Guesses change how soon tokens come, never which."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from okavango.serving.speculation import Guesses, Lookup, Proposals
from okavango.serving.types import FinishReason, SamplingParams

DRAWN = SamplingParams(max_tokens=40, temperature=0.2, seed=5, ignore_eos=True)
PARAMS = {
    "greedy": SamplingParams(max_tokens=60, temperature=0, ignore_eos=True),
    "greedy to its end": SamplingParams(max_tokens=60, temperature=0),
    "drawn": DRAWN,
    "with penalties": replace(DRAWN, frequency_penalty=0.3, repetition_penalty=1.1, seed=6),
    "biased to one token": replace(DRAWN, logit_bias=((70, 40.0),)),
    "stopped by a string": replace(DRAWN, logit_bias=((70, 40.0),), stop=("CCCCC",)),
    "with log probabilities": replace(DRAWN, logit_bias=((70, 3.0),), logprobs=2),
}
TEXT = "again and again and again and again"


class Counting:
    """Metrics that keep what was guessed."""

    def __init__(self) -> None:
        self.drafts: dict[str, float] = {}

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        if name == "okavango_draft_tokens_total":
            self.drafts[labels["result"]] = self.drafts.get(labels["result"], 0) + value

    def observe(self, name: str, value: float, **labels: str) -> None: ...

    def gauge(self, name: str, value: float, **labels: str) -> None: ...


def answers(harness, params: SamplingParams, adapters: list[str | None]) -> list[object]:
    found = []
    for events in harness.run([harness.request(TEXT, name, params=params) for name in adapters]):
        assert events[-1].finish in (FinishReason.STOP, FinishReason.LENGTH), events[-1].error
        tokens = [token for event in events for token in event.tokens]
        logprobs = [chosen for event in events for chosen in event.logprobs]
        found.append((tokens, "".join(e.text for e in events), events[-1].finish, events[-1].usage, logprobs))
    return found


@pytest.fixture
def pair(make_harness, kernels):
    """The same engine with guesses and without."""
    metrics = Counting()
    return (
        make_harness(kernels=kernels, draft_rows=16, metrics=metrics),
        make_harness(kernels=kernels, draft_rows=0),
        metrics,
    )


@pytest.mark.parametrize("computing", ["native"], indirect=True)
@pytest.mark.parametrize("name", PARAMS)
def test_answers_are_the_same(pair, name):
    guessing, plain, metrics = pair
    for adapters in (["r8"], [None, "r4", "r8", "r16", None]):
        assert answers(guessing, PARAMS[name], adapters) == answers(plain, PARAMS[name], adapters)
    if "biased" in name:
        assert metrics.drafts["accepted"] > 4 * metrics.drafts["rejected"]


@pytest.mark.parametrize("computing", ["native"], indirect=True)
def test_also_where_memory_is_short(make_harness, kernels):
    params = replace(PARAMS["biased to one token"], max_tokens=90)
    adapters = [None, "r4", "r8", "r16"] * 2
    short = make_harness(kernels=kernels, draft_rows=32, kv_bytes=1 << 17, slots=2)
    plain = make_harness(kernels=kernels, draft_rows=0)
    found, expected = (answers(each, params, adapters) for each in (short, plain))
    assert [tokens for tokens, *_ in found] == [tokens for tokens, *_ in expected]


@pytest.mark.parametrize("computing", ["torch"], indirect=True)
def test_none_are_made_where_they_could_change_an_answer(make_harness):
    metrics = Counting()
    harness = make_harness(metrics=metrics)
    answers(harness, PARAMS["biased to one token"], [None])
    assert metrics.drafts == {}


def test_a_guess_is_what_followed_last_time():
    lookup = Lookup([1, 2, 3, 4, 5, 1, 2, 3])
    assert lookup.guess([1, 2, 3, 4, 5, 1, 2, 3], 3) == (4, 5, 1)
    assert lookup.guess([1, 2, 3, 4, 5, 1, 2, 3], 0) == ()
    assert Lookup([7, 1, 2, 3] * 3).guess([7, 1, 2, 3] * 3, 6) == (7, 1, 2, 3, 7, 1)
    assert lookup.guess([1, 2, 3, 4, 5, 1, 2, 3, 9, 2, 3], 1) == (9,)
    assert Lookup([1, 2, 3]).guess([1, 2, 3], 5) == ()


def test_guesses_that_fail_grow_rarer():
    tokens = [1, 2] * 5
    lookup = Lookup(tokens)
    tried = 0
    for _ in range(1000):
        if lookup.guess(tokens, 4):
            tried += 1
            lookup.learn(tokens, accepted=0)
        tokens += [1, 2]
    assert tried < 20
    assert lookup.guess([*tokens, *[1, 2] * 500], 4)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(1, 9))
def test_what_is_guessed_stood_there_before(tokens, most):
    found = Lookup(tokens).guess(tokens, most)
    assert len(found) <= most
    if found:
        places = [i for i in range(2, len(tokens)) if tokens[i - 2 : i] == tokens[-2:]]
        said = [*tokens, *found]  # a guess may go on from its own beginning
        assert any(tuple(said[i : i + len(found)]) == found for i in places)


def test_a_proposal_holds_as_long_as_it_comes_true():
    proposals = Proposals()
    proposals.put(2, [7, 8, 9])
    assert proposals.rest([1, 2], 9) == (7, 8, 9)
    assert proposals.rest([1, 2], 2) == (7, 8)
    assert proposals.rest([1, 2, 7], 9) == (8, 9)
    assert proposals.rest([1, 2, 5], 9) == ()
    assert proposals.rest([1, 2, 7, 8, 9], 9) == ()
    assert proposals.rest([1, 2, 7, 8, 9, 10], 9) == ()


def test_proposals_are_as_long_as_they_were_right():
    proposals = Proposals()
    first = proposals.wanted([1], 9)
    proposals.learn([1], first, accepted=first)
    assert first < proposals.wanted([1], 9) <= 9
    proposals.learn([1], 6, accepted=1)
    assert proposals.wanted([1], 9) == 2
    proposals.learn([1], 2, accepted=0)
    assert proposals.wanted([1], 9) == 0
    assert proposals.wanted([1] * 9, 9) == 1
    proposals.decline([1] * 9)
    assert proposals.wanted([1] * 12, 9) == 0


def test_look_up_comes_first_and_each_learns_from_its_own():
    guesses, tokens = Guesses([1, 2, 3]), [1, 2, 3]
    guesses.proposals.put(3, [7, 8])
    assert guesses.guess(tokens, 4) == (7, 8)
    assert guesses.source == "draft"
    guesses.learn([1, 2, 3, 4], 2, accepted=0)
    assert guesses.proposals.wanted([1, 2, 3, 4], 4) == 0
    again = [1, 2, 3, 1, 2]
    guesses.proposals.put(5, [7, 8])
    assert guesses.guess(again, 2) == (3, 1)
    assert guesses.source == "lookup"
