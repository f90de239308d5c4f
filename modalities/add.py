"""Making a base of parts that the user names: any decoder of transformers, any picture tower of open_clip,
any Whisper-style encoder of sounds."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from okavango.modalities.base import Base, DefaultHead, EncoderSpec, read_base
from okavango.modalities.build import DecoderShape, building, default_tokens, write_description, write_head
from okavango.modalities.decoders import check_decoder, find_decoder
from okavango.modalities.gguf import convert_gguf
from okavango.modalities.projector import HeadSpec, Kind, Pooling
from okavango.modalities.report import Report, silent
from okavango.modalities.tower import import_tower, measure_tower
from okavango.platform.errors import ConfigError

HEAD_HIDDEN = 1024
AUDIO_STRIDE = 5
_OF_IMAGES = ("image_weights", "image_tokens", "image_tiles", "image_layers")
_OF_SOUNDS = ("audio_stride",)
_OF_HEADS = ("head_kind", "head_pooling", "head_hidden")


@dataclass(frozen=True)
class Recipe:
    """What a base is made of.

    Attributes:
        decoder: a Hugging Face directory or id, or a .gguf file.
        image_encoder: an open_clip name, hf-hub:ID, or local-dir:PATH; None for a base that sees nothing.
        image_weights: a tag or a file of weights; for open_clip names only.
        image_tokens: decoder tokens a picture or tile; None takes the largest square up to 16 that fits.
        image_tiles: most tiles that a large picture is cut into beside the whole; None cuts none.
        image_layers: blocks of the tower whose features are joined, from the end; None takes the last.
        audio_encoder: a Hugging Face directory or id of a Whisper-style model; None for none.
        audio_stride: positions of 20 ms that make a decoder token; None takes 5.
        head_kind, head_pooling, head_hidden: of all heads, as modalities.projector has them; None takes an
            mlp, the mean for pictures and stacking for sounds, and 1024.
        copy: copy a decoder's directory instead of pointing to it.
    """

    decoder: str
    image_encoder: str | None = None
    image_weights: str | None = None
    image_tokens: int | None = None
    head_hidden: int | None = None
    copy: bool = False
    image_tiles: int | None = None
    image_layers: tuple[int, ...] | None = None
    audio_encoder: str | None = None
    audio_stride: int | None = None
    head_kind: Kind | None = None
    head_pooling: Pooling | None = None

    def __post_init__(self) -> None:
        self._refuse(_OF_IMAGES, "an image encoder", unless=self.image_encoder)
        self._refuse(_OF_SOUNDS, "an audio encoder", unless=self.audio_encoder)
        self._refuse(_OF_HEADS, "an encoder", unless=self.image_encoder or self.audio_encoder)
        if self.head_kind == "identity":
            raise ConfigError("belongs to pretrained connectors; choose another", where="head_kind")
        for name in ("image_tokens", "image_tiles", "audio_stride", "head_hidden"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError("must be 1 or more", where=name)

    def _refuse(self, names: tuple[str, ...], what: str, *, unless: str | None) -> None:
        for name in names:
            if unless is None and getattr(self, name) is not None:
                raise ConfigError(f"means nothing without {what}", where=name)

    def head(self, encoder: EncoderSpec, shape: DecoderShape) -> HeadSpec:
        """Raises ConfigError where the tokens do not tile the encoder's features."""
        kind, hidden = self.head_kind or "mlp", self.head_hidden or HEAD_HIDDEN
        if encoder.image_size:
            tokens, stride = self.image_tokens or default_tokens(encoder.grid), 0
        else:
            stride = self.audio_stride or AUDIO_STRIDE
            tokens = -(-encoder.grid[1] // stride)
        pooling = self.head_pooling or ("stack" if stride else "mean")
        return HeadSpec(encoder.width, shape.width, encoder.grid, tokens, hidden, kind, pooling, stride)


def add_base(bases: Path, name: str, recipe: Recipe, *, force: bool = False, report: Report = silent) -> Base:
    """Write the base `name` below `bases`.

    Raises:
        NotFoundError: a part is neither a directory, a file nor on the hub.
        ConfigError: the decoder lacks weights, tokenizer or chat template; an encoder or its weights are
            unknown; the number of tokens does not tile the encoder's features.
        BindError: the decoder's weights are incomplete.
        UnsupportedError: transformers or open_clip have the part, but not in a form that can be used.
        ConflictError: the name is taken, and `force` is not set.
    """
    with building(bases, name, force=force) as draft:
        found = find_decoder(recipe.decoder)
        with report(f"Decoder {recipe.decoder}", None):
            decoder, shape = _decoder(draft, found, copy=recipe.copy)
        encoders = _encoders(draft, recipe, report)
        heads = {
            modality: _head(draft, modality, recipe.head(encoder, shape), shape)
            for modality, encoder in encoders.items()
        }
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


def _encoders(draft: Path, recipe: Recipe, report: Report) -> dict[str, EncoderSpec]:
    encoders: dict[str, EncoderSpec] = {}
    if recipe.image_encoder is not None:
        with report(f"Image encoder {recipe.image_encoder}", None):
            tower = draft / "encoders" / "image"
            import_tower(tower, recipe.image_encoder, recipe.image_weights)
            encoders["image"] = measure_tower(tower, recipe.image_layers or (-1,), recipe.image_tiles or 1)
    if recipe.audio_encoder is not None:
        from okavango.modalities.whisper import import_whisper, measure_whisper

        with report(f"Audio encoder {recipe.audio_encoder}", None):
            folder = draft / "encoders" / "audio"
            import_whisper(folder, recipe.audio_encoder)
            encoders["audio"] = measure_whisper(folder)
    return encoders


def _head(draft: Path, modality: str, spec: HeadSpec, shape: DecoderShape) -> DefaultHead:
    return write_head(draft / "projectors" / f"{modality}.safetensors", spec, shape)
