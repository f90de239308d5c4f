"""The contract: in float32 every answer is what transformers and PEFT give for that request alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from okavango.modalities.tiny_bundle import picture_bytes
from okavango.serving.scheduler import Step
from okavango.serving.types import Event, FinishReason, SamplingParams

GREEDY: dict = {"temperature": 0, "ignore_eos": True}
ADAPTERS = [None, "r4", "r8", "r16"]
WORDS = "the quick brown fox jumps over a lazy dog and some more words that make prompts of mixed lengths"


def prompt(length: int) -> str:
    return (WORDS * (1 + length // len(WORDS)))[:length]


def watch_steps(harness) -> list[Step]:
    """Every step that the engine runs from now on."""
    steps: list[Step] = []
    run = harness.engine.core.runner.run

    def watched(step: Step, *rest):
        steps.append(step)
        return run(step, *rest)

    harness.engine.core.runner.run = watched
    return steps


_alone: dict[tuple[int, str | None], list[int]] = {}


def alone(reference, harness, length: int, adapter: str | None) -> list[int]:
    """The first ten tokens that the reference answers this prompt with."""
    if (length, adapter) not in _alone:
        params = SamplingParams(**GREEDY, max_tokens=10)
        request = harness.request(prompt(length), adapter, params=params)
        _alone[length, adapter] = reference.tokens(request)
    return _alone[length, adapter]


def test_mixed_lengths_and_ranks_equal_the_reference(harness, reference):
    requests = [
        harness.request(prompt(length), ADAPTERS[i % 4])
        for i, length in enumerate([1, 150, 7, 33, 90, 16, 64, 2, 201, 48, 5, 120])
    ]
    expected = [reference.tokens(request) for request in requests]
    assert harness.tokens(requests) == expected
    # the adapters must matter, or the comparison shows nothing
    same_text = [harness.request("tell me", adapter) for adapter in ADAPTERS]
    assert len({tuple(tokens) for tokens in harness.tokens(same_text)}) == len(ADAPTERS)


def test_pictures_equal_the_reference_each_with_its_adapters_head(harness, reference):
    requests = [
        harness.request("what is this?", adapter, [picture_bytes(seed) for seed in seeds])
        for adapter, seeds in zip(
            ADAPTERS * 2, [(1,), (1,), (2,), (1, 2), (), (3,), (3, 1), (2,)], strict=True
        )
    ]
    assert harness.tokens(requests) == [reference.tokens(request) for request in requests]


def test_a_prompt_longer_than_a_step_is_chunked_through_its_picture(make_harness, reference):
    harness = make_harness(max_step_tokens=17, max_sequences=3)
    picture = picture_bytes(5)
    requests = [harness.request(prompt(n), "r8", [picture]) for n in (3, 40, 11)]
    assert harness.tokens(requests) == [reference.tokens(request) for request in requests]


def test_alone_in_a_batch_and_after_eviction_the_same(make_harness):
    harness = make_harness(slots=1, kv_bytes=1 << 22)

    def asked() -> list:
        return [
            harness.request(prompt(20 + 9 * i), name, params=params)
            for i, name in enumerate(["r4", "r8", None, "r16", "r4"])
            for params in (
                SamplingParams(max_tokens=10, temperature=0),
                SamplingParams(max_tokens=10, temperature=0.8, top_p=0.9, seed=i),
            )
        ]

    alone = [harness.tokens([request])[0] for request in asked()]
    # one slot for three adapters: every change of adapter evicts another and loads anew
    together = harness.tokens(asked())
    assert together == alone
    assert [harness.tokens([request])[0] for request in reversed(asked())] == alone[::-1]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(1, 120), st.sampled_from(ADAPTERS), st.integers(0, 2), st.integers(1, 8)),
        min_size=1,
        max_size=10,
    )
)
def test_random_mixes_equal_the_reference(make_harness, reference, mix):
    harness = make_harness(slots=2, max_step_tokens=40, max_sequences=5, kv_bytes=1 << 22)
    requests = [
        harness.request(
            prompt(length),
            adapter,
            [picture_bytes(pictures)] * pictures,
            SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True),
        )
        for length, adapter, pictures, tokens in mix
    ]
    assert harness.tokens(requests) == [reference.tokens(request) for request in requests]


def test_base_rows_beside_adapters_on_every_slot(make_harness, reference):
    harness = make_harness(slots=3)
    harness.tokens([harness.request("hello", adapter) for adapter in ADAPTERS])  # all are on the host
    steps = watch_steps(harness)
    requests = [
        harness.request(prompt(15 + 7 * i), adapter, params=SamplingParams(**GREEDY, max_tokens=10))
        for i, adapter in enumerate(ADAPTERS * 3)
    ]
    expected = [reference.tokens(request) for request in requests]
    assert harness.tokens(requests) == expected
    # slot 0 is the base's: prompts and answers of it ran while all others were taken, too
    assert {0, 1, 2, 3} in [{chunk.sequence.slot for chunk in step.chunks} for step in steps]


@dataclass(frozen=True)
class Visit:
    """A request that arrives after so many events of others, and leaves after so many tokens of its own."""

    length: int
    adapter: str | None
    tokens: int
    arrives: int
    leaves: int | None


class Crowd:
    """Visits to one engine, each when its time comes."""

    def __init__(self, harness) -> None:
        self.harness = harness
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, FinishReason] = {}
        self._events = 0
        self._happened = threading.Condition()

    def run(self, visits: list[Visit]) -> None:
        for i, visit in enumerate(visits):
            with self._happened:
                self._wait(lambda visit=visit, i=i: self._events >= visit.arrives or len(self.finish) == i)
            params = SamplingParams(**GREEDY, max_tokens=visit.tokens)
            request = self.harness.request(prompt(visit.length), visit.adapter, params=params)
            self.tokens[i] = []
            self.harness.engine.submit(request, partial(self._take, i, visit, request.id))
        with self._happened:
            self._wait(lambda: len(self.finish) == len(visits))

    def _wait(self, condition: Callable[[], bool]) -> None:
        assert self._happened.wait_for(condition, timeout=60), "the engine did not finish"

    def _take(self, i: int, visit: Visit, request: str, event: Event) -> None:
        self.tokens[i] += event.tokens
        if visit.leaves is not None and len(self.tokens[i]) >= visit.leaves and event.finish is None:
            self.harness.engine.abort(request)
        with self._happened:
            self._events += 1
            if event.finish is not None:
                self.finish[i] = event.finish
            self._happened.notify_all()


visits = st.builds(
    Visit,
    length=st.integers(1, 120),
    adapter=st.sampled_from(ADAPTERS),
    tokens=st.integers(1, 10),
    arrives=st.integers(0, 30),
    leaves=st.none() | st.integers(1, 4),
)


@pytest.fixture
def pressed(make_harness):
    """One slot fewer than adapters, and blocks for three of the longer requests."""
    return make_harness(slots=2, max_step_tokens=40, max_sequences=6, kv_bytes=1 << 18)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(visits, min_size=1, max_size=12))
def test_arrivals_and_cancels_under_pressure_change_no_answer(pressed, reference, found):
    crowd = Crowd(pressed)
    crowd.run(found)
    for i, visit in enumerate(found):
        expected = alone(reference, pressed, visit.length, visit.adapter)[: visit.tokens]
        assert crowd.tokens[i] == expected[: len(crowd.tokens[i])], visit
        if visit.leaves is None or crowd.finish[i] is not FinishReason.ABORT:
            assert (crowd.finish[i], crowd.tokens[i]) == (FinishReason.LENGTH, expected), visit
        else:
            assert len(crowd.tokens[i]) >= visit.leaves
    stats = pressed.engine.stats()
    assert (stats.preparing, stats.running, stats.waiting) == (0, 0, 0)


def test_bfloat16_logits_stay_near_float32(make_harness, tiny_base, tiny_bundles):
    """Tokens may differ where the best two are close; logits stay within the gate's stated bound."""
    from okavango.modalities.precision import PARITY_BOUNDS
    from okavango.serving.adapters.gate import ParityGate

    verdict = ParityGate(tiny_base, torch.bfloat16).check(tiny_bundles.folders["r16"])
    assert 0 < verdict.verification["bfloat16"] < PARITY_BOUNDS[torch.bfloat16]
