"""Vision towers on disk: an open_clip local directory with the tower, its preprocessing, and a stub of text.

open_clip builds two towers and loads them strictly, but a base only sees. So the text tower is stored as a
tiny one: a large model's own would cost gigabytes of disk and load time, and often a tokenizer download.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from okavango.modalities.base import EncoderSpec, encoder_digest
from okavango.modalities.image import CONFIG_FILE, UNUSABLE, feature_maps, load_tower
from okavango.platform.errors import BindError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS_FILE = "open_clip_model.safetensors"
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")
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

    config = _config(model_cfg)
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


def import_tower(folder: Path, name: str, weights: str | None = None) -> None:
    """Write the tower of an open_clip model: hf-hub:ID, local-dir:PATH, or a name with a tag or a file.

    Raises:
        ConfigError: the name or the weights are unknown (the nearest are named), or cannot be loaded.
    """
    import open_clip

    name = f"local-dir:{name}" if Path(name).is_dir() else name
    _check_names(name, weights)
    try:
        with torch.random.fork_rng(devices=[]):
            model = open_clip.create_model(name, weights, require_pretrained=True)
        config = open_clip.get_model_config(name)
    except UNUSABLE as error:
        raise ConfigError(f"open_clip cannot load it: {error}", where=name) from error
    found = model.visual.preprocess_cfg
    preprocess = {key: found[key] for key in _PREPROCESS}
    if found["resize_mode"] == "longest":
        preprocess["fill_color"] = found["fill_color"]
    write_tower(folder, config, preprocess, model.visual.state_dict())


def measure_tower(folder: Path, layers: tuple[int, ...] = (-1,), tiles: int = 1) -> EncoderSpec:
    """The spec of the tower in an open_clip directory, by one forward pass of a blank picture.

    Args:
        layers, tiles: as in EncoderSpec.

    Raises:
        ConfigError: the directory is not usable.
        UnsupportedError: the tower does not see square pictures.
    """
    size = _image_size(folder)
    visual, _ = load_tower(folder, size)
    with torch.no_grad():
        maps = feature_maps(visual, torch.zeros(1, 3, size, size), layers)
    _, width, rows, columns = maps.shape
    digest = encoder_digest(folder, size, layers, tiles=tiles)
    return EncoderSpec(folder, digest, size, width, (rows, columns), layers, tiles=tiles)


def _check_names(name: str, weights: str | None) -> None:
    """Raise ConfigError unless open_clip knows the model, and has these weights for it."""
    import open_clip

    if name.startswith(("hf-hub:", "local-dir:")):
        if weights is not None:
            raise ConfigError(f"{name} brings its own weights", where="image_weights", remedy="leave it out")
        return
    if name not in (models := open_clip.list_models()):
        raise ConfigError(
            f"open_clip has no model {name!r}", where="image_encoder", remedy=_nearest(name, models)
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights is None or (weights not in tags and not Path(weights).is_file()):
        found = "none named" if weights is None else f"{weights!r} is neither a tag nor a file"
        known = ", ".join(tags) or "none, so a file is needed"
        raise ConfigError(f"weights for {name}: {found}; known: {known}", where="image_weights")


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return "open_clip.list_models() lists them; hf-hub:ID and local-dir:PATH work, too"


def _config(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: model_cfg[name] for name in ("embed_dim", "vision_cfg", "quick_gelu") if name in model_cfg}
    if "timm_model_name" in kept["vision_cfg"]:
        kept["vision_cfg"] = kept["vision_cfg"] | {"timm_model_pretrained": False}  # else it would download
    return kept | {"text_cfg": _TEXT_STUB}


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
