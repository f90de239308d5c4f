"""Steps that begin before the tokens of the one before are known: the same answers, and nothing lost.

On a CPU nothing computes beside the host, so the reference backend is told that it does.
"""

from __future__ import annotations

import random

import pytest
import torch

from okavango.modalities.tiny_bundle import picture_bytes
from okavango.serving.flight import Greatest
from okavango.serving.paged import TorchBackend
from okavango.serving.types import Event, FinishReason, SamplingParams

ADAPTERS = [None, "r4", "r8", "r16"]
TEXT = "how vexingly quick daft zebras jump over them all while liquor jugs are packed by dozens " * 2


@pytest.fixture
def computing() -> dict[str, None]:
    return {"kernels": None}


@pytest.fixture
def followed(make_harness):
    """make(options): a harness, and a list that gets every step which was begun ahead."""

    def make(**options):
        harness = make_harness(**options)
        backend, steps = harness.engine.core.runner.backend, []
        assert isinstance(backend, TorchBackend)
        backend.can_follow = True
        follow = backend.follow

        def noted(step, tokens):
            steps.append(step)
            return follow(step, tokens)

        backend.follow = noted
        return harness, steps

    return make


def greedy(tokens: int, **more) -> SamplingParams:
    return SamplingParams(**{"max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more})


def test_answers_are_the_reference(followed, reference):
    harness, steps = followed()
    requests = [
        harness.request(TEXT[: 5 + 13 * i], ADAPTERS[i % 4], [picture_bytes(i)] * (i % 2), greedy(40 + 3 * i))
        for i in range(8)
    ]
    assert harness.tokens(requests) == [reference.tokens(request) for request in requests]
    assert len(steps) > 20  # most of the steps after the prompts
    assert {len(step.chunks) for step in steps} >= {8, 4, 1}  # as one after the other ends


def test_an_answer_that_ends_by_itself_has_no_token_too_many(followed, reference):
    harness, steps = followed()
    requests = [harness.request(TEXT[:n], None, params=greedy(60, ignore_eos=False)) for n in (3, 11, 30, 77)]
    requests += [harness.request(TEXT[:20], "r8", params=greedy(40, stop=("e",), ignore_eos=True))]
    expected = [reference.tokens(request) for request in requests[:4]]
    found = harness.tokens(requests)
    assert found[:4] == expected
    assert len(found[4]) <= 40
    assert steps


def test_rows_that_are_drawn_are_waited_for(followed):
    harness, steps = followed()
    harness.tokens([harness.request("hi", "r4", params=greedy(1))])  # it is at hand
    params = SamplingParams(max_tokens=8, temperature=0.9, seed=3, ignore_eos=True)
    both = [harness.request("hello", "r4", params=params), harness.request("hello", None, params=greedy(8))]
    together = harness.tokens(both)
    assert not steps
    asked = [harness.request("hello", "r4", params=params)]
    assert harness.tokens(asked)[0] == together[0]
    harness.tokens([harness.request("hello", None, params=greedy(8, logprobs=2))])
    assert not steps
    assert harness.tokens([harness.request("hello", None, params=greedy(8))])[0] == together[1]
    assert steps


def test_little_memory_and_requests_that_leave(followed, reference):
    harness, steps = followed(kv_bytes=1 << 20, max_sequences=6, max_step_tokens=40, slots=2)
    chance = random.Random(11)
    requests = [
        harness.request(TEXT[: chance.randrange(1, 150)], chance.choice(ADAPTERS), params=greedy(40))
        for _ in range(14)
    ]
    leaving = set(chance.sample([request.id for request in requests], 4))
    submit = harness.engine.submit

    def leave(request, sink):
        def take(event: Event) -> None:
            sink(event)
            if request.id in leaving and event.finish is None:
                harness.engine.abort(request.id)

        submit(request, take)

    harness.engine.submit = leave
    for request, events in zip(requests, harness.run(requests), strict=True):
        found = [token for event in events for token in event.tokens]
        expected = reference.tokens(request)
        if request.id in leaving:
            assert events[-1].finish is FinishReason.ABORT
            assert found == expected[: len(found)]
        else:
            assert found == expected
    assert steps
    assert harness.engine.core.scheduler.pool.num_used == 0


def test_a_step_ahead_that_fails_ends_its_own_sequences(followed):
    harness, _ = followed()
    backend, follow, calls = harness.engine.core.runner.backend, None, []
    follow = backend.follow

    def fail_third(step, tokens):
        calls.append(step)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return follow(step, tokens)

    backend.follow = fail_third
    [events] = harness.run([harness.request("hello", None, params=greedy(20))])
    assert events[-1].finish is FinishReason.ERROR
    assert len(harness.tokens([harness.request("hello", None, params=greedy(20))])[0]) == 20


def test_a_row_that_is_no_number_has_no_token():
    logits = torch.tensor([[1.0, 3.0, 2.0], [float("nan"), 1.0, 0.0], [float("-inf")] * 3])
    assert Greatest(logits).take() == [1, None, None]
