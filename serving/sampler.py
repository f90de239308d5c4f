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
from okavango.serving.sampling.draw import draw, take
from okavango.serving.sampling.logprobs import report as report
from okavango.serving.sampling.penalties import apply_penalties
from okavango.serving.sampling.state import SamplingState


def sample(logits: Tensor, rows: Sequence[SamplingState]) -> list[int | None]:
    """One token a row of [B, V].

    None where the logits are no numbers, or where the row's `fault` says why. A row's token depends on
    nothing but its own logits and state. Rows that are greedy and change nothing share one argmax.
    """
    tokens, finite = _greatest(logits)
    busy = []
    for i, is_finite in enumerate(finite):
        if not is_finite:
            tokens[i] = None
        elif rows[i].adjusts or rows[i].rng is not None:
            busy.append(i)
    if busy:
        own = take(logits, busy).float()
        picked = _pick(own.clone() if own.data_ptr() == logits.data_ptr() else own, [rows[i] for i in busy])
        for i, token in zip(busy, picked, strict=True):
            tokens[i] = token
    return tokens


def _greatest(logits: Tensor) -> tuple[list[int | None], list[bool]]:
    """Each row's greatest logit's place, and whether it is finite. nan counts as the greatest."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        values = logits.numpy()  # its argmax over 16 rows of 49,152 takes a sixth of torch's max
        places = values.argmax(-1)
        return places.tolist(), [math.isfinite(row[place]) for row, place in zip(values, places, strict=True)]
    best, chosen = logits.max(-1)
    return chosen.tolist(), best.isfinite().tolist()


def _pick(logits: Tensor, rows: Sequence[SamplingState]) -> list[int | None]:
    """The tokens of rows that need more than their greatest logit. Overwrites the logits."""
    tokens = _adjust(logits, rows)
    drawn = [i for i, row in enumerate(rows) if row.rng is not None and tokens.get(i, 0) is not None]
    if drawn:
        found = draw(take(logits, drawn), [rows[i] for i in drawn])
        tokens |= zip(drawn, found, strict=True)
    return [tokens[i] for i in range(len(rows))]


def _adjust(logits: Tensor, rows: Sequence[SamplingState]) -> dict[int, int | None]:
    """Change the logits of rows that ask for it; the best token of each, None where it has none left."""
    adjusted = [i for i, row in enumerate(rows) if row.adjusts]
    if not adjusted:
        return {}
    punished = [i for i in adjusted if not rows[i].penalties.is_empty]
    if punished:
        apply_penalties(logits, punished, [rows[i].penalties for i in punished])
    for i in adjusted:
        _bar(logits[i], rows[i])
    best, chosen = take(logits, adjusted).max(-1)
    is_left = best.isfinite().tolist()
    return {i: t if left else None for i, t, left in zip(adjusted, chosen.tolist(), is_left, strict=True)}


def _bar(logits: Tensor, row: SamplingState) -> None:
    """Rule out what may not be said; all of it where the row's guide has failed."""
    if row.guide is not None:
        try:
            logits += row.guide.mask().to(logits.device)
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
