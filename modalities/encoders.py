"""Encoders by kind: what turns media into features, how many, and what stands around them in a prompt.

A kind is a class, named here or by a package's entry point in the group `okavango.encoders`. It is imported
when it is first asked for: text needs none of them. Decoding is the modality's matter: every encoder of
pictures gets upright RGB pictures (modalities/image.py), every one of sounds 16 kHz samples (sound.py).
"""

# Shapes: N positions of a medium, C encoder width

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol

from okavango.modalities.content import Limits, Media, Modality
from okavango.modalities.prompt import Layout, Renderer
from okavango.platform.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from okavango.modalities.base import Base, EncoderSpec
    from okavango.modalities.projector import HeadSpec

GROUP = "okavango.encoders"
_KINDS = {
    "open_clip": "okavango.modalities.image:ImageEncoder",
    "whisper": "okavango.modalities.audio:AudioEncoder",
    "transformers": "okavango.modalities.vision_language:VisionLanguageEncoder",
}
_DECODED_BY = {
    "image": "okavango.modalities.image:decode_image",
    "audio": "okavango.modalities.sound:decode_sound",
}


class Encoder(Protocol):
    """A frozen encoder that is loaded.

    Attributes:
        spec: what it was loaded from.
        module: what LoRA may adapt.
    """

    spec: EncoderSpec
    module: nn.Module

    @classmethod
    def load(cls, spec: EncoderSpec, dtype: torch.dtype | None = None, device: str = "cpu") -> Encoder:
        """The encoder that lies at `spec.path`; `dtype` is float32 by default."""

    @staticmethod
    def skeleton(spec: EncoderSpec) -> tuple[nn.Module, Callable[[], object]]:
        """`module` without its weights, on torch's meta device, and what runs it as `features` does."""

    @staticmethod
    def layout(spec: EncoderSpec, data: bytes, limits: Limits) -> Layout:
        """Texts, and counts of positions, that stand for a medium; by its header where that tells enough."""

    def prepare(self, decoded: Any) -> Tensor:
        """A decoded medium as the encoder takes it, in float32 on the CPU."""

    def features(self, prepared: Sequence[Tensor]) -> list[Tensor]:
        """What `prepare` gave → features [N, C] each, where and in what precision the encoder computes. A
        gradient flows where one is asked for."""


def decode(medium: Media, limits: Limits | None = None) -> Any:
    """A picture as RGB, or a sound as samples.

    Raises:
        MediaError: it is not accepted, or damaged.
    """
    return resolve_name(_DECODED_BY[medium.modality])(medium.data, limits or Limits())


def check_medium(data: bytes, modality: Modality, limits: Limits) -> None:
    """Raises MediaError unless a medium can be decoded."""
    decode(Media(modality, data), limits)


def load_encoder(spec: EncoderSpec, dtype: torch.dtype | None = None, device: str = "cpu") -> Encoder:
    """The encoder of a base.

    Raises:
        ConfigError: nothing here serves its kind, or its folder is not of that kind.
    """
    return _kind(spec).load(spec, dtype, device)


def skeleton(spec: EncoderSpec) -> tuple[nn.Module, Callable[[], object]]:
    """An encoder's module without its weights, to look at names and shapes, and what runs it."""
    return _kind(spec).skeleton(spec)


def encode(encoder: Encoder, decoded: Sequence[Any]) -> list[Tensor]:
    """Decoded media → features [N, C] each, float32 on the CPU."""
    import torch

    # Not inference_mode: its tensors could not be saved for the backward pass of a projection head.
    with torch.no_grad():
        found = encoder.features([encoder.prepare(medium) for medium in decoded]) if decoded else []
    return [features.float().cpu().contiguous() for features in found]


class Layouts:
    """What stands for media of one base in a prompt: positions of its encoders, through heads.

    Args:
        heads: by modality; those that an adapter brings in place of the base's.
    """

    def __init__(
        self,
        encoders: Mapping[str, EncoderSpec],
        heads: Mapping[str, HeadSpec],
        limits: Limits | None = None,
    ) -> None:
        self._encoders = encoders
        self._heads = heads
        self._limits = limits or Limits()

    def of(self, medium: Media) -> Layout | None:
        spec, head = self._encoders.get(medium.modality), self._heads.get(medium.modality)
        if spec is None or head is None:
            return None
        layout = _kind(spec).layout(spec, medium.data, self._limits)
        return tuple(piece if isinstance(piece, str) else _through(head, piece) for piece in layout)


def _through(head: HeadSpec, piece: int | tuple[int, int]) -> int | tuple[int, int]:
    """What a head makes of positions; a grid stays one only where they pass as they are."""
    if isinstance(piece, int):
        return head.tokens_of(piece)
    return piece if head.kind == "identity" else head.tokens_of(piece[0] * piece[1])


def make_renderer(
    base: Base, tokenizer: PreTrainedTokenizerBase, heads: Mapping[str, HeadSpec] | None = None
) -> Renderer:
    """What renders for a base; `heads` go before its default ones, by modality."""
    own = {name: head.spec for name, head in base.heads.items()}
    marks = {name: spec.mark for name, spec in base.encoders.items() if spec.mark is not None}
    looking_ahead = [name for name, spec in base.encoders.items() if spec.looks_ahead]
    layouts = Layouts(base.encoders, {**own, **(heads or {})})
    return Renderer(tokenizer, layouts, marks, looking_ahead)


def _kind(spec: EncoderSpec) -> type[Encoder]:
    if spec.kind in _KINDS:
        kind: type[Encoder] = resolve_name(_KINDS[spec.kind])
        return kind
    plugins = {found.name: found for found in entry_points(group=GROUP)}
    if spec.kind not in plugins:
        known = ", ".join([*_KINDS, *plugins])
        raise ConfigError(
            f"no encoder is of kind {spec.kind!r}; known: {known}",
            where=str(spec.path),
            remedy=f"install the package whose entry point in {GROUP} names it",
        )
    loaded: type[Encoder] = plugins[spec.kind].load()
    return loaded
