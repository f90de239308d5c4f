import shutil
from pathlib import Path

import pytest
import torch

from okavango.modalities.base import (
    Base,
    find_base,
    list_bases,
    load_decoder,
    load_head,
    load_tokenizer,
    read_base,
    verify_base,
)
from okavango.platform.errors import ConfigError, IntegrityError, NotFoundError


@pytest.fixture
def bases(tiny_base: Base, tmp_path: Path) -> Path:
    """A folder of bases that a test may spoil."""
    shutil.copytree(tiny_base.folder, tmp_path / "tiny")
    return tmp_path


def edit(bases: Path, old: str, new: str) -> None:
    path = bases / "tiny" / "base.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_copied_base_is_the_same_base(bases: Path, tiny_base: Base) -> None:
    copied = read_base(bases / "tiny")
    assert copied.digest == tiny_base.digest
    assert copied.decoder.path == bases / "tiny" / "decoder"
    verify_base(copied)


def test_a_folder_without_a_description_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no base lies here"):
        read_base(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("format = 1", "format = 9", "format 9, expected 1"),
        ("format = 1", "format = ", "not a base description"),
        ("digest = ", "digset = ", r"unknown key decoder\.digset \(did you mean digest\?\)"),
        ("[decoder]", "decoder = 3\n[encoders.other]", "not a base description"),
        ("format = 1", "format = 1\nencodrs = 1", r"unknown key encodrs \(did you mean encoders\?\)"),
        ("image_size = ", "imagesize = 1\nimage_size = ", r"unknown key encoders\.image\.imagesize"),
        ("trained = ", "colour = 1\ntrained = ", r"unknown key projectors\.image\.colour \(known here: path"),
        ("grid = [4, 4]", "grid = 4", "not a base description"),
    ],
)
def test_a_spoiled_description_is_a_clear_error(bases: Path, old: str, new: str, text: str) -> None:
    edit(bases, old, new)
    with pytest.raises(ConfigError, match=text):
        read_base(bases / "tiny")


def test_a_base_is_found_by_name_and_by_path(bases: Path) -> None:
    assert find_base("tiny", bases).folder == bases / "tiny"
    assert find_base(str(bases / "tiny"), Path("/nowhere")).folder == bases / "tiny"


def test_an_unknown_base_names_those_that_there_are(bases: Path) -> None:
    with pytest.raises(NotFoundError, match="known: tiny"):
        find_base("giant", bases)
    with pytest.raises(NotFoundError, match="okavango base build starter"):
        find_base("starter", bases)


def test_hidden_folders_are_not_listed(bases: Path) -> None:
    shutil.copytree(bases / "tiny", bases / ".other.draft")
    (bases / "empty").mkdir()
    assert list_bases(bases) == ("tiny",)


@pytest.mark.parametrize(
    ("file", "component"),
    [
        ("decoder/model.safetensors", "decoder"),
        ("decoder/chat_template.jinja", "decoder"),
        ("encoders/image/open_clip_config.json", "encoders.image"),
        ("projectors/image.safetensors", "projectors.image"),
    ],
)
def test_verifying_finds_one_altered_byte(bases: Path, file: str, component: str) -> None:
    path = bases / "tiny" / file
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(IntegrityError, match=component):
        verify_base(read_base(bases / "tiny"))


def test_verifying_finds_an_added_file(bases: Path) -> None:
    (bases / "tiny" / "decoder" / "added_tokens.json").write_text("{}")
    with pytest.raises(IntegrityError, match="decoder"):
        verify_base(read_base(bases / "tiny"))


def test_what_is_loaded_is_frozen(tiny_base: Base) -> None:
    decoder = load_decoder(tiny_base, torch.bfloat16)
    assert decoder.dtype == torch.bfloat16
    assert not decoder.training
    for module in (decoder, load_head(tiny_base.heads["image"])):
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_tokenizer_without_a_chat_template_is_refused(bases: Path) -> None:
    (bases / "tiny" / "decoder" / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        load_tokenizer(read_base(bases / "tiny"))


@pytest.mark.parametrize("weights", ["decoder/model.safetensors", "projectors/image.safetensors"])
def test_torn_weights_say_what_to_do(bases: Path, weights: str) -> None:
    path = bases / "tiny" / weights
    path.write_bytes(path.read_bytes()[:100])
    base = read_base(bases / "tiny")
    with pytest.raises(IntegrityError, match=r"cannot be read.*build the base again"):
        load_decoder(base, torch.float32) if "decoder" in weights else load_head(base.heads["image"])
