from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperModel

from okavango.modalities.audio import AudioEncoder, load_whisper
from okavango.modalities.ctranslate2 import Model
from okavango.modalities.tiny_whisper import SHAPE, write_tiny_whisper
from okavango.modalities.whisper import (
    encoder_shape,
    encoder_tensors,
    import_whisper,
    measure_whisper,
    random_state,
    write_whisper,
)
from okavango.platform.errors import BindError, ConfigError

NAMES = {  # CTranslate2's: transformers'
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}


@pytest.fixture
def state() -> dict[str, Tensor]:
    """A tiny encoder's, in the float16 of such packages, with nothing left at one or zero."""
    return {
        name: (tensor + 0.01 * torch.randn_like(tensor)).half()
        for name, tensor in random_state(SHAPE, 7).items()
    }


@pytest.fixture
def model(state: dict[str, Tensor]) -> Model:
    """The file that such an encoder comes from, with some of a decoder beside it."""
    found = {
        "encoder/num_heads": torch.tensor(2, dtype=torch.int16),
        "encoder/position_encodings/encodings": state["embed_positions.weight"],
        "decoder/embeddings/weight": torch.ones(3, 32),
        **{
            f"encoder/{conv}/{kind}": state[f"{conv}.{kind}"]
            for conv in ("conv1", "conv2")
            for kind in ("weight", "bias")
        },
        **{
            f"encoder/layer_norm/{ct}": state[f"layer_norm.{hf}"]
            for ct, hf in (("gamma", "weight"), ("beta", "bias"))
        },
    }
    for i in range(2):
        for theirs, ours in NAMES.items():
            kinds = ("gamma", "beta") if "norm" in theirs else ("weight", "bias")
            for ct, hf in zip(kinds, ("weight", "bias"), strict=True):
                found[f"encoder/layer_{i}/{theirs}/{ct}"] = state[f"layers.{i}.{ours}.{hf}"]
        attention = f"layers.{i}.self_attn."
        weights = [state[f"{attention}{part}_proj.weight"] for part in "qkv"]
        q, v = state[f"{attention}q_proj.bias"], state[f"{attention}v_proj.bias"]
        fused = f"encoder/layer_{i}/self_attention/linear_0/"
        found |= {
            f"{fused}weight": torch.cat(weights),
            f"{fused}bias": torch.cat([q, torch.zeros_like(q), v]),
        }
    return Model("WhisperSpec", 3, found)


def test_every_tensor_finds_its_place(model: Model, state: dict[str, Tensor]) -> None:
    found = encoder_tensors(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_the_shape_is_read_off_the_variables(model: Model) -> None:
    assert encoder_shape(model) == SHAPE


def test_what_is_written_is_loaded_bit_for_bit(
    model: Model, state: dict[str, Tensor], tmp_path: Path
) -> None:
    write_whisper(tmp_path / "e", encoder_shape(model), encoder_tensors(model))
    found = load_whisper(tmp_path / "e").state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name].float()) for name in state)


def test_another_kind_of_model_is_a_clear_error(model: Model) -> None:
    with pytest.raises(BindError, match="kind TransformerSpec, expected WhisperSpec"):
        encoder_shape(Model("TransformerSpec", 1, model.variables))


@pytest.mark.parametrize("name", ["num_heads", "conv1/weight", "position_encodings/encodings"])
def test_a_model_without_what_tells_its_shape_is_a_clear_error(model: Model, name: str) -> None:
    del model.variables[f"encoder/{name}"]
    with pytest.raises(BindError, match=f"encoder/{name}: the model lacks"):
        encoder_shape(model)


@pytest.mark.parametrize(
    "name", ["layer_1/ffn/linear_1/bias", "layer_norm/beta", "layer_0/self_attention/linear_0/bias"]
)
def test_a_missing_variable_is_a_clear_error_and_nothing_is_written(
    model: Model, tmp_path: Path, name: str
) -> None:
    del model.variables[f"encoder/{name}"]
    with pytest.raises(BindError, match="do not fit"):
        write_whisper(tmp_path / "e", encoder_shape(model), encoder_tensors(model))
    assert not (tmp_path / "e").exists()


def test_a_variable_without_a_place_is_a_clear_error(model: Model) -> None:
    model.variables["encoder/layer_0/self_attention/relative_keys"] = torch.ones(3)
    with pytest.raises(BindError, match=r"relative_keys: .*no place"):
        encoder_tensors(model)


def test_keys_with_a_bias_are_refused(model: Model) -> None:
    model.variables["encoder/layer_1/self_attention/linear_0/bias"][40] = 1
    with pytest.raises(BindError, match=r"layers\.1\.self_attn\.k_proj\.bias: the keys have a bias"):
        encoder_tensors(model)


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    first, again, other = (write_tiny_whisper(tmp_path / str(i), seed) for i, seed in enumerate((3, 3, 4)))
    assert first.digest == again.digest != other.digest


def test_the_spec_tells_width_and_grid(tmp_path: Path) -> None:
    spec = write_tiny_whisper(tmp_path / "e", layers=(-2, -1))
    assert (spec.kind, spec.width, spec.grid, spec.layers, spec.image_size) == (
        "whisper",
        64,
        (1, 1500),
        (-2, -1),
        0,
    )
    assert spec.digest != measure_whisper(tmp_path / "e").digest


@pytest.mark.parametrize("layer", [-3, 0, 1])
def test_a_layer_that_is_not_there_is_a_clear_error(tmp_path: Path, layer: int) -> None:
    with pytest.raises(ConfigError, match=f"layer {layer} of 2"):
        write_tiny_whisper(tmp_path / "e", layers=(layer,))


def test_nothing_of_a_library_s_version_is_written(tmp_path: Path) -> None:
    write_tiny_whisper(tmp_path / "e")
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    assert config == {"model_type": "whisper", **SHAPE}


def test_the_encoder_of_a_whole_model_is_taken(tmp_path: Path) -> None:
    config = WhisperConfig(
        **SHAPE, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8, vocab_size=60000
    )
    whole = WhisperModel(config)
    whole.save_pretrained(tmp_path / "whole")
    import_whisper(tmp_path / "e", str(tmp_path / "whole"))
    found, expected = load_whisper(tmp_path / "e").state_dict(), whole.encoder.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_no_whisper_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"llama|Whisper model"):
        import_whisper(tmp_path / "e", str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", "{", "not a usable Whisper encoder"),
        ("config.json", '{"model_type": "whisper"}', "not a usable Whisper encoder"),
        ("model.safetensors", "torn", "not a usable Whisper encoder"),
        ("preprocessor_config.json", '{"feature_size": 128}', r"are \(128, 16000, 160, 480000\)"),
        ("preprocessor_config.json", '{"feature_size": 80, "chunk_length": 10}', "160000"),
    ],
)
def test_a_spoilt_folder_is_a_clear_error(tmp_path: Path, file: str, content: str, reason: str) -> None:
    spec = write_tiny_whisper(tmp_path / "e")
    (tmp_path / "e" / file).write_text(content)
    with pytest.raises(ConfigError, match=reason):
        AudioEncoder.load(spec)
