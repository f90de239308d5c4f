"""Logits → drawn tokens: temperature, top-k, top-p and min-p, in this order, as in transformers.

A row's token depends on its own logits, parameters and generator only. So a sum is always of one row, over
blocks of a fixed size, and of equal logits the lower token comes first: neither the rows beside it nor the
way in which its nucleus was found may tip the scales. And since products of another shape round differently,
a draw is a race: of 2,000 draws from 49,152 logits that were shifted by 1e-6, none had another winner, where
a point on the cumulative distribution met a shifted border three times.
"""

# Shapes: R rows, V vocabulary, K candidates in falling order, N blocks of a row

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from okavango.serving.sampling.state import SamplingState
from okavango.serving.types import SamplingParams

_BLOCK = 64
_COLDEST = 1e-6  # colder would overflow; it is greedy by then
# A nucleus of at least this mass is found by drawing until a token lies inside, at most so many times.
_WIDE, _TRIES = 0.5, 4
_FEWEST_CANDIDATES = 256
_JUST_BELOW_1 = 1 - 2.0**-24
_LEAST = 1e-30  # what min-p's absence means for weights up to 1

Method = Callable[[Tensor, Sequence[SamplingState]], list[int]]


def draw(logits: Tensor, rows: Sequence[SamplingState]) -> list[int]:
    """A token for each row of [R, V]; -inf is never drawn. Overwrites the logits."""
    scaled = scale(logits, rows)
    methods = [_method(row.params) for row in rows]
    tokens = [0] * len(rows)
    for method in dict.fromkeys(methods):
        _replace(tokens, [i for i, each in enumerate(methods) if each is method], method, scaled, rows)
    return tokens


