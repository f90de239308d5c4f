from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from okavango.platform import bundle
from okavango.platform.bundle import Manifest
from okavango.platform.errors import IntegrityError

COMPONENTS = {"decoder": "d1", "encoders.image": "e1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "decoder/adapter_model.safetensors": b"weights",
        "projectors/image.safetensors": b"head",
        "projectors/image.json": b"{}",
        "probes.safetensors": b"probes",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def seal(folder: Path, **changes: Any) -> Manifest:
    return bundle.seal(folder, replace(Manifest(components=COMPONENTS, modalities=("image",)), **changes))


def test_a_sealed_folder_verifies(folder: Path) -> None:
    sealed = seal(folder, lineage={"data": "t1"}, metrics={"chrf": 21.5})
    assert (
        bundle.verify(folder)
        == bundle.verify(folder, sealed.digest)
        == bundle.read_manifest(folder)
        == sealed
    )
    assert sealed.files["probes.safetensors"] == hashlib.sha256(b"probes").hexdigest()
    assert bundle.MANIFEST not in sealed.files


def test_sealing_again_is_the_same(folder: Path) -> None:
    assert seal(folder).digest == seal(folder).digest


def test_what_the_manifest_tells(folder: Path) -> None:
    sealed = seal(folder)
    assert sealed.has_probes
    assert sealed.head_modalities == ("image",)
    (folder / bundle.PROBES).unlink()
    (folder / "projectors/image.safetensors").unlink()
    (folder / "decoder/projectors").mkdir()
    (folder / "decoder/projectors/audio.safetensors").touch()
    bare = seal(folder)
    assert not bare.has_probes
    assert bare.head_modalities == ()


def test_the_digest_is_over_files_and_components(folder: Path) -> None:
    """Not over scores and lineage: the same weights are the same adapter, whoever measured them."""
    digest = seal(folder).digest
    assert seal(folder, metrics={"chrf": 1.0}, lineage={"job": "job-1"}).digest == digest
    assert seal(folder, components={**COMPONENTS, "encoders.image": "e2"}).digest != digest
    (folder / "probes.safetensors").write_bytes(b"other")
    assert seal(folder).digest != digest


def test_a_digest_stays_what_it_is() -> None:
    """Stored digests outlive releases."""
    manifest = Manifest(components={"decoder": "d"}, files={"b": "2", "a": "1"})
    expected = hashlib.sha256(b'{"components":{"decoder":"d"},"files":{"a":"1","b":"2"}}').hexdigest()
    assert manifest.digest == expected


@given(st.dictionaries(st.text(), st.text()))
def test_the_order_of_files_does_not_matter(files: dict[str, str]) -> None:
    turned = dict(reversed(files.items()))
    assert Manifest(COMPONENTS, files=files).digest == Manifest(COMPONENTS, files=turned).digest


def altered(folder: Path) -> None:
    (folder / "projectors/image.safetensors").write_bytes(b"tale")


def missing(folder: Path) -> None:
    (folder / "projectors/image.safetensors").unlink()


def stray(folder: Path) -> None:
    (folder / "projectors/audio.safetensors").touch()


def swapped(folder: Path) -> None:
    path, other = folder / "projectors/image.safetensors", folder / "probes.safetensors"
    path.rename(folder / "x")
    other.rename(path)
    (folder / "x").rename(other)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (altered, "projectors/image.safetensors: differs"),
        (missing, "projectors/image.safetensors: is missing"),
        (stray, "projectors/audio.safetensors: is not listed"),
        (swapped, "probes.safetensors: differs"),
    ],
)
def test_every_change_is_found_and_named(folder: Path, damage: Any, message: str) -> None:
    seal(folder)
    damage(folder)
    with pytest.raises(IntegrityError, match=message):
        bundle.verify(folder)


def test_another_bundle_than_the_one_expected(folder: Path) -> None:
    digest = seal(folder).digest
    (folder / "probes.safetensors").write_bytes(b"other")
    other = seal(folder).digest
    with pytest.raises(IntegrityError, match=f"digest {other[:12]}, expected {digest[:12]}"):
        bundle.verify(folder, digest)


def rewritten(folder: Path, **changes: Any) -> None:
    path = folder / bundle.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_manifest_of_a_later_format(folder: Path) -> None:
    seal(folder)
    rewritten(folder, format=2)
    with pytest.raises(IntegrityError, match="bundle format 2, expected 1"):
        bundle.read_manifest(folder)


def test_a_manifest_with_a_field_that_we_do_not_know(folder: Path) -> None:
    seal(folder)
    rewritten(folder, colour="blue")
    with pytest.raises(IntegrityError, match="colour"):
        bundle.read_manifest(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "{}", '{"format": 1}', '{"format": 1, "modalities": 3}']
)
def test_what_is_no_manifest(folder: Path, text: str) -> None:
    (folder / bundle.MANIFEST).write_text(text)
    with pytest.raises(IntegrityError, match=r"manifest\.json: not a bundle"):
        bundle.read_manifest(folder)


@pytest.mark.parametrize("name", ["components", "lineage", "metrics", "files"])
@pytest.mark.parametrize("value", [3, None, "x", ["x"]])
def test_a_field_of_another_type(folder: Path, name: str, value: Any) -> None:
    seal(folder)
    rewritten(folder, **{name: value})
    with pytest.raises(IntegrityError, match=f"{name} is no object"):
        bundle.verify(folder)


def test_bytes_that_are_no_text(folder: Path) -> None:
    (folder / bundle.MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(IntegrityError, match="not a bundle"):
        bundle.read_manifest(folder)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="not a bundle"):
        bundle.verify(tmp_path)
