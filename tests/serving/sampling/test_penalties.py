from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from okavango.serving.sampling.penalties import Penalties, apply_penalties
from okavango.serving.types import SamplingParams

TOKENS = st.lists(st.integers(0, 39), min_size=1, max_size=60)


def after(params: SamplingParams, prompt: list[int], answer: list[int]) -> Penalties:
    found = Penalties(params, prompt)
    for token in answer:
        found.accept(token)
    return found


@settings(deadline=None)
@given(TOKENS, TOKENS, st.sampled_from([0.5, 1.0, 1.3]), st.floats(-2, 2), st.floats(-2, 2))
def test_they_equal_the_formulas_counted_anew(prompt, answer, repetition, presence, frequency):
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(len(prompt)))
    params = SamplingParams(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=((3, 2.0), (39, -1.0), (3, 0.5)),
    )
    expected = logits.clone()
    expected[1, 3] += 2.5
    expected[1, 39] -= 1.0
    seen = torch.tensor([prompt + answer])
    expected[1:] = RepetitionPenaltyLogitsProcessor(repetition)(seen, expected[1:])
    for token, count in Counter(answer).items():
        expected[1, token] -= presence + count * frequency
    apply_penalties(logits, [1], [after(params, prompt, answer)])
    assert torch.allclose(logits, expected, atol=1e-4)


def test_rows_do_not_touch_each_other():
    penalties = [
        after(SamplingParams(presence_penalty=1), [], [0]),
        after(SamplingParams(repetition_penalty=2), [1], [2]),
        after(SamplingParams(frequency_penalty=0.5), [], [3, 3]),
    ]
    logits = torch.ones(4, 5)
    apply_penalties(logits, [0, 2, 3], penalties)
    expected = [[0, 1, 1, 1, 1], [1] * 5, [1, 0.5, 0.5, 1, 1], [1, 1, 1, 0, 1]]
    assert logits.tolist() == expected


def test_a_request_that_asks_for_none_keeps_none():
    assert after(SamplingParams(), [1, 2, 3], [4, 5]).is_empty
