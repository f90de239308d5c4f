"""The adapter bundle: manifest, digests and file contract. Standard library only; tensors are not read here.

    manifest.json                     format version, component digests, modalities, lineage, metrics, files
    decoder/                          PEFT's own files: adapter_config.json, adapter_model.safetensors
    encoders/<modality>/              the same of an encoder, if it is adapted
    projectors/<modality>.safetensors full weights, if the head is adapted
    projectors/<modality>.json        the head's spec, beside its weights
    embedding.safetensors, .json      the shared space of texts and media, if it was trained
    prompt.json                       system prompt and generation defaults, if set
    probes.safetensors                probe inputs and the logits that training saw

A bundle is never changed. Its digest is over the sorted {path: sha256} and the component digests that it
binds to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from okavango.platform.errors import IntegrityError

FORMAT = 1
MANIFEST = "manifest.json"
PROBES = "probes.safetensors"
PROMPT = "prompt.json"
EMBEDDING = "embedding.safetensors"


@dataclass(frozen=True)
class Manifest:
    """What a bundle is made of.

    Attributes:
        components: digests that the bundle binds to, by component: decoder, encoders.image.
        modalities: media modalities that the adapter was trained on.
        lineage: base, data, config and job that made it.
        metrics: validation scores by name.
        files: {relative POSIX path: sha256} of everything but the manifest.
    """

    components: dict[str, str]
    modalities: tuple[str, ...] = ()
    lineage: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def digest(self) -> str:
        return digest_of({"files": self.files, "components": self.components})

    @property
    def has_probes(self) -> bool:
        return PROBES in self.files

    @property
    def encoder_modalities(self) -> tuple[str, ...]:
        """Modalities whose encoder the bundle adapts."""
        names = (name.split("/") for name in self.files if name.startswith("encoders/"))
        return tuple(sorted({name[1] for name in names}))

    def delta_digest(self, modality: str) -> str:
        """sha256 over what the bundle changes in an encoder."""
        prefix = f"encoders/{modality}/"
        return digest_of({name: sha for name, sha in self.files.items() if name.startswith(prefix)})

    @property
    def head_modalities(self) -> tuple[str, ...]:
        """Modalities whose projection head the bundle brings itself."""
        prefix, suffix = "projectors/", ".safetensors"
        names = (name for name in self.files if name.startswith(prefix) and name.endswith(suffix))
        return tuple(sorted(name.removeprefix(prefix).removesuffix(suffix) for name in names))


def digest_of(value: Mapping[str, Any]) -> str:
    """sha256 of a mapping's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path) -> dict[str, str]:
    """{relative POSIX path: sha256} of every file below a folder, sorted by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a finished folder, its file digests filled in."""
    files = {name: sha for name, sha in folder_sha256(folder).items() if name != MANIFEST}
    sealed = Manifest(**{**asdict(manifest), "files": files, "modalities": tuple(manifest.modalities)})
    (folder / MANIFEST).write_text(json.dumps(asdict(sealed), indent=2, sort_keys=True) + "\n")
    return sealed


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle, without checking its files.

    Raises:
        IntegrityError: there is no manifest, or it is not one of this format.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text())
        if raw["format"] != FORMAT:
            raise IntegrityError(f"bundle format {raw['format']}, expected {FORMAT}", where=str(path))
        for name in ("components", "lineage", "metrics", "files"):
            if not isinstance(raw[name], dict):
                raise TypeError(f"{name} is no object")
        return Manifest(**{**raw, "modalities": tuple(raw["modalities"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"not a bundle: {error}", where=str(path)) from error


def verify(folder: Path, digest: str | None = None) -> Manifest:
    """The manifest of a bundle whose every file is as the manifest says.

    Raises:
        IntegrityError: a file is missing, altered or not listed, or the bundle's digest is another.
    """
    manifest = read_manifest(folder)
    if digest is not None and manifest.digest != digest:
        raise IntegrityError(f"digest {manifest.digest[:12]}, expected {digest[:12]}", where=str(folder))
    found = folder_sha256(folder)
    found.pop(MANIFEST, None)
    for name in sorted(found.keys() | manifest.files.keys()):
        if name not in found:
            raise IntegrityError("is missing from the bundle", where=name)
        if name not in manifest.files:
            raise IntegrityError("is not listed in the bundle's manifest", where=name)
        if found[name] != manifest.files[name]:
            raise IntegrityError("differs from the digest in the bundle's manifest", where=name)
    return manifest


def read_system(folder: Path) -> str | None:
    """The default system prompt that a bundle brings, if any."""
    path = folder / PROMPT
    if not path.is_file():
        return None
    try:
        system = json.loads(path.read_text())["system"]
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"not a prompt file: {error!r}", where=str(path)) from error
    return str(system) if system is not None else None
