"""PEFT's LoRA, attached to a decoder, and computed with less waste on CPUs.

As it comes, PEFT draws dropout entry by entry, which alone is a fifth of a step on a CPU, and takes every
low-rank update through full-width copies in float32. Here the update is computed in the frozen layer's own
precision from the same float32 factors; values are PEFT's up to rounding.
"""

# Shapes: I in, O out features, R rank

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn
from transformers import PreTrainedModel

from okavango.training.spec import LoraSpec

_DRAW = 4  # int16 values of an int64


def attach_lora(decoder: PreTrainedModel, spec: LoraSpec, base_name: str) -> PeftModel:
    """The decoder with fresh LoRA factors in float32, drawn from torch's global random state."""
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=spec.targets if isinstance(spec.targets, str) else list(spec.targets),
        use_rslora=spec.use_rslora,
        task_type="CAUSAL_LM",
    )
    with quiet_peft():
        model = get_peft_model(decoder, config)
    # a bundle goes to other machines: the base by its name, not by its path on this one
    model.peft_config["default"].base_model_name_or_path = base_name
    for module in model.modules():
        if isinstance(module, Linear) and not module.lora_variant:
            module.lora_variant["default"] = _LeanLora()
            module.cast_input_dtype_enabled = False
    return model


@contextmanager
def quiet_peft() -> Iterator[None]:
    """No warning that PEFT still asks for a property which transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout from 16 random bits an entry: p in steps of 1/65536, and far quicker to draw on a CPU."""
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    words = torch.empty(-(-x.numel() // _DRAW), dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: x.numel()].view_as(x) >= round(p * 65536) - 32768
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


class _LeanLora(LoraVariant):
    """y + B·(s·A·drop(x)): the scale on the narrow side, the sum inside the product."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight  # [R, I], [O, R]
        dropout = module.lora_dropout[active_adapter]
        if isinstance(dropout, nn.Dropout) and dropout.training:
            x = drop(x, dropout.p)
        low = F.linear(x, a.to(x.dtype)) * module.scaling[active_adapter]
        rows = torch.addmm(result.flatten(0, -2), low.flatten(0, -2), b.to(x.dtype).T)
        return rows.view_as(result)
