"""Writing a base: its components, base.toml, and the folder that appears when all are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import tomlkit

from okavango.modalities.base import (
    BASE_FILE,
    FORMAT,
    Base,
    DecoderSpec,
    DefaultEmbedding,
    DefaultHead,
    EncoderSpec,
    head_digest,
    read_base,
    tree_digest,
)
from okavango.modalities.draft import draft_folder
from okavango.modalities.projector import HeadSpec, new_head
from okavango.platform.errors import ConfigError, ConflictError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# The catalog's rule, too: a base's name is a model's name in requests.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class DecoderShape:
    """What a projection head and base.toml need to know of a decoder.

    Attributes:
        width: D.
        embedding_std: the standard deviation of its token embeddings.
        context: the most tokens that a sequence may have.
    """

    width: int
    embedding_std: float
    context: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> DecoderShape:
        embeddings = cast("Tensor", model.get_input_embeddings().weight)
        config = model.config.get_text_config()
        return cls(embeddings.shape[1], embeddings.float().std().item(), config.max_position_embeddings)


def write_head(path: Path, spec: HeadSpec, decoder: DecoderShape) -> DefaultHead:
    """A fresh, untrained projection head, the same for the same shapes."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(new_head(spec, decoder.embedding_std).state_dict(), path)
    return DefaultHead(path, head_digest(path, spec), spec, trained=False)


def default_tokens(grid: tuple[int, int], most: int = 16) -> int:
    """The largest square number up to `most` whose root divides both sides of the grid."""
    sides = [n for n in range(1, grid[0] + 1) if grid[0] % n == 0 == grid[1] % n and n * n <= most]
    return max(sides) ** 2


def write_description(
    folder: Path,
    name: str,
    decoder: Path,
    context: int,
    encoders: dict[str, EncoderSpec] | None = None,
    heads: dict[str, DefaultHead] | None = None,
    recipe: str | None = None,
    embedding: DefaultEmbedding | None = None,
) -> Base:
    """Write base.toml for components that lie in `folder`, or elsewhere by absolute path."""
    spec = DecoderSpec(decoder, tree_digest(decoder), context)
    base = Base(name, folder, spec, encoders or {}, heads or {}, recipe, embedding)
    document = tomlkit.document()
    document.add(
        tomlkit.comment("Written by okavango. Paths are relative to this file; digests bind adapters.")
    )
    document.update(_to_toml(base))
    (folder / BASE_FILE).write_text(tomlkit.dumps(document))
    return read_base(folder)


@contextmanager
def building(bases: Path, name: str, *, force: bool = False) -> Iterator[Path]:
    """An unseen folder that becomes <bases>/<name> if the block succeeds, and vanishes if it does not.

    Raises:
        ConfigError: the name cannot be a folder's.
        ConflictError: the name is taken, and `force` is not set.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a base", remedy="use 1 to 64 of a-z, 0-9, - _ and .")
    target = bases / name
    with draft_folder(bases, name) as draft:
        if target.exists() and not force:
            raise ConflictError(f"the base {name!r} exists", where=str(target), remedy="--force replaces it")
        made, retired = draft / "made", draft / "retired"
        made.mkdir()
        yield made
        for file in made.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors writes for its own user only
        if target.exists():
            target.rename(retired)
        made.rename(target)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and advice of transformers: the caller shows its own."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _to_toml(base: Base) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": base.name,
        **({"recipe": base.recipe} if base.recipe else {}),
        "decoder": {
            "path": _relative(base.decoder.path, base.folder),
            "digest": base.decoder.digest,
            "context": base.decoder.context,
        },
        "encoders": {name: _encoder(encoder, base.folder) for name, encoder in base.encoders.items()},
        "projectors": {name: _head(head, base.folder) for name, head in base.heads.items()},
        **({"embedding": _embedding(base.embedding, base.folder)} if base.embedding else {}),
    }


def _encoder(encoder: EncoderSpec, folder: Path) -> dict[str, Any]:
    return {
        "path": _relative(encoder.path, folder),
        "digest": encoder.digest,
        "image_size": encoder.image_size,
        "layers": list(encoder.layers),
        "width": encoder.width,
        "grid": list(encoder.grid),
        "kind": encoder.kind,
        "tiles": encoder.tiles,
        **({"mark": encoder.mark} if encoder.mark is not None else {}),
        **({"looks_ahead": True} if encoder.looks_ahead else {}),
    }


def _head(head: DefaultHead, folder: Path) -> dict[str, Any]:
    described = {"path": _relative(head.path, folder), "digest": head.digest, "trained": head.trained}
    return described | head.spec.to_json()


def _embedding(embedding: DefaultEmbedding, folder: Path) -> dict[str, Any]:
    return {"path": _relative(embedding.path, folder), "digest": embedding.digest}


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path.absolute())
