"""Making a base of parts that the user names: any decoder of transformers, any picture tower of open_clip."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from okavango.modalities.base import Base, DefaultHead, EncoderSpec, read_base
from okavango.modalities.build import DecoderShape, building, default_tokens, write_description, write_head
from okavango.modalities.decoders import check_decoder, find_decoder
from okavango.modalities.gguf import convert_gguf
from okavango.modalities.report import Report, silent
from okavango.modalities.tower import import_tower, measure_tower
from okavango.platform.errors import ConfigError

HEAD_HIDDEN = 1024


@dataclass(frozen=True)
class Recipe:
    """What a base is made of.

    Attributes:
        decoder: a Hugging Face directory or id, or a .gguf file.
        image_encoder: an open_clip name, hf-hub:ID, or local-dir:PATH; None for a base that reads text only.
        image_weights: a tag or a file of weights; for open_clip names only.
        image_tokens: decoder tokens a picture; None takes the largest square up to 16 that fits the tower.
        head_hidden: hidden width of the projection head; None takes 1024.
        copy: copy a decoder's directory instead of pointing to it.
    """

    decoder: str
    image_encoder: str | None = None
    image_weights: str | None = None
    image_tokens: int | None = None
    head_hidden: int | None = None
    copy: bool = False

    def __post_init__(self) -> None:
        if self.image_encoder is None:
            for name in ("image_weights", "image_tokens", "head_hidden"):
                if getattr(self, name) is not None:
                    raise ConfigError("means nothing without an image encoder", where=name)
        for name in ("image_tokens", "head_hidden"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError("must be 1 or more", where=name)


def add_base(bases: Path, name: str, recipe: Recipe, *, force: bool = False, report: Report = silent) -> Base:
    """Write the base `name` below `bases`.

    Raises:
        NotFoundError: the decoder is neither a directory, a file nor on the hub.
        ConfigError: the decoder lacks weights, tokenizer or chat template; the encoder or its weights are
            unknown; the number of tokens does not tile the encoder's features.
        BindError: the decoder's weights are incomplete.
        UnsupportedError: transformers or open_clip have the part, but not in a form that can be used.
        ConflictError: the name is taken, and `force` is not set.
    """
    with building(bases, name, force=force) as draft:
        found = find_decoder(recipe.decoder)
        with report(f"Decoder {recipe.decoder}", None):
            decoder, shape = _decoder(draft, found, copy=recipe.copy)
        encoders, heads = _image(draft, shape, recipe, report)
        with report("Digests", None):
            write_description(draft, name, decoder, shape.context, encoders, heads)
    return read_base(bases / name)


def _decoder(draft: Path, found: Path, *, copy: bool) -> tuple[Path, DecoderShape]:
    own = draft / "decoder"
    if found.is_file():
        return own, convert_gguf(found, own)
    shape = check_decoder(found)
    if not copy:
        return found, shape
    shutil.copytree(found, own)
    return own, shape


def _image(
    draft: Path, shape: DecoderShape, recipe: Recipe, report: Report
) -> tuple[dict[str, EncoderSpec], dict[str, DefaultHead]]:
    if recipe.image_encoder is None:
        return {}, {}
    with report(f"Image encoder {recipe.image_encoder}", None):
        tower = draft / "encoders" / "image"
        import_tower(tower, recipe.image_encoder, recipe.image_weights)
        encoder = measure_tower(tower)
    tokens = recipe.image_tokens or default_tokens(encoder.grid)
    path = draft / "projectors" / "image.safetensors"
    head = write_head(path, encoder, shape, tokens, recipe.head_hidden or HEAD_HIDDEN)
    return {"image": encoder}, {"image": head}
