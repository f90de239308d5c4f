"""Pictures as a pretrained vision-language model sees them: its own processor, tower and connector.

What comes out are embeddings of the decoder that the model was trained with, so an identity head follows.

    config.json, model.safetensors      transformers' model without its language model's layers
    processor_config.json, tokenizer…   its processor: how a picture is cut, and what stands around the pieces

Served are families whose pictures are embeddings like any others to the decoder. modalities/checkpoint.py
makes the folder, and says of the others what stands in the way.
"""

# Shapes: T tiles of a picture, H, W their pixels, N positions, D decoder width

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from okavango.modalities.content import Limits
from okavango.modalities.image import UNUSABLE, upright_size
from okavango.modalities.prompt import Layout
from okavango.platform.errors import ConfigError, MediaError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn
    from transformers import PreTrainedModel, ProcessorMixin

    from okavango.modalities.base import EncoderSpec

KIND = "transformers"
LANGUAGE_MODELS = ("language_model", "text_model")
# Their towers look at pixels or sizes to know what to do, and call every layer that they have.
_LOOKING = ("idefics3", "smolvlm")
_MEASURING = ("qwen2_vl", "qwen2_5_vl")
# A tokenizer cannot be used by two threads while one of them changes its settings, as processors do.
_PROCESSING = Lock()


class VisionLanguageEncoder:
    """See modalities.encoders.Encoder. `module` has names as transformers gives them."""

    def __init__(self, spec: EncoderSpec, module: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.spec = spec
        self.module: nn.Module = module
        self._model: Any = module
        self._processor = processor

    @classmethod
    def load(
        cls, spec: EncoderSpec, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> VisionLanguageEncoder:
        """The encoder that lies at `spec.path`; `dtype` is float32 by default.

        Raises:
            ConfigError: the folder is not what write_encoder writes.
        """
        module = load_module(spec.path)
        module.to(device=device, dtype=dtype)  # type: ignore[call-arg]  # the decorated stub has lost self
        return cls(spec, module, load_processor(spec.path))

    @staticmethod
    def skeleton(spec: EncoderSpec) -> tuple[nn.Module, Callable[[], object]]:
        """See modalities.encoders.Encoder."""
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(spec.path, local_files_only=True)
        with torch.device("meta"):
            module = AutoModel.from_config(config).eval()
            side = getattr(config.vision_config, "image_size", 1)
            pixels = torch.zeros(1, 3, *_side(side))
        _forget_language(module)
        if config.model_type in (*_LOOKING, *_MEASURING):
            return module, partial(_call_all, module)
        return module, lambda: module.get_image_features(pixel_values=pixels)

    @staticmethod
    def layout(spec: EncoderSpec, data: bytes, limits: Limits) -> Layout:
        """What the processor puts in a picture's place, by the size in its header."""
        assert spec.mark is not None
        return expansion(spec.path, spec.mark, upright_size(data, limits))

    def prepare(self, decoded: Image.Image) -> Tensor:
        """An RGB picture as the tower takes it, in float32: tiles [T, 3, H, W], or a row a patch, after a row
        that begins with the grid's height and width."""
        assert self.spec.mark is not None
        made = _processed(self._processor, self.spec.mark, decoded)
        pixels: Tensor = made["pixel_values"].float()
        if "image_grid_thw" not in made:
            return pixels.flatten(0, -4)
        head = pixels.new_zeros(1, pixels.shape[1])
        head[0, :2] = made["image_grid_thw"][0, 1:]
        return torch.cat([head, pixels])

    def features(self, prepared: Sequence[Tensor]) -> list[Tensor]:
        """Tiles [T, 3, H, W] of each picture → embeddings [N, D] of each, one picture after the other."""
        found = []
        for pixels in prepared:
            parameter = next(self.module.parameters())
            pixels = pixels.to(parameter)
            made = self._model.get_image_features(**self._inputs(pixels), return_dict=True).pooler_output
            found.append(torch.cat([each.flatten(0, -2) for each in made]))
        return found

    def _inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        family = self._model.config.model_type
        if family in _MEASURING:
            grid = torch.tensor([[1, *pixels[0, :2].long().tolist()]], device=pixels.device)
            return {"pixel_values": pixels[1:], "image_grid_thw": grid}
        return {"pixel_values": pixels[None] if family in _LOOKING else pixels}


def load_module(folder: Path) -> PreTrainedModel:
    """Tower and connector in float32, on the CPU.

    Raises:
        ConfigError: the folder holds something else.
    """
    from transformers import AutoModel

    try:
        module = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except UNUSABLE as error:
        raise ConfigError(f"not a vision-language encoder: {error}", where=str(folder)) from error
    _forget_language(module)
    return module.eval().requires_grad_(False)


@lru_cache(maxsize=4)
def load_processor(folder: Path) -> ProcessorMixin:
    """The processor that lies beside an encoder; the same one again for the same folder.

    Raises:
        ConfigError: there is none, or a package that it wants is missing.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (*UNUSABLE, ImportError) as error:
        raise ConfigError(f"its processor cannot be loaded: {error}", where=str(folder)) from error


@lru_cache(maxsize=1024)
def expansion(folder: Path, mark: str, size: tuple[int, int]) -> Layout:
    """What the processor makes of a mark for a picture of that width and height: texts, and numbers of
    positions."""
    from PIL import Image
    from transformers import AutoConfig

    processor = load_processor(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    place, made = config.image_token_id, _processed(processor, mark, Image.new("RGB", size))
    tokens = made["input_ids"][0].tolist()
    found: list[str | int | tuple[int, int]] = []
    start = 0
    for end in range(1, len(tokens) + 1):
        if end < len(tokens) and (tokens[end] == place) == (tokens[start] == place):
            continue
        if tokens[start] == place and "image_grid_thw" in made:
            _, rows, columns = made["image_grid_thw"][0].tolist()
            merged = config.vision_config.spatial_merge_size
            found.append((rows // merged, columns // merged))
        elif tokens[start] == place:
            found.append(end - start)
        else:
            found.append(str(_decode(processor, tokens[start:end])))
        start = end
    return tuple(found)


def _processed(processor: Any, mark: str, picture: Image.Image) -> dict[str, Any]:
    options = {"return_tensors": "pt", "add_special_tokens": False}
    try:
        with _PROCESSING:
            made: dict[str, Any] = processor(text=[mark], images=[picture], **options)
    except UNUSABLE as error:
        size = " × ".join(map(str, picture.size))
        raise MediaError(f"the base's processor takes no picture of {size} pixels: {error}") from error
    return made


def _decode(processor: Any, tokens: Sequence[int]) -> str:
    with _PROCESSING:
        text: str = processor.tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    return text


def _forget_language(module: nn.Module) -> None:
    for name in LANGUAGE_MODELS:
        if hasattr(module, name):
            delattr(module, name)


def _call_all(module: nn.Module) -> None:
    from torch import nn

    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer(torch.zeros(1, layer.in_features, device="meta"))


def _side(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
