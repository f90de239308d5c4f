"""A job's trainee, as its base and its specification say."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel

from okavango.modalities.base import Base, load_decoder, load_head
from okavango.modalities.embed import embedding_std
from okavango.modalities.embedding import EmbeddingSpec, new_embedding
from okavango.modalities.encoders import load_encoder
from okavango.modalities.precision import resolve_dtype
from okavango.modalities.projector import HeadSpec, ProjectionHead, new_head
from okavango.platform.errors import UnsupportedError
from okavango.training.lora import adapt_encoder, attach_lora
from okavango.training.model import AdaptedEncoder, Trainee
from okavango.training.packing import ATTENTION, recomputing
from okavango.training.pissa import factors
from okavango.training.quantized import packing_of
from okavango.training.spec import TrainSpec


def build_trainee(
    base: Base,
    spec: TrainSpec,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    modalities: Collection[str] = (),
    learned: Collection[str] = (),
) -> Trainee:
    """A fresh trainee; its factors come from torch's global random state.

    Args:
        modalities: of which any data hold media, so that heads are needed.
        learned: of which the training data do; what sees none in training has nothing to learn from.
    """
    decoder = load_decoder(base, dtype, device, ATTENTION, packing_of(spec.quantization, dtype))
    loudness = embedding_std(decoder)
    model = attach_lora(decoder, spec.lora, base.name) if spec.lora.train else decoder
    if spec.recompute:
        _keep_less(decoder)
    heads = {name: _head(base, spec, name, loudness) for name in sorted(modalities)}
    encoders = {
        name: _encoder(base, spec, name, dtype, device) for name in sorted(learned) if name in spec.encoders
    }
    # a pretrained connector's head passes on what it gets, and has nothing to learn
    able = {name for name, head in heads.items() if any(True for _ in head.parameters())}
    trained = able.intersection(learned) if spec.head.train else ()
    space = None
    if spec.joint.weight and learned:
        width = next(iter(heads.values())).spec.out_width
        shape = EmbeddingSpec(width, spec.joint.width, tuple(sorted(learned)))
        space = new_embedding(shape, spec.joint.temperature, spec.seed)
    trainee = Trainee(model, heads, trained, encoders, space).to(device).train()
    trainee.recomputes = spec.recompute
    if spec.lora.train and spec.lora.init == "pissa":
        trainee.start = factors(trainee.decoder)
    return trainee


def _keep_less(decoder: PreTrainedModel) -> None:
    """Keep what goes into a layer alone for the backward pass, which computes the rest anew."""
    model: Any = decoder
    # transformers 5.23 has the first name, and warns of the second, which is all that 5.17 has
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False, "context_fn": recomputing})
        decoder.disable_input_require_grads()  # that is for the reentrant kind
    except ValueError as error:  # transformers': layers that do not know of it
        raise UnsupportedError(
            f"{type(decoder).__name__} computes no layer anew", where="recompute", remedy="set it to false"
        ) from error


def head_spec(base: Base, spec: TrainSpec, modality: str) -> HeadSpec:
    """The shape of the head that a job uses: the base's, or what the job asks for instead."""
    default = base.heads[modality].spec
    shape = spec.heads.get(modality)
    return default if shape is None else shape.over(default)


def _head(base: Base, spec: TrainSpec, modality: str, loudness: float) -> ProjectionHead:
    if modality in spec.heads:
        return new_head(head_spec(base, spec, modality), loudness, seed=spec.seed)
    return load_head(base.heads[modality])


def _encoder(base: Base, spec: TrainSpec, modality: str, dtype: torch.dtype, device: str) -> AdaptedEncoder:
    encoder = load_encoder(base.encoders[modality], dtype, device)
    peft = adapt_encoder(encoder, base.encoders[modality], spec.encoders[modality], base.name)
    return AdaptedEncoder(encoder, peft)


def precision(name: str, device: str = "cpu") -> torch.dtype:
    """A specification's precision on a device: "auto" is bf16 where that is native."""
    return resolve_dtype("bfloat16" if name == "bf16" else name, device)
