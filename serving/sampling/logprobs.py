"""How likely the model itself held a token and its alternatives."""

# Shapes: B rows, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from okavango.serving.sampling.state import SamplingState
from okavango.serving.types import Chosen

_MOST = 20  # SamplingParams' limit: one width for all, so that equals come in the same order in any batch


def report(
    logits: Tensor, tokens: Sequence[int | None], rows: Sequence[SamplingState]
) -> list[Chosen | None]:
    """What was picked from [B, V] and what else was likely, for rows that ask and have a token.

    Of the model's own distribution: before bias, penalties, guide, temperature and cuts.
    """
    found: list[Chosen | None] = [None] * len(rows)
    asking = [
        (i, token)
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True))
        if row.params.logprobs is not None and token is not None
    ]
    if not asking:
        return found
    logprobs = logits[[i for i, _ in asking]].float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor([[token] for _, token in asking], device=logits.device))
    values, ids = logprobs.topk(min(_MOST, logits.shape[1]))
    for place, (i, token) in enumerate(asking):
        top = zip(ids[place].tolist(), values[place].tolist(), strict=True)
        found[i] = Chosen(token, float(own[place]), tuple(top)[: rows[i].params.logprobs])
    return found
