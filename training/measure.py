"""How long rows are for a base, and what its batches take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from okavango.modalities.content import Message
from okavango.training.memory import Estimate, Length, estimate, shape_of

if TYPE_CHECKING:
    from okavango.modalities.base import Base
    from okavango.training.spec import TrainSpec


@dataclass(frozen=True)
class Measure:
    """How a base counts a row.

    Attributes:
        length: raises PromptError for what the base cannot render.
        context: the most tokens that a row may have.
        batch_size: rows of a training batch.
        batch_tokens: tokens of one instead, if the job goes by them.
        memory: what a batch of such rows takes.
    """

    length: Callable[[Sequence[Message]], Length]
    context: int
    batch_size: int = 1
    batch_tokens: int | None = None
    memory: Callable[[Sequence[Length]], Estimate] | None = None


def measure_of(base: Base, spec: TrainSpec | None = None, device: str = "cpu") -> Measure:
    """Tokens as training counts them: up to the last one that is learned. Loads the tokenizer alone.

    Args:
        spec: the job whose batches are to be estimated; without one, there is no estimate.
        device: where it will run.
    """
    from okavango.modalities.base import load_tokenizer
    from okavango.modalities.encoders import make_renderer
    from okavango.training.collate import last_learned

    renderer = make_renderer(base, load_tokenizer(base))
    system, last_turn = (spec.system, spec.learn == "last") if spec else (None, False)

    def length(messages: Sequence[Message]) -> Length:
        messages = last_learned(messages) if last_turn else messages
        loss = renderer.conversation(messages, system).loss
        return Length(len(loss) - loss[::-1].index(True), sum(loss))

    if spec is None:
        return Measure(length, base.decoder.context)
    memory = partial(estimate, shape_of(base, spec, device))
    context = spec.max_length or base.decoder.context
    return Measure(length, context, spec.batch_size, spec.batch_tokens, memory)
