"""Logits → tokens, each row by its own request's parameters and its own generator."""

# Shapes: B rows, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from okavango.serving.types import SamplingParams


def make_rng(params: SamplingParams) -> torch.Generator | None:
    """The request's own generator; None for greedy. Without a seed it is drawn from the system's entropy."""
    if params.temperature == 0:
        return None
    rng = torch.Generator()
    if params.seed is None:
        rng.seed()
    else:
        rng.manual_seed(params.seed % 2**63)
    return rng


def sample(
    logits: Tensor, params: Sequence[SamplingParams], rngs: Sequence[torch.Generator | None]
) -> list[int | None]:
    """One token a row of [B, V]; None where the logits are no numbers. A row's token depends on nothing but
    its own logits and generator."""
    logits = logits.float()
    best, chosen = logits.max(-1)  # nan counts as the greatest
    tokens: list[int | None] = chosen.tolist()
    for row, is_finite in enumerate(best.isfinite().tolist()):
        rng = rngs[row]
        if not is_finite:
            tokens[row] = None
        elif rng is not None:
            tokens[row] = _draw(logits[row].cpu(), params[row], rng)
    return tokens


def _draw(logits: Tensor, params: SamplingParams, rng: torch.Generator) -> int:
    # A temperature near zero must not overflow: nan would fail the whole step, and others' sequences with it.
    probabilities = torch.softmax((logits - logits.max()) / max(params.temperature, 1e-6), -1)
    if params.top_p < 1:
        probabilities = _nucleus(probabilities, params.top_p)
    return int(torch.multinomial(probabilities, 1, generator=rng))


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set whose mass reaches top_p (Holtzman et al. 2020); the likeliest stays."""
    ordered, order = probabilities.sort(descending=True, stable=True)
    outside = ordered.cumsum(0) - ordered >= top_p
    outside[0] = False
    return probabilities.scatter(0, order[outside], 0.0)
