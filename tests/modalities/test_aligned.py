"""Default heads that were trained: out of a bundle, in one file, in a base of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from okavango.modalities.aligned import base_with, heads_of_bundle, read_heads, write_heads
from okavango.modalities.base import Base, load_head, verify_base
from okavango.modalities.embedding import read_embedding, write_embedding
from okavango.modalities.head_files import read_head, write_head
from okavango.modalities.projector import new_head
from okavango.modalities.tiny_bundle import random_space, write_tiny_bundle
from okavango.platform.bundle import Manifest, seal
from okavango.platform.errors import BindError, ConflictError, IntegrityError


@pytest.fixture
def heads(tiny_base: Base, tmp_path: Path) -> Path:
    """A sealed bundle of an image head and a space, as a job of heads alone publishes it."""
    folder = tmp_path / "heads"
    folder.mkdir()
    write_head(folder, "image", new_head(tiny_base.heads["image"].spec, 0.02, seed=5))
    write_embedding(folder, random_space(tiny_base, 5))
    parts = {name: tiny_base.components[name] for name in ("decoder", "encoders.image")}
    seal(folder, Manifest(parts, ("image",), metrics={"chrf": 12.5}))
    return folder


def test_a_base_takes_the_heads_and_the_space_of_a_bundle(
    tiny_base: Base, heads: Path, tmp_path: Path
) -> None:
    made = base_with(tmp_path / "bases", "seeing", tiny_base, heads_of_bundle(heads))
    verify_base(made)
    assert made.heads["image"].trained
    assert made.embedding is not None
    assert made.decoder.path == tiny_base.decoder.path
    assert {name: made.components[name] for name in ("decoder", "encoders.image")} == {
        name: tiny_base.components[name] for name in ("decoder", "encoders.image")
    }
    assert made.digest != tiny_base.digest
    expected = read_head(heads, "image").state_dict()
    torch.testing.assert_close(load_head(made.heads["image"]).state_dict(), expected, rtol=0, atol=0)
    assert made.width is not None
    space, own = read_embedding(made.folder, made.width), read_embedding(heads, made.width)
    assert space is not None
    assert own is not None
    torch.testing.assert_close(space.state_dict(), own.state_dict(), rtol=0, atol=0)


def test_a_name_that_is_taken_stays(tiny_base: Base, heads: Path, tmp_path: Path) -> None:
    aligned = heads_of_bundle(heads)
    first = base_with(tmp_path, "seeing", tiny_base, replace(aligned, embedding=None))
    assert first.embedding is None
    with pytest.raises(ConflictError, match="exists"):
        base_with(tmp_path, "seeing", tiny_base, aligned)
    assert base_with(tmp_path, "seeing", tiny_base, aligned, force=True).embedding is not None


def test_an_altered_space_is_noticed(tiny_base: Base, heads: Path, tmp_path: Path) -> None:
    made = base_with(tmp_path, "seeing", tiny_base, heads_of_bundle(heads))
    assert made.embedding is not None
    made.embedding.path.with_suffix(".json").write_text("{}")
    with pytest.raises(IntegrityError, match="embedding"):
        verify_base(made)


def test_heads_of_other_parts_are_refused(tiny_base: Base, heads: Path, tmp_path: Path) -> None:
    aligned = heads_of_bundle(heads)
    other = replace(aligned, components={**aligned.components, "encoders.image": "0" * 64})
    with pytest.raises(BindError, match="other parts"):
        base_with(tmp_path, "seeing", tiny_base, other)
    assert not (tmp_path / "seeing").exists()


@pytest.mark.parametrize(
    ("adapts", "named"),
    [({}, "the decoder"), ({"encoder": True}, "the decoder and the image encoder")],
    ids=["decoder", "both"],
)
def test_a_bundle_that_adapts_more_is_refused(
    tiny_base: Base, tmp_path: Path, adapts: dict[str, bool], named: str
) -> None:
    write_tiny_bundle(tmp_path / "more", tiny_base, probes=False, **adapts)
    with pytest.raises(ConflictError, match=f"it adapts {named} besides heads"):
        heads_of_bundle(tmp_path / "more")


def test_a_bundle_without_heads_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    seal(tmp_path, Manifest({"decoder": tiny_base.components["decoder"]}))
    with pytest.raises(IntegrityError, match="no projection heads"):
        heads_of_bundle(tmp_path)


def test_one_file_holds_them_in_half_the_bytes(heads: Path, tmp_path: Path) -> None:
    aligned, path = heads_of_bundle(heads), tmp_path / "one.safetensors"
    write_heads(path, aligned)
    assert path.stat().st_size < 0.6 * sum(file.stat().st_size for file in heads.rglob("*.safetensors"))
    found = read_heads(path)
    assert (found.components, found.scores) == (aligned.components, {"chrf": 12.5})
    assert found.heads["image"].spec == aligned.heads["image"].spec
    near = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(found.heads["image"].state_dict(), aligned.heads["image"].state_dict(), **near)
    assert found.embedding is not None
    assert aligned.embedding is not None
    torch.testing.assert_close(found.embedding.state_dict(), aligned.embedding.state_dict(), **near)
    write_heads(path, replace(aligned, embedding=None))
    assert read_heads(path).embedding is None


def test_a_torn_file_is_refused(heads: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    path.write_bytes(b"\0" * 30)
    with pytest.raises(IntegrityError, match="not a file of heads"):
        read_heads(path)
    save_file({"image.weight": torch.zeros(1)}, path)
    with pytest.raises(IntegrityError, match="not a file of heads"):
        read_heads(path)
    write_heads(path, heads_of_bundle(heads))
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["embedding.text.weight"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(BindError, match=r"text\.weight"):
        read_heads(path)
