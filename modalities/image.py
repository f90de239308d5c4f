"""Pictures: bytes → an upright RGB picture → an encoder's features.

Decoding is strict about what it accepts, since the bytes come from strangers: sizes are checked before
anything is decompressed. Encoding is open_clip's, from a local directory. Libraries are imported only when
they are used: the engine serves text without Pillow and open_clip, and decoding needs no torch.
"""

# Shapes: B pictures or tiles of them, H rows and W columns of the feature map, N positions, C encoder width

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from math import log
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from okavango.modalities.content import Limits
from okavango.platform.errors import ConfigError, MediaError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from PIL import Image
    from torch import Tensor, nn

    from okavango.modalities.base import EncoderSpec

CONFIG_FILE = "open_clip_config.json"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# An encoder that resizes the shorter side would blow a long sliver up to gigapixels.
MAX_ASPECT = 100
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that lay a picture on its side
# What model libraries raise on files that are missing, torn, or of something else.
UNUSABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


def decode_image(data: bytes, limits: Limits | None = None) -> Image.Image:
    """The picture in `data` as RGB: upright by its EXIF orientation, on white where it is transparent, the
    first frame where it moves.

    Raises:
        MediaError: empty, over a limit, of another format, truncated or damaged.
    """
    limits = limits or Limits()
    if not data:
        raise MediaError("the picture is empty (0 bytes)")
    if len(data) > limits.media_bytes:
        raise MediaError(
            f"the picture has {len(data):,} bytes, over the limit of {limits.media_bytes:,}",
            remedy="send a smaller or more strongly compressed one",
        )
    picture = _open(data)
    _check_size(picture.size, limits)
    try:
        picture.load()
        return _rgb(_upright(picture))
    # Pillow's decoders raise nearly anything on damaged bytes: OSError, SyntaxError, struct.error, …
    except Exception as error:
        raise MediaError(f"the {picture.format} picture is truncated or damaged: {error}") from error


class ImageEncoder:
    """A frozen open_clip vision tower with its own preprocessing: see modalities.encoders.Encoder."""

    def __init__(
        self, spec: EncoderSpec, visual: nn.Module, preprocess: Callable[[Image.Image], Tensor]
    ) -> None:
        self.spec = spec
        self.module = visual
        self._preprocess = preprocess

    @classmethod
    def load(cls, spec: EncoderSpec, dtype: torch.dtype | None = None, device: str = "cpu") -> ImageEncoder:
        """The tower that lies at `spec.path`, at `spec.image_size` pixels; `dtype` is float32 by default.

        Raises:
            ConfigError: the folder is no open_clip directory, or its weights do not fit its config.
        """
        visual, preprocess = load_tower(spec.path, spec.image_size)
        return cls(spec, visual.to(device=device, dtype=dtype), preprocess)

    @staticmethod
    def skeleton(spec: EncoderSpec) -> tuple[nn.Module, Callable[[], object]]:
        """See modalities.encoders.Encoder."""
        import open_clip
        import torch

        with usable(spec.path), torch.device("meta"):
            config = json.loads((spec.path / CONFIG_FILE).read_text())["model_cfg"]
            visual = open_clip.CLIP(**config).visual.eval()
            size = visual.image_size
            pixels = torch.zeros(1, 3, *(size if isinstance(size, tuple) else (size, size)))
        return visual, lambda: feature_maps(visual, pixels, spec.layers)

    @staticmethod
    def layout(spec: EncoderSpec, data: bytes, limits: Limits) -> tuple[int]:
        """The positions of a picture and its tiles. Raises MediaError where its header cannot be read."""
        positions = spec.grid[0] * spec.grid[1]
        if spec.tiles == 1:
            return (positions,)
        rows, columns = tiling(upright_size(data, limits), spec.image_size, spec.tiles)
        return (positions * (1 if rows * columns == 1 else 1 + rows * columns),)

    def prepare(self, decoded: Image.Image) -> Tensor:
        """An RGB picture and its tiles as the tower takes them: [B, 3, side, side], float32."""
        import torch

        return torch.stack([self._preprocess(piece) for piece in self._pieces(decoded)])

    def features(self, prepared: Sequence[Tensor]) -> list[Tensor]:
        """Features [N, C] of each: row by row of the map of the whole picture, then of its tiles.

        Raises:
            ConfigError: they are not as the base says.
        """
        import torch

        at = next(self.module.parameters())
        pixels = torch.cat(list(prepared)).to(at.device, at.dtype)
        maps = feature_maps(self.module, pixels, self.spec.layers)
        found = (*maps.shape[2:], maps.shape[1])
        if found != (*self.spec.grid, self.spec.width):
            raise ConfigError(
                f"features are {found[0]} × {found[1]} × {found[2]}, not grid and width of base.toml",
                where=str(self.spec.path),
            )
        rows = maps.flatten(2).transpose(1, 2)
        return [part.flatten(0, 1) for part in rows.split([len(pieces) for pieces in prepared])]

    def _pieces(self, image: Image.Image) -> list[Image.Image]:
        return cut(image, *tiling(image.size, self.spec.image_size, self.spec.tiles))


