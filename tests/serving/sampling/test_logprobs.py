from __future__ import annotations

import pytest
import torch

from okavango.serving.sampler import report, sample
from okavango.serving.sampling.state import SamplingState, Vocabulary
from okavango.serving.types import SamplingParams


def state(**params) -> SamplingState:
    return SamplingState(SamplingParams(**params), Vocabulary(50, ()))


def test_only_rows_that_ask_and_have_a_token_are_reported():
    rows = [state(logprobs=2), state(), state(logprobs=0)]
    found = report(torch.randn(3, 50), [7, 8, None], rows)
    assert [each is not None for each in found] == [True, False, False]


def test_they_are_of_the_models_own_distribution():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    expected = logits.log_softmax(-1)
    bias = ((int(logits[0].argmin()), 100.0),)
    rows = [
        state(logprobs=3, temperature=0.1, top_k=1, logit_bias=bias, seed=1),
        state(logprobs=20, temperature=0),
    ]
    tokens = sample(logits, rows)
    assert tokens[0] == bias[0][0]
    for i, (chosen, count) in enumerate(zip(report(logits, tokens, rows), (3, 20), strict=True)):
        assert chosen.token == tokens[i]
        assert chosen.logprob == pytest.approx(float(expected[i, tokens[i]]), abs=1e-5)
        values, ids = expected[i].topk(count)
        assert [token for token, _ in chosen.top] == ids.tolist()
        assert [value for _, value in chosen.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_events_carry_one_a_token(harness):
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=2)
    asked, not_asked = harness.run(
        [harness.request("hi", "r4", params=each) for each in (params, SamplingParams(max_tokens=3, seed=1))]
    )
    for event in asked:
        assert [chosen.token for chosen in event.logprobs] == list(event.tokens)
        # greedy takes the likeliest
        assert event.logprobs[0].top[0] == (event.tokens[0], event.logprobs[0].logprob)
    assert all(event.logprobs == () for event in not_asked)
