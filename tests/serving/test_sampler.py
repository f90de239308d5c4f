from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from okavango.platform.errors import InputError, OkavangoError
from okavango.serving.sampler import sample
from okavango.serving.sampling.state import SamplingState, Vocabulary
from okavango.serving.types import SamplingParams


def state(size: int = 50, eos: tuple[int, ...] = (), prompt=(), guide=None, **params) -> SamplingState:
    return SamplingState(SamplingParams(**params), Vocabulary(size, eos), prompt, guide)


def run(logits: torch.Tensor, rows: list[SamplingState], count: int) -> list[list[int | None]]:
    """Tokens of each row over some steps of the same logits."""
    found: list[list[int | None]] = [[] for _ in rows]
    for _ in range(count):
        for row, token, tokens in zip(rows, sample(logits, rows), found, strict=True):
            tokens.append(token)
            row.accept(token)
    return found


def test_greedy_takes_the_best_of_each_row():
    rows = [state(temperature=0), state(temperature=0)]
    assert sample(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), rows) == [1, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_gets_no_token_and_others_theirs(value, temperature):
    logits = torch.randn(3, 50)
    logits[1, 7] = value
    rows = [state(temperature=temperature, seed=i, top_k=i) for i in range(3)]
    tokens = sample(logits, rows)
    assert tokens[1] is None
    assert None not in (tokens[0], tokens[2])


def test_what_is_passed_in_is_left_as_it_was():
    logits = torch.randn(2, 50)
    before = logits.clone()
    sample(logits, [state(seed=1, logit_bias=((3, 5.0),)), state(seed=2, top_k=4)])
    assert torch.equal(logits, before)


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-9, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 0, 1, 5, 49, 90]),
        "top_p": st.sampled_from([1.0, 1.0, 0.95, 0.6, 0.2, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.0, 0.1, 1.0]),
        "presence_penalty": st.sampled_from([0.0, 1.5]),
        "frequency_penalty": st.sampled_from([0.0, -0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.4]),
        "logit_bias": st.sampled_from([(), ((2, 1.5), (8, -3.0))]),
        "min_tokens": st.sampled_from([0, 2]),
        "seed": st.integers(0, 2**64),
    }
)


@settings(deadline=None, max_examples=60)
@given(st.lists(PARAMS, min_size=2, max_size=6), st.integers(0, 1000), st.sampled_from([1.0, 4.0]))
def test_a_row_gets_the_same_tokens_whatever_shares_its_batch(params, noise, scale):
    """With logits that are coarse, as bfloat16's are: many are equal."""
    generator = torch.Generator().manual_seed(noise)
    logits = (torch.randn(len(params), 600, generator=generator) * scale).bfloat16().float()

    def rows() -> list[SamplingState]:
        return [state(600, (0, 1), (5, 6), **each) for each in params]

    alone = [run(logits[i : i + 1], [row], 4)[0] for i, row in enumerate(rows())]
    assert run(logits, rows(), 4) == alone
    assert run(logits.flip(0), rows()[::-1], 4) == alone[::-1]


def test_without_a_seed_answers_differ():
    logits = torch.zeros(4, 1000)
    assert len({tuple(tokens) for tokens in run(logits, [state(1000) for _ in range(4)], 8)}) == 4


def test_an_answer_does_not_end_before_min_tokens():
    logits = torch.zeros(1, 50)
    logits[0, 9], logits[0, 4] = 5, 4
    [tokens] = run(logits, [state(eos=(9,), temperature=0, min_tokens=2)], 4)
    assert tokens == [4, 4, 9, 9]
    [tokens] = run(logits, [state(eos=(9,), temperature=0, min_tokens=2, ignore_eos=True)], 1)
    assert tokens == [9]


class EndedGuide:
    """One that lets nothing follow but the end, or that has failed."""

    is_complete = False

    def __init__(self, error: OkavangoError | None = None) -> None:
        self._error = error

    def mask(self) -> torch.Tensor:
        if self._error is not None:
            raise self._error
        return torch.where(torch.arange(50) == 9, 0.0, -math.inf)

    def accept(self, token: int) -> None:
        pass


def test_a_guide_that_has_come_to_its_end_goes_before_min_tokens():
    rows = [state(eos=(9,), min_tokens=5, seed=1, guide=EndedGuide()), state(seed=1)]
    assert sample(torch.randn(2, 50), rows)[0] == 9


def test_a_guide_that_fails_fails_its_row_alone():
    error = OkavangoError("too complex")
    rows = [state(seed=1, guide=EndedGuide(error)), state(seed=1)]
    tokens = sample(torch.randn(2, 50), rows)
    assert tokens[0] is None
    assert rows[0].fault is error
    assert tokens[1] is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("repetition_penalty", 0),
        ("logprobs", 21),
        ("stop", ("",)),
        ("logit_bias", ((50, 1.0),)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, math.nan),)),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(InputError) as caught:
        state(**{name: value})
    assert caught.value.where == name
