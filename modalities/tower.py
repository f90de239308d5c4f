"""Vision towers on disk: an open_clip local directory with the tower, its preprocessing, and a stub of text.

open_clip builds two towers and loads them strictly, but a base only sees. So the text tower is stored as a
tiny one: a large model's own would cost gigabytes of disk and load time, and often a tokenizer download.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from okavango.modalities.base import EncoderSpec, tree_digest
from okavango.modalities.image import feature_maps, load_tower
from okavango.platform.errors import BindError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_TEXT_STUB = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}


def write_tower(
    folder: Path,
    model_cfg: Mapping[str, Any],
    preprocess_cfg: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> None:
    """Write an open_clip directory that holds exactly these weights.

    Args:
        model_cfg: open_clip's, of which embed_dim, vision_cfg and quick_gelu are kept.
        preprocess_cfg: mean, std, interpolation and resize_mode.
        tensors: the tower's state; None leaves it random, the same for the same seed.

    Raises:
        BindError: a tensor is missing, left over, or of another shape.
    """
    import open_clip
    from safetensors.torch import save_file

    kept = {name: model_cfg[name] for name in ("embed_dim", "vision_cfg", "quick_gelu") if name in model_cfg}
    config = kept | {"text_cfg": _TEXT_STUB}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config)
    if tensors is not None:
        _bind(model.visual, tensors)
    # Zeros, so that the digest hangs on no generator's arithmetic: the text stub is never run.
    state = {
        name: tensor.contiguous() if name.startswith("visual.") else torch.zeros_like(tensor)
        for name, tensor in model.state_dict().items()
    }
    folder.mkdir(parents=True)
    save_file(state, folder / WEIGHTS_FILE)
    described = {"model_cfg": config, "preprocess_cfg": dict(preprocess_cfg)}
    (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def measure_tower(folder: Path) -> EncoderSpec:
    """The spec of the tower in an open_clip directory, by one forward pass of a blank picture.

    Raises:
        ConfigError: the directory is not usable.
        UnsupportedError: the tower does not see square pictures.
    """
    size = _image_size(folder)
    visual, _ = load_tower(folder, size)
    with torch.no_grad():
        maps = feature_maps(visual, torch.zeros(1, 3, size, size))
    _, width, rows, columns = maps.shape
    return EncoderSpec(folder, tree_digest(folder), size, width, (rows, columns))


def _image_size(folder: Path) -> int:
    try:
        vision = json.loads((folder / CONFIG_FILE).read_text())["model_cfg"]["vision_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"not an open_clip model: {error!r}", where=str(folder / CONFIG_FILE)) from error
    size = vision.get("image_size", 224)
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int):
        raise UnsupportedError(f"an image size of {size}; only square ones are served", where=str(folder))
    return size


def _bind(visual: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    try:
        visual.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        raise BindError(f"the weights do not fit the tower: {error}") from error
