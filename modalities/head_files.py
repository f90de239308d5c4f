"""Projection heads in a bundle: projectors/<modality>.safetensors, and the spec beside it as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from okavango.modalities.projector import HeadSpec, ProjectionHead, bind_head
from okavango.platform.bundle import Manifest
from okavango.platform.errors import BindError

FOLDER = "projectors"


def write_head(folder: Path, modality: str, head: ProjectionHead) -> None:
    """Write a bundle's own head."""
    (folder / FOLDER).mkdir(exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / FOLDER / f"{modality}.safetensors")
    described = json.dumps(head.spec.to_json(), sort_keys=True)
    (folder / FOLDER / f"{modality}.json").write_text(described + "\n")


def head_specs(folder: Path, manifest: Manifest) -> dict[str, HeadSpec]:
    """Shapes of the heads that a bundle brings, by modality.

    Raises:
        BindError: one is not described as it should be.
    """
    return {modality: head_spec(folder, modality) for modality in manifest.head_modalities}


def head_spec(folder: Path, modality: str) -> HeadSpec:
    """The shape of one head. Raises BindError where it is not described as it should be."""
    path = folder / FOLDER / f"{modality}.json"
    try:
        return HeadSpec(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise BindError(f"not a projection head: {error}", where=f"{FOLDER}/{modality}") from error


def read_head(folder: Path, modality: str) -> ProjectionHead:
    """What write_head wrote.

    Raises:
        BindError: it is missing, torn, or not of its spec's shape.
    """
    spec, where = head_spec(folder, modality), f"{FOLDER}/{modality}"
    try:  # pread: why, says modalities/peft_files.py
        tensors = load_file(folder / FOLDER / f"{modality}.safetensors", backend="pread")
    except (OSError, SafetensorError) as error:
        raise BindError(f"not a projection head: {error}", where=where) from error
    return bind_head(spec, tensors, where=where)
