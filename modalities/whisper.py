"""Whisper encoders on disk: a Hugging Face directory that holds the encoder alone, without its decoder.

config.json                 WhisperConfig's
model.safetensors           the state of transformers' WhisperEncoder
preprocessor_config.json    WhisperFeatureExtractor's
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from okavango.modalities.audio import (
    CONFIG_FILE,
    MEL_FILE,
    WEIGHTS_FILE,
    empty_whisper,
    load_whisper,
    mel_extractor,
)
from okavango.modalities.base import EncoderSpec, encoder_digest
from okavango.modalities.ctranslate2 import Model
from okavango.modalities.image import UNUSABLE
from okavango.platform.errors import BindError, ConfigError

if TYPE_CHECKING:
    from transformers import WhisperConfig

KIND = "whisper"
SPREAD = 0.2
# All of a WhisperConfig that an encoder hangs on. Written out one by one: what else transformers would write,
# its own version among it, would change an encoder's digest with every upgrade.
SHAPE_KEYS = (
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "num_mel_bins",
    "max_source_positions",
    "activation_function",
    "scale_embedding",
)
_MEL_KEYS = ("feature_size", "sampling_rate", "hop_length", "chunk_length", "n_fft", "padding_value")
_LAYER = re.compile(r"layer_(\d+)/(.+)/(\w+)")
_OUTSIDE_LAYERS = {
    "conv1/weight": "conv1.weight",
    "conv1/bias": "conv1.bias",
    "conv2/weight": "conv2.weight",
    "conv2/bias": "conv2.bias",
    "position_encodings/encodings": "embed_positions.weight",
    "layer_norm/gamma": "layer_norm.weight",
    "layer_norm/beta": "layer_norm.bias",
}
_IN_LAYER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_0": "self_attn.qkv",
    "self_attention/linear_1": "self_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
_KINDS = {"gamma": "weight", "beta": "bias"}
_NO_TENSOR = ("num_heads",)


def encoder_shape(model: Model) -> dict[str, Any]:
    """The part of WhisperConfig that write_whisper takes, from the variables' shapes.

    Raises:
        BindError: the model is no Whisper, or lacks its encoder.
    """
    if model.kind != "WhisperSpec":
        raise BindError(f"a model of kind {model.kind}, expected WhisperSpec", where="CTranslate2 model")
    conv = _variable(model, "encoder/conv1/weight")
    layers = {match[1] for name in model.variables if (match := re.match(r"encoder/layer_(\d+)/", name))}
    return {
        "d_model": conv.shape[0],
        "encoder_layers": len(layers),
        "encoder_attention_heads": int(_variable(model, "encoder/num_heads")),
        "encoder_ffn_dim": _variable(model, "encoder/layer_0/ffn/linear_0/weight").shape[0],
        "num_mel_bins": conv.shape[1],
        "max_source_positions": _variable(model, "encoder/position_encodings/encodings").shape[0],
        "activation_function": "gelu",
        "scale_embedding": False,
    }


def encoder_tensors(model: Model) -> dict[str, Tensor]:
    """The state of transformers' WhisperEncoder, in the type that the file has.

    Raises:
        BindError: a variable of the encoder has no place there.
    """
    own = {
        name.removeprefix("encoder/"): tensor
        for name, tensor in model.variables.items()
        if name.startswith("encoder/") and not name.endswith(_NO_TENSOR)
    }
    return dict(pair for name, tensor in own.items() for pair in _placed(name, tensor))


def write_whisper(
    folder: Path, shape: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None, seed: int = 0
) -> None:
    """Write an encoder that holds exactly these weights, in their own type.

    Args:
        shape: SHAPE_KEYS of a WhisperConfig.
        tensors: the encoder's state; None takes random ones, the same for the same seed.

    Raises:
        BindError: a tensor is missing, left over, or of another shape.
    """
    from safetensors.torch import save_file

    state = random_state(shape, seed) if tensors is None else dict(tensors)
    _check(shape, state)
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS_FILE)
    _write_json(folder / CONFIG_FILE, {"model_type": "whisper", **{key: shape[key] for key in SHAPE_KEYS}})
    _write_json(folder / MEL_FILE, _mel_settings(shape))


def random_state(shape: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """The state of an untrained encoder, spread so wide that different sounds give different features."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state: dict[str, Tensor] = WhisperEncoder(WhisperConfig(**shape, init_std=SPREAD)).state_dict()
    return state


