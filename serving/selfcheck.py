"""A decoder is served only if its logits through the paged cache are its own: looked at once, at start.

Finds what no list of architectures can: layers that keep a state beside attention, masks that are made
outside the attention function, rows that are taken for positions.
"""

from __future__ import annotations

from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from okavango.modalities.precision import PARITY_BOUNDS, relative_error
from okavango.modalities.prompt import Rendered
from okavango.platform.errors import UnsupportedError
from okavango.serving.scheduler import Chunk, Step
from okavango.serving.sequence import Sequence
from okavango.serving.types import Request

if TYPE_CHECKING:
    from okavango.serving.runner import Runner

_LAYERS = {"full_attention", "sliding_attention"}
_LENGTH = 12
_NEIGHBOUR = 6
# Where the sequence's tokens are cut: a chunk, a second one, and single tokens, its neighbour beside each.
_CUTS = (0, 6, 9, 10, 11, 12)
_NEIGHBOUR_CUTS = (0, 3, 4, 5, 6)


def check_paging(runner: Runner, own: Tensor) -> None:
    """Compare a sequence computed in pieces beside another one with `own_logits`.

    Raises:
        UnsupportedError: they differ, or the decoder says itself that it has other layers than attention.
    """
    layers = set(getattr(runner.decoder.config.get_text_config(), "layer_types", None) or ())
    if layers - _LAYERS:
        raise UnsupportedError(f"{', '.join(sorted(layers - _LAYERS))} layers are not served")
    paged = _paged_logits(runner)
    error = relative_error(paged, own) if paged.shape == own.shape else float("inf")
    if not error <= PARITY_BOUNDS[runner.options.dtype]:
        raise UnsupportedError(
            f"it computes something else in pieces than at once: its logits differ by {error:.2g}",
            remedy="only decoders whose layers share nothing between tokens but attention are served",
        )


def _tokens(length: int, stride: int) -> tuple[int, ...]:
    return tuple(1 + stride * i for i in range(length))


@torch.inference_mode()
def own_logits(decoder: PreTrainedModel) -> Tensor:
    """The sequence's logits [_LENGTH, V] by transformers' own forward pass, at once."""
    ids = torch.tensor([_tokens(_LENGTH, 3)], device=decoder.device)
    positions = torch.arange(_LENGTH, device=decoder.device)[None]
    logits: Tensor = decoder(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    return logits


def _paged_logits(runner: Runner) -> Tensor:
    sequence, neighbour = _sequence(runner, _LENGTH, 3, 0), _sequence(runner, _NEIGHBOUR, 5, _LENGTH)
    found = []
    for own, beside in zip_longest(pairwise(_CUTS), pairwise(_NEIGHBOUR_CUTS)):
        chunk = Chunk(sequence, own[0], own[1] - own[0])
        others = (Chunk(neighbour, beside[0], beside[1] - beside[0]),) if beside else ()
        step = Step((), (*others, chunk))
        found.append(runner.run(step, range(step.num_tokens - chunk.count, step.num_tokens)))
    return torch.cat(found)


def _sequence(runner: Runner, length: int, stride: int, reserved: int) -> Sequence:
    """A sequence on blocks of its own, behind those that hold `reserved` tokens."""
    size = runner.options.block_size
    sequence = Sequence(Request(f"check-{stride}", Rendered(_tokens(length, stride))), max_tokens=1)
    first = -(-reserved // size)
    sequence.blocks = list(range(first, first + -(-length // size)))
    sequence.slot = 1 if reserved else 0  # a slot that holds nothing yet: its layers' rows are counted
    return sequence
