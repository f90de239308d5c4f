"""Default heads that were trained: taken from a bundle of heads alone, or from one file that comes along.

    <modality>.<tensor>     in such a file: each head's weights in float16, half the size and far below what
                            training moved
    embedding.<tensor>      the space that was trained with them, if one was
    metadata                JSON: specs, the components that the heads were trained beside, scores

The starter base's own lie beside this module; docs/bases.md has the commands that made them.
"""

# A head is one of modalities.projector, a space one of modalities.embedding.

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from okavango.modalities.base import (
    Base,
    DefaultEmbedding,
    DefaultHead,
    embedding_digest,
    head_digest,
    read_base,
)
from okavango.modalities.build import building, write_description
from okavango.modalities.embedding import EmbeddingHead, bind_embedding, read_embedding, write_embedding
from okavango.modalities.head_files import read_head, write_head
from okavango.modalities.projector import HeadSpec, ProjectionHead, bind_head
from okavango.platform.bundle import EMBEDDING, Manifest, verify
from okavango.platform.errors import BindError, ConflictError, IntegrityError

if TYPE_CHECKING:
    from torch import Tensor

STARTER_HEADS = Path(__file__).with_name("starter_heads.safetensors")


@dataclass(frozen=True)
class AlignedHeads:
    """`components`: digests of the decoder and the encoders that they were trained beside. `scores`: by name,
    on what was held out."""

    heads: Mapping[str, ProjectionHead]
    components: Mapping[str, str]
    scores: Mapping[str, float] = field(default_factory=dict)
    embedding: EmbeddingHead | None = None

    def fits(self, components: Mapping[str, str]) -> bool:
        return all(components.get(name) == digest for name, digest in self.components.items())


def heads_of_bundle(folder: Path) -> AlignedHeads:
    """The heads of a sealed bundle that brings nothing else.

    Raises:
        ConflictError: it adapts the decoder or an encoder, without which its heads are not what they were.
        IntegrityError: it is altered, or has no heads.
    """
    manifest = verify(folder)
    if adapted := _adapted(manifest):
        raise ConflictError(
            f"it adapts {adapted} besides heads, and they belong together",
            where=str(folder),
            remedy="train heads alone: okavango train --no-lora",
        )
    heads = {modality: read_head(folder, modality) for modality in manifest.head_modalities}
    if not heads:
        raise IntegrityError("the bundle has no projection heads", where=str(folder))
    width = next(iter(heads.values())).spec.out_width
    parts = {"decoder", *(f"encoders.{modality}" for modality in heads)}
    components = {name: digest for name, digest in manifest.components.items() if name in parts}
    return AlignedHeads(heads, components, manifest.metrics, read_embedding(folder, width))


def take_over(folder: Path, aligned: AlignedHeads) -> tuple[dict[str, DefaultHead], DefaultEmbedding | None]:
    """Write heads and space into a base's folder."""
    heads = {}
    for modality, head in aligned.heads.items():
        write_head(folder, modality, head)
        path = folder / "projectors" / f"{modality}.safetensors"
        path.with_suffix(".json").unlink()  # base.toml says it
        heads[modality] = DefaultHead(path, head_digest(path, head.spec), head.spec, trained=True)
    if aligned.embedding is None:
        return heads, None
    write_embedding(folder, aligned.embedding)
    return heads, DefaultEmbedding(folder / EMBEDDING, embedding_digest(folder / EMBEDDING))


def base_with(bases: Path, name: str, base: Base, aligned: AlignedHeads, *, force: bool = False) -> Base:
    """A new base below `bases`: the decoder and encoders of another, which it points to, and these heads.

    Raises:
        BindError: they were trained beside other parts.
        ConflictError: the name is taken, and `force` is not set.
    """
    if not aligned.fits(base.components):
        raise BindError("the heads were trained beside other parts than this base's", where=base.name)
    with building(bases, name, force=force) as draft:
        heads, embedding = take_over(draft, aligned)
        write_description(
            draft,
            name,
            base.decoder.path,
            base.decoder.context,
            base.encoders,
            {**base.heads, **heads},
            embedding=embedding,
        )
    return read_base(bases / name)


def write_heads(path: Path, aligned: AlignedHeads) -> None:
    """Write the one file."""
    import torch
    from safetensors.torch import save_file

    modules: dict[str, Any] = dict(aligned.heads)
    described: dict[str, Any] = {
        "specs": {modality: head.spec.to_json() for modality, head in aligned.heads.items()},
        "components": dict(aligned.components),
        "scores": dict(aligned.scores),
    }
    if aligned.embedding is not None:
        modules["embedding"] = aligned.embedding
        described["embedding"] = asdict(aligned.embedding.spec)
    tensors = {
        f"{part}.{name}": tensor.detach().to("cpu", torch.float16).contiguous()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    save_file(tensors, path, metadata={"heads": json.dumps(described, sort_keys=True)})


def read_heads(path: Path) -> AlignedHeads:
    """What write_heads wrote.

    Raises:
        IntegrityError: the file is not of that form.
        BindError: weights are not those of their spec.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            described: dict[str, Any] = json.loads(file.metadata()["heads"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        specs = {modality: HeadSpec(**spec) for modality, spec in described["specs"].items()}
        space = described.get("embedding")
        components, scores = described["components"], described["scores"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"not a file of heads: {error!r}", where=str(path)) from error
    heads = {
        modality: bind_head(spec, _own(tensors, modality), where=f"{path.name}: {modality}")
        for modality, spec in specs.items()
    }
    if space is None:
        return AlignedHeads(heads, components, scores)
    embedding = bind_embedding(space, _own(tensors, "embedding"), where=f"{path.name}: embedding")
    return AlignedHeads(heads, components, scores, embedding)


def _own(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _adapted(manifest: Manifest) -> str:
    decoder = any(name.startswith("decoder/") for name in manifest.files)
    encoders = [f"the {modality} encoder" for modality in manifest.encoder_modalities]
    return " and ".join([*(["the decoder"] if decoder else []), *encoders])