def import_whisper(folder: Path, name: str) -> None:
    """Write the encoder of a Whisper model of transformers: a directory, or an id on the hub.

    Raises:
        ConfigError: there is none, or it is of another architecture.
        BindError: its weights are incomplete.
    """
    from transformers import WhisperConfig, WhisperModel

    try:
        config = WhisperConfig.from_pretrained(name)
        model: Any
        found: dict[str, Any]
        model, found = WhisperModel.from_pretrained(name, dtype="auto", output_loading_info=True)  # type: ignore[misc]
    except UNUSABLE as error:
        raise ConfigError(f"not a Whisper model of transformers: {error}", where=name) from error
    if missing := sorted(key for key in found["missing_keys"] if key.startswith("encoder.")):
        raise BindError(f"{len(missing)} weights are missing, {missing[0]} first", where=name)
    write_whisper(folder, shape_of(config), model.get_encoder().state_dict())


def shape_of(config: WhisperConfig) -> dict[str, Any]:
    """SHAPE_KEYS of a config. Raises ConfigError where it is of another model."""
    if config.model_type != "whisper":
        raise ConfigError(f"a model of type {config.model_type!r}, expected whisper")
    return {key: getattr(config, key) for key in SHAPE_KEYS}


def measure_whisper(folder: Path, layers: tuple[int, ...] = (-1,)) -> EncoderSpec:
    """The spec of the encoder in a directory.

    Raises:
        ConfigError: the directory is not usable, or has no such layers.
    """
    config: WhisperConfig = load_whisper(folder).config
    width, positions = config.d_model * len(layers), config.max_source_positions
    mel_extractor(folder, config)
    for layer in layers:
        if not -config.encoder_layers <= layer < 0:
            raise ConfigError(
                f"layer {layer} of {config.encoder_layers}", where=str(folder), remedy="count from the end"
            )
    digest = encoder_digest(folder, 0, layers, KIND)
    return EncoderSpec(folder, digest, 0, width, (1, positions), layers, KIND)


def _placed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Where a variable goes; query, key and value, which lie fused, go to three places."""
    if name in _OUTSIDE_LAYERS:
        yield _OUTSIDE_LAYERS[name], tensor
        return
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _IN_LAYER:
        raise BindError("transformers' WhisperEncoder has no place for it", where=f"encoder/{name}")
    place, kind = f"layers.{match[1]}.{_IN_LAYER[match[2]]}", _KINDS.get(match[3], match[3])
    if place.endswith("qkv"):
        yield from _split(place.removesuffix("qkv"), kind, tensor)
    else:
        yield f"{place}.{kind}", tensor


def _split(place: str, kind: str, fused: Tensor) -> Iterator[tuple[str, Tensor]]:
    for part, tensor in zip("qkv", fused.chunk(3), strict=True):
        if (part, kind) != ("k", "bias"):
            yield f"{place}{part}_proj.{kind}", tensor
        elif tensor.any():
            raise BindError("the keys have a bias, which Whisper's do not", where=f"{place}k_proj.bias")


def _check(shape: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Raises BindError unless the state is that of a WhisperEncoder of this shape."""
    from transformers import WhisperConfig

    try:
        empty_whisper(WhisperConfig(**shape)).load_state_dict(dict(state), strict=True, assign=True)
    except RuntimeError as error:
        raise BindError(f"the weights do not fit the encoder: {error}") from error


def _variable(model: Model, name: str) -> Tensor:
    if name not in model.variables:
        raise BindError("the model lacks this variable", where=name)
    return model.variables[name]


def _mel_settings(shape: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=shape["num_mel_bins"])
    settings = {key: getattr(extractor, key) for key in _MEL_KEYS}
    return {"feature_extractor_type": "WhisperFeatureExtractor", **settings}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