def take(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of [B, V], in their order; the tensor itself where these are all."""
    return logits if len(rows) == len(logits) else logits[torch.tensor(rows, device=logits.device)]


def scale(logits: Tensor, rows: Sequence[SamplingState]) -> Tensor:
    """Logits at their temperatures, the greatest of each row 0. Overwrites what it is given."""
    logits -= logits.amax(-1, keepdim=True)
    logits /= _column([max(row.params.temperature, _COLDEST) for row in rows], logits)
    return logits


def _method(params: SamplingParams) -> Method:
    if params.top_k == 0 and params.top_p == 1:
        return _from_all
    is_wide = params.top_k == 0 and params.min_p == 0 and params.top_p >= _WIDE
    return _from_nucleus if is_wide else _from_candidates


def _replace(
    tokens: list[int], at: Sequence[int], method: Method, scaled: Tensor, rows: Sequence[SamplingState]
) -> None:
    """Put into `tokens`, at these rows, what the method draws for them."""
    for i, token in zip(at, method(take(scaled, at), [rows[i] for i in at]), strict=True):
        tokens[i] = token


def _from_all(scaled: Tensor, rows: Sequence[SamplingState]) -> list[int]:
    """From the whole distribution, or what min-p leaves of it."""
    weights = scaled.exp()
    if any(row.params.min_p for row in rows):
        weights /= _column([max(row.params.min_p, _LEAST) for row in rows], weights)
        torch.threshold_(weights, _JUST_BELOW_1, 0)
    found: list[int] = _Weights(weights).race(_noise(rows, scaled)).tolist()
    return found


def _from_nucleus(scaled: Tensor, rows: Sequence[SamplingState], tries: int = _TRIES) -> list[int]:
    """From the top-p nucleus, by rejection: nothing is sorted, however flat the distribution is."""
    weights = _Weights(scaled.exp())
    drawn = weights.race(_noise(rows, scaled))
    limits = weights.total * _column([row.params.top_p for row in rows], weights.total)[:, 0]
    tokens: list[int] = drawn.tolist()
    outside = (weights.not_behind(drawn) >= limits).nonzero()[:, 0]
    if len(outside):  # so it seems; equals may make the difference
        ahead = _ahead_of(drawn[outside], scaled[outside])
        outside = outside[ahead >= limits[outside]]
    if len(outside):
        _replace(tokens, outside.tolist(), _again(tries - 1), scaled, rows)
    return tokens


def _again(tries: int) -> Method:
    if tries == 0:
        return _from_candidates
    return lambda scaled, rows: _from_nucleus(scaled, rows, tries)


def _from_candidates(scaled: Tensor, rows: Sequence[SamplingState]) -> list[int]:
    """From what all cuts leave: among the likeliest few, or of all where these are not enough."""
    noise = _noise(rows, scaled)
    width = max(_FEWEST_CANDIDATES, 2 * max(row.params.top_k for row in rows))
    kept = cut(scaled, rows, width)
    tokens: list[int] = kept.race(noise).tolist()
    unsure = (~kept.is_sure).nonzero()[:, 0].tolist()
    if unsure:
        sorted_all = cut(scaled[unsure], [rows[i] for i in unsure], scaled.shape[1])
        for i, token in zip(unsure, sorted_all.race(noise[unsure]).tolist(), strict=True):
            tokens[i] = token
    return tokens


def cut(scaled: Tensor, rows: Sequence[SamplingState], width: int) -> Candidates:
    """What top-k, top-p and min-p leave, looked for among the `width` likeliest tokens of each row."""
    ordered, tokens = _candidates(scaled, width)
    weights = ordered.exp()
    num_kept = _num_kept(ordered, weights.double().cumsum(-1), scaled, rows)[:, None]
    weights[torch.arange(ordered.shape[1], device=ordered.device) >= num_kept] = 0
    is_sure = ordered.gather(1, num_kept - 1) > ordered[:, -1:]
    return Candidates(tokens, weights, is_sure[:, 0] | (ordered.shape == scaled.shape))


def _candidates(scaled: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The likeliest logits [R, K] and their tokens, in falling order, of equals the lower token first."""
    if 2 * width >= scaled.shape[1]:
        ordered, tokens = scaled.sort(dim=-1, descending=True, stable=True)
        return ordered, tokens
    tokens = scaled.topk(width, sorted=False).indices.sort(dim=-1).values
    ordered, order = scaled.gather(1, tokens).sort(dim=-1, descending=True, stable=True)
    return ordered, tokens.gather(1, order)


def _num_kept(ordered: Tensor, sums: Tensor, scaled: Tensor, rows: Sequence[SamplingState]) -> Tensor:
    """How many of its candidates each row keeps [R], at least one. Top-p is of what top-k left."""
    width = ordered.shape[1]
    top_k = _column([min(row.params.top_k or width, width) for row in rows], ordered, torch.long)
    top_p = _column([row.params.top_p for row in rows], sums)
    total = sums.gather(1, top_k - 1)
    if any(row.params.top_k == 0 and row.params.top_p < 1 for row in rows):
        is_cut = _column([row.params.top_k > 0 for row in rows], ordered, torch.bool)
        total = torch.where(is_cut, total, _Weights(scaled.exp()).total[:, None])
    ahead = F.pad(sums[:, :-1], (1, 0))
    inside = (ahead < top_p * total).sum(-1).clamp_min(1)
    likely = (ordered >= _log_min_p(rows, ordered)).sum(-1)
    return torch.minimum(torch.minimum(inside, likely), top_k[:, 0])


class _Weights:
    """Probabilities [R, V] before they are normalised, in blocks."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        rest = -weights.shape[1] % _BLOCK
        padded = F.pad(weights, (0, rest)) if rest else weights
        self._blocks = padded.view(len(weights), -1, _BLOCK)
        self._sums = self._blocks.sum(-1).double()  # [R, N]

    @property
    def total(self) -> Tensor:
        """[R]"""
        return self._sums.sum(-1)

    def race(self, noise: Tensor) -> Tensor:
        """Tokens [R] drawn by their weights: a block, then one of it.

        The greatest of weight / exponential number is each with its own probability. Racing in two heats
        needs N + 64 numbers a row instead of V.
        """
        block = (self._sums / noise[:, :-_BLOCK]).argmax(-1)
        inner = self._blocks[torch.arange(len(block), device=block.device), block]
        return block * _BLOCK + (inner / noise[:, -_BLOCK:]).argmax(-1)

    def not_behind(self, tokens: Tensor) -> Tensor:
        """The weight [R] of all others that are at least as likely as these tokens."""
        own = self._weights.gather(1, tokens[:, None])
        ratios = torch.threshold_(self._weights / own, _JUST_BELOW_1, 0)
        return (_Weights(ratios).total - 1) * own[:, 0]


def _ahead_of(tokens: Tensor, scaled: Tensor) -> Tensor:
    """The weight [R] of all that comes before these tokens in falling order."""
    own = scaled.gather(1, tokens[:, None])
    ids = torch.arange(scaled.shape[1], device=tokens.device)
    is_ahead = (scaled > own) | ((scaled == own) & (ids < tokens[:, None]))
    return _Weights(scaled.masked_fill(~is_ahead, -math.inf).exp_()).total


@dataclass(frozen=True)
class Candidates:
    """Some tokens [R, K] with their weights, 0 for what was cut.

    `is_sure`: [R], whether no token that is not among them can have a weight.
    """

    tokens: Tensor
    weights: Tensor
    is_sure: Tensor

    def race(self, noise: Tensor) -> Tensor:
        """The tokens [R] that `_Weights.race` would draw, if all others weighed nothing."""
        block, place = self.tokens // _BLOCK, self.tokens % _BLOCK
        sums = torch.zeros_like(noise[:, :-_BLOCK]).scatter_add_(1, block, self.weights.double())
        first = (sums / noise[:, :-_BLOCK]).argmax(-1, keepdim=True)
        scores = self.weights / noise[:, -_BLOCK:].gather(1, place)
        best = scores.masked_fill_(block != first, -1).argmax(-1, keepdim=True)
        return self.tokens.gather(1, best)[:, 0]


def _noise(rows: Sequence[SamplingState], like: Tensor) -> Tensor:
    """Exponential numbers [R, N + 64] for one race."""
    count = -(-like.shape[1] // _BLOCK) + _BLOCK
    return torch.stack([row.exponential(count) for row in rows]).to(like.device)


def _log_min_p(rows: Sequence[SamplingState], like: Tensor) -> Tensor:
    """What min-p asks of logits whose greatest is 0."""
    values = [math.log(row.params.min_p) if row.params.min_p else -math.inf for row in rows]
    return _column(values, like)


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None]
