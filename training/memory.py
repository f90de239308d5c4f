"""How much memory a training batch takes at its peak: an estimate by a formula, before anything is computed.

    weights      parameters of the decoder · b; those of packed layers in their bits
    learned      parameters that learn · 16: weight, gradient and AdamW's two moments, float32 each
    activations  T · (in · c + out · b + adapted · r · b + layers · 8 · D)
    attention    layers · B · heads · N² · b, on CPUs in bf16, where its weights are kept
    logits       l · V · (b + 16): in the run's precision, and in float32 for the loss and its gradient

b: bytes of a number in the run's precision; T: tokens of the batch: B rows of N tokens each, as many as its
longest row has; l: of the tokens to be learned as many as have 2^22 logits on CPUs and 2^25 elsewhere, for
the loss is computed of so many at a time (all where something is done to logits after the last layer); in:
inputs of the `adapted` linear layers, summed; c: bytes that LoRA keeps of each: with dropout what is left (b)
and the mask (b on CPUs, 1 on GPUs), without it b / 2, since layers share inputs; out: outputs of all linear
layers, summed; r: LoRA's rank; D: the decoder's width; V: its vocabulary. Where layers are computed anew,
activations and attention are one layer's, and T · layers · D · b on top of that what goes into each. What all
rows begin with is computed once, which the formula leaves out. So it does frozen encoders, which run before
and are gone by then, and what a framework takes for itself: 0.5 GB or so.

The coefficients count what autograd keeps of a Llama-like layer; tests/training/test_memory.py compares the
sum with what a run takes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from okavango.modalities.base import Base
    from okavango.training.spec import TrainSpec

_LEARNED_BYTES = 16
_NORM_BYTES = 8
_LOSS_BYTES = 16
# Of so many logits at a time the loss is computed. On CPUs 16 MiB in float32, which the C library does not
# give back to the system each time: 85 rows of 49,152 words. Elsewhere enough rows to fill a GPU.
MOST_LOGITS = {"cpu": 1 << 22}
_MOST_LOGITS_ELSEWHERE = 1 << 25
# training.packing: with more scores than this, attention keeps none of them.
_MOST_SCORES = 1 << 25


@dataclass(frozen=True)
class Shape:
    """What of a base and a specification the estimate depends on.

    Attributes:
        weights: bytes of the decoder's.
        learned: parameters that learn.
        adapted_inputs: inputs of the adapted layers, summed.
        adapted_layers: how many; each has factors of rank `rank`.
        outputs: of all linear layers, summed.
        loss_rows: of how many tokens at a time the loss is computed.
        number_bytes: of a number in the run's precision.
        input_bytes: that LoRA keeps of each input of an adapted layer.
        keeps_scores: whether attention keeps its weights for the backward pass.
        recompute: whether all but a layer's input is computed anew for it.
    """

    weights: int
    learned: int
    adapted_inputs: int
    adapted_layers: int
    rank: int
    outputs: int
    layers: int
    width: int
    heads: int
    vocabulary: int
    loss_rows: int
    number_bytes: int
    input_bytes: float
    keeps_scores: bool
    recompute: bool


@dataclass(frozen=True)
class Length:
    """Of a row: all of its tokens, and those that are learned."""

    tokens: int
    answer: int


@dataclass(frozen=True)
class Estimate:
    """Bytes that a batch takes at its peak, by the module's formula. `rows`, `tokens`: of that batch."""

    rows: int
    tokens: int
    weights: int
    learned: int
    activations: int
    attention: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.learned + self.activations + self.attention + self.logits

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def estimate(shape: Shape, batch: Sequence[Length]) -> Estimate:
    """The peak of a batch of these rows."""
    rows, longest = len(batch), max(length.tokens for length in batch)
    tokens, learned = rows * longest, sum(length.answer for length in batch)
    b = shape.number_bytes
    inputs = shape.adapted_inputs * shape.input_bytes
    made = (shape.outputs + shape.adapted_layers * shape.rank) * b
    scores = rows * shape.heads * longest * longest
    keeps = shape.keeps_scores and scores <= _MOST_SCORES
    activations = tokens * (inputs + made + shape.layers * _NORM_BYTES * shape.width)
    attention = shape.layers * scores * b if keeps else 0
    if shape.recompute:  # one layer at a time, and what goes into each
        activations = activations / shape.layers + tokens * shape.layers * shape.width * b
        attention = attention // shape.layers
    return Estimate(
        rows=rows,
        tokens=tokens,
        weights=shape.weights,
        learned=shape.learned * _LEARNED_BYTES,
        activations=round(activations),
        attention=attention,
        logits=min(learned, shape.loss_rows) * shape.vocabulary * (b + _LOSS_BYTES),
    )


def rows_of_logits(vocabulary: int, device: str) -> int:
    """Of how many tokens at a time the loss is computed on a kind of device."""
    return max(1, MOST_LOGITS.get(device, _MOST_LOGITS_ELSEWHERE) // vocabulary)


def shape_of(base: Base, spec: TrainSpec, device: str = "cpu") -> Shape:
    """The shape of a job over a base. Loads the decoder's description, no weights.

    Raises:
        UnsupportedError: as training.spec.check_targets.
    """
    from okavango.modalities.base import empty_decoder
    from okavango.modalities.lora import find_targets
    from okavango.training.build import precision
    from okavango.training.quantized import BITS

    decoder = empty_decoder(base)
    config = decoder.config.get_text_config()
    layers = find_targets(decoder)
    adapted = [layer for layer in layers if _is_adapted(layer.name, spec)]
    sizes = [layer.in_features + layer.out_features for layer in adapted]
    b = precision(spec.precision, device).itemsize
    mask = b if device == "cpu" else 1
    every = sum(parameter.numel() for parameter in decoder.parameters())
    packed = sum(layer.in_features * layer.out_features for layer in layers) if spec.quantization else 0
    weights = (every - packed) * b + round(packed * BITS / 8)
    heads = sum(_head_parameters(base, spec, name) for name in base.heads) if spec.head.train else 0
    return Shape(
        weights=weights,
        learned=spec.lora.r * sum(sizes) + heads,
        adapted_inputs=sum(layer.in_features for layer in adapted),
        adapted_layers=len(adapted),
        rank=spec.lora.r,
        outputs=sum(layer.out_features for layer in layers),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        loss_rows=rows_of_logits(config.vocab_size, device),
        number_bytes=b,
        input_bytes=b + mask if spec.lora.dropout else b / 2,
        keeps_scores=device == "cpu" and b == 2,
        recompute=spec.recompute,
    )


def _is_adapted(name: str, spec: TrainSpec) -> bool:
    from okavango.training.spec import ALL_LINEAR, ending_in

    targets = spec.lora.targets
    if not spec.lora.train or targets == ALL_LINEAR:
        return spec.lora.train
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(ending_in(target, [name]) for target in targets)


def _head_parameters(base: Base, spec: TrainSpec, modality: str) -> int:
    import torch

    from okavango.modalities.projector import make_head
    from okavango.training.build import head_spec

    with torch.device("meta"):
        head = make_head(head_spec(base, spec, modality))
    return sum(parameter.numel() for parameter in head.parameters())