def tiling(size: tuple[int, int], side: int, most: int) -> tuple[int, int]:
    """Rows and columns that a picture of that width and height is cut into, `most` tiles at most: as nearly
    square as can be (as InternVL, Chen et al. 2024), and a small picture whole."""
    width, height = size
    choices = [
        (rows, columns)
        for rows in range(1, min(most, -(-height // side)) + 1)
        for columns in range(1, min(most // rows, -(-width // side)) + 1)
    ]
    return min(
        choices,
        key=lambda cut: (round(abs(log(width * cut[0] / (height * cut[1]))), 6), -cut[0] * cut[1]),
        default=(1, 1),
    )


def cut(image: Image.Image, rows: int, columns: int) -> list[Image.Image]:
    """The whole picture, then its tiles row by row; only the whole where it is one tile."""
    if rows * columns == 1:
        return [image]
    across = [round(image.width * i / columns) for i in range(columns + 1)]
    down = [round(image.height * i / rows) for i in range(rows + 1)]
    tiles = [
        image.crop((across[column], down[row], across[column + 1], down[row + 1]))
        for row in range(rows)
        for column in range(columns)
    ]
    return [image, *tiles]


def upright_size(data: bytes, limits: Limits) -> tuple[int, int]:
    """Width and height of what decode_image gives, by the header alone. Raises MediaError."""
    picture = _open(data)
    _check_size(picture.size, limits)
    orientation = 1
    with suppress(Exception):  # as in _upright
        orientation = picture.getexif().get(_ORIENTATION, 1)
    width, height = picture.size
    return (height, width) if orientation in _TURNED else (width, height)


def load_tower(folder: Path, image_size: int) -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    """A frozen vision tower in float32 and its preprocessing, from an open_clip directory.

    Raises:
        ConfigError: the folder is no open_clip directory, or its weights do not fit its config.
    """
    import open_clip
    import torch

    # open_clip draws random weights before it loads; a job's random state must not depend on that.
    with usable(folder), torch.random.fork_rng(devices=[]):
        # A forced size makes timm towers and plain ViTs alike resample their position embedding.
        model, preprocess = open_clip.create_model_from_pretrained(
            f"local-dir:{folder}", force_image_size=image_size
        )
    return model.visual.eval().requires_grad_(False), preprocess


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Raises ConfigError for what goes wrong when an open_clip directory is loaded."""
    try:
        yield
    except UNUSABLE as error:
        raise ConfigError(f"not a usable open_clip model: {error}", where=str(folder)) from error


def feature_maps(visual: nn.Module, pixels: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Features [B, C, H, W] of an open_clip tower's blocks, joined, through the final norm where it fits.

    With attention pooling the final norm belongs to the pooled vector, not to the patches.

    Raises:
        ConfigError: the tower has no such block, or the blocks' feature maps differ in size.
    """
    import torch

    try:
        output = visual.forward_intermediates(  # type: ignore[operator]
            pixels,
            indices=list(layers),
            normalize_intermediates=getattr(visual, "attn_pool", None) is None,
            intermediates_only=True,
        )
        return torch.cat(output["image_intermediates"], dim=1)
    except (AssertionError, IndexError, RuntimeError) as error:
        raise ConfigError(f"the encoder's blocks {list(layers)} cannot be joined: {error}") from error


def _open(data: bytes) -> Image.Image:
    """Reads the header only."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"the picture has too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise MediaError(
            "not a PNG, JPEG, WebP, GIF or BMP picture, or one whose header is damaged"
        ) from error
    except Exception as error:
        raise MediaError(f"the picture's header is damaged: {error}") from error


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"the picture is {width} × {height} pixels")
    if width * height > limits.image_pixels:
        raise MediaError(
            f"the picture is {width:,} × {height:,} pixels, over the limit of {limits.image_pixels:,}",
            remedy="send a smaller one",
        )
    if max(size) > MAX_ASPECT * min(size):
        raise MediaError(
            f"the picture is {width:,} × {height:,} pixels, a sliver longer than {MAX_ASPECT}:1",
            remedy="cut it into pieces",
        )


def _upright(picture: Image.Image) -> Image.Image:
    from PIL import ImageOps

    # Damaged EXIF leaves the pixels intact, and every viewer shows such a picture as it lies.
    with suppress(Exception):
        return ImageOps.exif_transpose(picture)
    return picture


def _rgb(picture: Image.Image) -> Image.Image:
    from PIL import Image

    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip to white
        import numpy as np

        grey = np.asarray(picture).astype(np.float32) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
