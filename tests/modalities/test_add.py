import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from okavango.modalities.add import Recipe, add_base
from okavango.modalities.base import (
    Base,
    list_bases,
    load_decoder,
    load_head,
    load_tokenizer,
    read_base,
    verify_base,
)
from okavango.modalities.image import ImageEncoder
from okavango.modalities.tiny import write_tiny_decoder
from okavango.platform.errors import (
    BindError,
    ConfigError,
    ConflictError,
    NotFoundError,
    OkavangoError,
    UnsupportedError,
)


@pytest.fixture
def decoder(tiny_base: Base, tmp_path: Path) -> Path:
    """A decoder's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_base.decoder.path, tmp_path / "decoder"))


@pytest.fixture
def bases(tmp_path: Path) -> Path:
    return tmp_path / "bases"


def with_encoder(base: Base, **options: int | None) -> Recipe:
    return Recipe(str(base.decoder.path), f"local-dir:{base.encoders['image'].path}", **options)


def test_a_base_of_a_decoder_and_an_encoder_elsewhere(tiny_base: Base, bases: Path) -> None:
    added = add_base(bases, "mine", with_encoder(tiny_base))
    verify_base(added)
    assert added.decoder == tiny_base.decoder
    assert added.components["encoders.image"] == tiny_base.components["encoders.image"]
    head = added.heads["image"]
    assert (head.spec.tokens, head.spec.hidden, head.trained) == (16, 1024, False)
    features = torch.randn(1, head.spec.tokens, head.spec.in_width)
    assert load_head(head)(features).shape == (1, 16, 64)
    assert ImageEncoder.load(added.encoders["image"]).spec.grid == (4, 4)


def test_a_base_of_text_alone(tiny_base: Base, bases: Path) -> None:
    added = add_base(bases, "mine", Recipe(str(tiny_base.decoder.path)))
    assert added.components == {"decoder": tiny_base.decoder.digest}
    assert load_tokenizer(added).eos_token == "<|im_end|>"


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_other_architectures_work_alike(tmp_path: Path, bases: Path, architecture: str) -> None:
    write_tiny_decoder(tmp_path / "d", architecture=architecture)
    added = add_base(bases, "mine", Recipe(str(tmp_path / "d")))
    assert added.decoder.context == 512
    assert load_decoder(added, torch.float32).config.model_type == architecture


def test_a_copied_decoder_outlives_its_source(decoder: Path, bases: Path) -> None:
    added = add_base(bases, "mine", Recipe(str(decoder), copy=True))
    shutil.rmtree(decoder)
    verify_base(added)
    assert added.decoder.path == bases / "mine" / "decoder"


def test_a_relative_path_is_kept_as_an_absolute_one(
    decoder: Path, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(decoder.parent)
    assert add_base(bases, "mine", Recipe("decoder")).decoder.path == decoder


def test_tokens_and_hidden_width_are_as_asked(tiny_base: Base, bases: Path) -> None:
    spec = add_base(bases, "mine", with_encoder(tiny_base, image_tokens=1, head_hidden=8)).heads["image"].spec
    assert (spec.tokens, spec.hidden) == (1, 8)


def test_tiles_layers_and_the_heads_kind_are_as_asked(tiny_base: Base, bases: Path) -> None:
    recipe = with_encoder(
        tiny_base, image_tiles=4, image_layers=(-2, -1), head_kind="resampler", head_hidden=64, image_tokens=3
    )
    added = add_base(bases, "mine", recipe)
    verify_base(added)
    encoder, head = added.encoders["image"], added.heads["image"].spec
    assert (encoder.tiles, encoder.layers) == (4, (-2, -1))
    assert (head.kind, head.tokens, head.in_width) == ("resampler", 3, encoder.width)


def test_tokens_that_do_not_tile_leave_no_base(tiny_base: Base, bases: Path) -> None:
    with pytest.raises(ConfigError, match="5 tokens do not tile"):
        add_base(bases, "mine", with_encoder(tiny_base, image_tokens=5))
    assert list_bases(bases) == ()
    assert not (bases / "mine").exists()


def test_a_taken_name_is_refused_unless_forced(tiny_base: Base, bases: Path) -> None:
    first = add_base(bases, "mine", with_encoder(tiny_base))
    with pytest.raises(ConflictError, match="--force"):
        add_base(bases, "mine", Recipe(str(tiny_base.decoder.path)))
    assert find_digest(bases) == first.digest
    forced = add_base(bases, "mine", Recipe(str(tiny_base.decoder.path)), force=True)
    assert find_digest(bases) == forced.digest != first.digest


def find_digest(bases: Path) -> str:
    return read_base(bases / "mine").digest


def remove(pattern: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return spoil


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def tear(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return spoil


def rename_architecture(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "no-such-type"}))


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (remove("config.json"), ConfigError, "no config.json"),
        (remove("*.safetensors"), ConfigError, "no safetensors weights"),
        (remove("tokenizer*"), ConfigError, "has no tokenizer"),
        (remove("chat_template.jinja"), ConfigError, "no chat template"),
        (tear("tokenizer.json"), ConfigError, "tokenizer cannot be loaded"),
        (tear("config.json"), OkavangoError, "cannot be loaded|cannot load"),
        (tear("model.safetensors"), UnsupportedError, "cannot load it as a decoder"),
        (drop_a_tensor, BindError, r"layers\.1\.mlp\.up_proj\.weight"),
        (rename_architecture, OkavangoError, "no-such-type"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_no_decoder_is_refused(
    decoder: Path, bases: Path, spoil: Callable[[Path], None], error: type[OkavangoError], text: str
) -> None:
    spoil(decoder)
    with pytest.raises(error, match=text) as raised:
        add_base(bases, "mine", Recipe(str(decoder)))
    assert raised.value.where == str(decoder)
    assert not (bases / "mine").exists()


@pytest.mark.parametrize("named", ["./nowhere", "/no/such/dir", "missing.gguf", "a/b/c", "spaced name"])
def test_a_decoder_that_is_not_there_is_not_found(bases: Path, named: str) -> None:
    with pytest.raises(NotFoundError, match="no decoder lies here"):
        add_base(bases, "mine", Recipe(named))


def test_an_id_that_the_hub_does_not_give_is_not_found(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotFoundError, match="the hub gives none"):
        add_base(bases, "mine", Recipe("nobody/no-such-model"))


def test_a_file_that_is_no_gguf_is_refused(bases: Path, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="neither a directory nor"):
        add_base(bases, "mine", Recipe(str(tmp_path / "model.bin")))


@pytest.mark.parametrize("option", [{"image_tokens": 4}, {"head_hidden": 8}, {"image_weights": "openai"}])
def test_picture_options_without_an_encoder_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"without an( image)? encoder"):
        Recipe("somewhere", **option)


def test_options_of_another_modality_are_refused() -> None:
    with pytest.raises(ConfigError, match="without an audio encoder"):
        Recipe("somewhere", "ViT-B-32", "openai", audio_stride=4)
    with pytest.raises(ConfigError, match="pretrained connectors"):
        Recipe("somewhere", "ViT-B-32", "openai", head_kind="identity")


@pytest.mark.parametrize("option", [{"image_tokens": 0}, {"head_hidden": -1}, {"image_tiles": 0}])
def test_sizes_below_one_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="1 or more"):
        Recipe("somewhere", "ViT-B-32", "openai", **option)
