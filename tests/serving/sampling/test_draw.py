"""Cuts equal transformers' warpers; draws follow what they leave."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from okavango.serving.sampling import draw as drawing
from okavango.serving.sampling.draw import draw
from okavango.serving.sampling.state import SamplingState, Vocabulary
from okavango.serving.types import SamplingParams


def state(params: SamplingParams, size: int, seed: int | None = None) -> SamplingState:
    return SamplingState(params if seed is None else replace(params, seed=seed), Vocabulary(size, ()))


def draws(logits: torch.Tensor, params: SamplingParams, count: int) -> torch.Tensor:
    """How often each token of [V] is drawn."""
    row = state(params, len(logits))
    tokens: list[int] = []
    for _ in range(count // 1000):  # rows of one generator: each takes its next numbers
        tokens += draw(logits.expand(1000, -1).clone(), [row] * 1000)
    return torch.bincount(torch.tensor(tokens), minlength=len(logits))


def reference(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities [V] as transformers' generate has them."""
    warpers = LogitsProcessorList()
    if params.temperature != 1:
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(torch.empty(1, 0, dtype=torch.long), logits[None].double()).softmax(-1)[0]


CUTS = [
    {},
    {"temperature": 0.5},
    {"top_k": 4},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"min_p": 0.2},
    {"top_k": 6, "top_p": 0.8},
    {"temperature": 1.7, "top_p": 0.7, "min_p": 0.3},
    {"temperature": 0.7, "top_k": 8, "top_p": 0.95, "min_p": 0.05},
]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("size", [12, 700])
def test_draws_follow_what_the_cuts_leave(cuts, size):
    """By chi-square; with the tail of the large vocabulary as one class."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 1.5
    params = SamplingParams(seed=11, **cuts)
    count = 20_000
    expected, found = reference(logits, params) * count, draws(logits, params, count)
    assert not found[expected == 0].any()
    order = expected.argsort(descending=True)
    expected, found = expected[order], found[order].double()
    common = int((expected >= 10).sum())
    groups = [*zip(found[:common], expected[:common], strict=True)]
    if expected[common:].sum() >= 10:
        groups.append((found[common:].sum(), expected[common:].sum()))
    chi_square = sum(float((f - e) ** 2 / e) for f, e in groups)
    freedom = max(1, len(groups) - 1)
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.5, 1.0, 5.0]),
    st.fixed_dictionaries(
        {
            "temperature": st.floats(0.1, 2),
            "top_k": st.one_of(st.just(0), st.integers(1, 1100)),
            "top_p": st.one_of(st.just(1.0), st.floats(0.01, 1)),
            "min_p": st.one_of(st.just(0.0), st.floats(0.001, 1)),
        }
    ),
    st.sampled_from([256, 1100]),
)
def test_what_is_kept_is_what_transformers_keeps(noise, scale, cuts, width):
    """Compared where rounding cannot tip a token over the edge."""
    params = SamplingParams(**cuts)
    assume(params.top_k <= width)  # as everywhere: it looks at twice as many
    logits = torch.randn(1100, generator=torch.Generator().manual_seed(noise)) * scale
    expected = reference(logits, params)
    for top_p in (params.top_p * (1 - 1e-5), min(1.0, params.top_p * (1 + 1e-5))):
        for min_p in (params.min_p * (1 - 1e-5), min(1.0, params.min_p * (1 + 1e-5))):
            near = reference(logits, SamplingParams(**cuts | {"top_p": top_p, "min_p": min_p}))
            assume(torch.equal(near > 0, expected > 0))
    rows = [state(params, len(logits))]
    found = drawing.cut(drawing.scale(logits[None].clone(), rows), rows, width)
    assume(found.is_sure.all())
    kept = torch.zeros(1100).scatter(0, found.tokens[0], found.weights[0])
    visible = expected > 1e-30  # smaller ones are none in float32
    assert torch.equal(kept[visible] > 0, expected[visible] > 0)
    assert not kept[expected == 0].any()
    assert torch.allclose(kept / kept.sum(), expected.float(), atol=1e-4)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_nothing_that_was_ruled_out_is_drawn(cuts):
    logits = torch.full((333,), -torch.inf)
    logits[[130, 131, 200]] = torch.tensor([3.0, 3.0, 2.0])
    found = draws(logits, SamplingParams(seed=5, **cuts), 1000)
    assert found[[130, 131, 200]].sum() == 1000


def test_rounding_of_the_logits_seldom_changes_a_draw():
    """A draw beside other rows meets logits that are rounded otherwise."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1000, 259, generator=generator)
    nearly = logits * (1 + 1e-6 * torch.randn(logits.shape, generator=generator))
    for cuts in CUTS:
        params = SamplingParams(**cuts)
        rows = [[state(params, 259, seed) for seed in range(1000)] for _ in range(2)]
        found = [draw(each.clone(), own) for each, own in zip((logits, nearly), rows, strict=True)]
        assert sum(a != b for a, b in zip(*found, strict=True)) <= 1


def test_of_equal_logits_the_lower_tokens_are_kept():
    """However many there are: more than the candidates that are looked at first."""
    logits = torch.zeros(4000)
    for cuts in ({"top_k": 3}, {"top_p": 3 / 4000}, {"top_p": 1e-9, "top_k": 5}):
        found = draws(logits, SamplingParams(seed=1, **cuts), 1000).nonzero()[:, 0].tolist()
        assert found == ([0, 1, 2] if cuts != {"top_p": 1e-9, "top_k": 5} else [0])


def test_a_wide_nucleus_of_a_flat_distribution_is_exact():
    logits = torch.zeros(4000)
    found = draws(logits, SamplingParams(seed=1, top_p=0.5), 20_000)
    assert not found[2000:].any()
    assert found[:2000].bool().float().mean() > 0.99


@pytest.mark.parametrize("cuts", [{}, {"top_p": 0.9}, {"top_k": 7}, {"top_p": 0.2, "min_p": 0.1}])
def test_a_temperature_near_zero_is_greedy(cuts):
    logits = torch.randn(900, generator=torch.Generator().manual_seed(3)) * 20
    found = draws(logits, SamplingParams(seed=1, temperature=1e-12, **cuts), 1000)
    assert found[logits.argmax()] == 1000
