"""What the sampler keeps of one sequence between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from okavango.platform.errors import InputError, OkavangoError
from okavango.serving.sampling.penalties import Penalties
from okavango.serving.sampling.seeds import make_rng
from okavango.serving.types import SamplingParams

if TYPE_CHECKING:
    from okavango.serving.sampling.guide import GuideState


@dataclass(frozen=True)
class Vocabulary:
    """`size`: logits a row. `eos`: tokens that end an answer."""

    size: int
    eos: tuple[int, ...]


class SamplingState:
    """One sequence's parameters, its generator, and what its tokens so far mean for the next one.

    Args:
        vocabulary: what there is to pick from.
        prompt: its tokens, for the repetition penalty.
        guide: its guide, at the beginning of the answer.

    Attributes:
        rng: None for greedy.
        fault: why the row got no token, where it was not for its logits.

    Raises:
        InputError: logit_bias names a token that does not exist, or adds no number.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocabulary: Vocabulary,
        prompt: Sequence[int] = (),
        guide: GuideState | None = None,
    ) -> None:
        _check_bias(params, vocabulary.size)
        self.params = params
        self.rng = make_rng(params)
        self.eos = vocabulary.eos
        self.guide = guide
        self.penalties = Penalties(params, prompt)
        self.fault: OkavangoError | None = None
        self._num_generated = 0
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self._counts = penalties != (1, 0, 0)

    @property
    def bars_eos(self) -> bool:
        """Whether the answer may not end yet."""
        return self._num_generated < self.params.min_tokens and not self.params.ignore_eos

    @property
    def adjusts(self) -> bool:
        """Whether its logits are changed before a token is picked."""
        return self.guide is not None or self.bars_eos or not self.penalties.is_empty

    @property
    def is_complete(self) -> bool:
        """Whether its guide lets nothing follow."""
        return self.guide is not None and self.guide.is_complete

    def accept(self, token: int) -> None:
        """The sequence goes on with this token."""
        self._num_generated += 1
        if self._counts:
            self.penalties.accept(token)
        if self.guide is not None:
            self.guide.accept(token)

    def exponential(self, count: int) -> Tensor:
        """The next numbers [count] of its generator, exponentially distributed, above 0."""
        numbers = torch.empty(count, dtype=torch.float64).exponential_(generator=self.rng)
        return numbers.clamp_min_(1e-300)


def _check_bias(params: SamplingParams, size: int) -> None:
    for token, value in params.logit_bias:
        if not 0 <= token < size:
            raise InputError(f"there is no token {token}; they go from 0 to {size - 1}", where="logit_bias")
        if not abs(value) < float("inf"):
            raise InputError(f"token {token}: must be a finite number, not {value}", where="logit_bias")
