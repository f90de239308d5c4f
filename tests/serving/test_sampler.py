from __future__ import annotations

import pytest
import torch

from okavango.platform.errors import InputError
from okavango.serving.sampler import make_rng, sample
from okavango.serving.types import SamplingParams


def draws(logits: torch.Tensor, count: int, **params) -> torch.Tensor:
    """How often each token is drawn, as shares."""
    param = SamplingParams(**params)
    rng = make_rng(param)
    tokens = [sample(logits[None], [param], [rng])[0] for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


def test_greedy_takes_the_best_of_each_row():
    greedy = SamplingParams(temperature=0)
    assert sample(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), [greedy] * 2, [None] * 2) == [1, 0]


def test_draws_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0])
    shares = draws(logits, 4000, temperature=0.5, seed=1)
    assert torch.allclose(shares, torch.softmax(logits / 0.5, 0), atol=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))
    shares = draws(logits, 500, top_p=0.7, seed=2)
    assert (shares > 0).tolist() == [False, True, False, True]
    assert draws(logits, 50, top_p=1e-6, seed=2)[1] == 1


def test_a_seed_gives_the_same_tokens_whatever_shares_the_batch():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    param = SamplingParams(seed=7)
    other = SamplingParams(seed=8, temperature=1.5)
    alone = [sample(logits[:1], [param], [rng])[0] for rng in [make_rng(param)] for _ in range(20)]
    rng, noise = make_rng(param), make_rng(other)
    beside = [sample(logits.flip(0), [other, param], [noise, rng])[1] for _ in range(20)]
    assert beside == alone
    assert len(set(alone)) > 1


def test_without_a_seed_answers_differ():
    logits = torch.zeros(1, 1000)
    param = SamplingParams()
    found = {tuple(sample(logits, [param], [rng])[0] for _ in range(8)) for rng in map(make_rng, [param] * 4)}
    assert len(found) == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("stop", ("",)),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(InputError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.where == name
