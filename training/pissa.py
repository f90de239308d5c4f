"""PiSSA: factors that begin as a layer's largest singular values and vectors (Meng et al. 2024), by PEFT.

The frozen layer keeps the rest. Whoever serves the adapter has the layer as it was, so that what is published
is plain LoRA of twice the rank: the factors as they are now, less those that they began as.
"""

# Shapes: R rank, I in, O out features

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from okavango.modalities.peft_files import CONFIG, WEIGHTS

INIT: Any = "pissa_niter_16"
"""PEFT's name for it, with a randomised decomposition: seconds, where the exact one takes minutes."""


def factors(model: PeftModel) -> dict[str, Tensor]:
    """A copy of a model's factors, by their names in PEFT's file."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def make_plain(folder: Path, start: Mapping[str, Tensor]) -> None:
    """Rewrite PEFT's files, so that they change a layer as it was by what was learned.

    Args:
        start: A [R, I] and B [O, R] of every layer as training began.
    """
    path = folder / CONFIG
    config = json.loads(path.read_text())
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / rank**0.5 if config["use_rslora"] else alpha / rank
    plain = {"r": 2 * rank, "lora_alpha": scale * 2 * rank, "use_rslora": False, "init_lora_weights": True}
    path.write_text(json.dumps(config | plain, indent=2, sort_keys=True) + "\n")
    learned = load_file(folder / WEIGHTS)
    save_file({name: _less(name, tensor, start[name]) for name, tensor in learned.items()}, folder / WEIGHTS)


def _less(name: str, now: Tensor, start: Tensor) -> Tensor:
    """B·A − B₀·A₀ = [B, −B₀]·[A; A₀]."""
    return torch.cat([now, -start], 1) if ".lora_B." in name else torch.cat([now, start])
