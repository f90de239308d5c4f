"""Logits → tokens, each row by its own request's parameters and its own generator.

The order: bias, repetition penalty, presence and frequency penalties, what may not be said (the end before
min_tokens, what a guide forbids), then the greatest, or temperature, top-k, top-p, min-p and a draw.
"""

# Shapes: B rows, V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from okavango.platform.errors import OkavangoError
from okavango.serving.sampling.draw import draw
from okavango.serving.sampling.logprobs import report as report
from okavango.serving.sampling.penalties import apply_penalties
from okavango.serving.sampling.state import SamplingState


def sample(logits: Tensor, rows: Sequence[SamplingState]) -> list[int | None]:
    """One token a row of [B, V].

    None where the logits are no numbers, or where the row's `fault` says why. A row's token depends on
    nothing but its own logits and state. Rows that are greedy and change nothing share one argmax.
    """
    best, chosen = logits.max(-1)  # nan counts as the greatest
    tokens: list[int | None] = chosen.tolist()
    busy = []
    for i, is_finite in enumerate(best.isfinite().tolist()):
        if not is_finite:
            tokens[i] = None
        elif rows[i].adjusts or rows[i].rng is not None:
            busy.append(i)
    if busy:
        own = logits[torch.tensor(busy, device=logits.device)].float()
        for i, token in zip(busy, _pick(own, [rows[i] for i in busy]), strict=True):
            tokens[i] = token
    return tokens


def _pick(logits: Tensor, rows: Sequence[SamplingState]) -> list[int | None]:
    """The tokens of rows that need more than their greatest logit. Overwrites the logits."""
    _adjust(logits, rows)
    best, chosen = logits.max(-1)
    tokens: list[int | None] = chosen.tolist()
    left = best.isfinite().tolist()
    tokens = [token if is_left else None for token, is_left in zip(tokens, left, strict=True)]
    drawn = [i for i, row in enumerate(rows) if row.rng is not None and tokens[i] is not None]
    if drawn:
        own = logits if len(drawn) == len(rows) else logits[torch.tensor(drawn, device=logits.device)]
        for i, token in zip(drawn, draw(own, [rows[i] for i in drawn]), strict=True):
            tokens[i] = token
    return tokens


def _adjust(logits: Tensor, rows: Sequence[SamplingState]) -> None:
    punished = [i for i, row in enumerate(rows) if not row.penalties.is_empty]
    if punished:
        apply_penalties(logits, punished, [rows[i].penalties for i in punished])
    for i, row in enumerate(rows):
        if row.adjusts:
            _bar(logits[i], row)


def _bar(logits: Tensor, row: SamplingState) -> None:
    """Rule out what may not be said; all of it where the row's guide has failed."""
    if row.guide is not None:
        try:
            logits.masked_fill_(~row.guide.allowed().to(logits.device), -math.inf)
        except OkavangoError as error:
            row.fault = error
            logits.fill_(-math.inf)
    if row.bars_eos:
        _bar_eos(logits, row)


def _bar_eos(logits: Tensor, row: SamplingState) -> None:
    eos = torch.tensor(row.eos, dtype=torch.long, device=logits.device)
    before = logits[eos]
    logits[eos] = -math.inf
    if row.guide is not None and logits.amax() == -math.inf:
        logits[eos] = before  # its guide has come to an end: there is nothing else to say
