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

from okavango.modalities.adapted import encoder_targets
from okavango.modalities.base import EncoderSpec
from okavango.modalities.encoders import Encoder
from okavango.training.pissa import INIT
from okavango.training.spec import ALL_LINEAR, EncoderLoraSpec, LoraSpec, ending_in

_DRAW = 4  # int16 values of an int64


def attach_lora(decoder: PreTrainedModel, spec: LoraSpec, base_name: str) -> PeftModel:
    """The decoder with fresh LoRA factors in float32, drawn from torch's global random state."""
    targets = spec.targets if isinstance(spec.targets, str) else list(spec.targets)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        use_rslora=spec.use_rslora,
        init_lora_weights=INIT if spec.init == "pissa" else True,
        task_type="CAUSAL_LM",
    )
    return _attach(decoder, config, base_name)


def adapt_encoder(encoder: Encoder, spec: EncoderSpec, lora: EncoderLoraSpec, base_name: str) -> PeftModel:
    """An encoder with fresh LoRA factors in float32 on the linear layers that are served; in place."""
    names = [target.name for target in encoder_targets(spec)]
    if lora.targets != ALL_LINEAR:
        names = sorted({name for ending in lora.targets for name in ending_in(ending, names)})
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=names, use_rslora=lora.use_rslora)
    return _attach(encoder.module, config, base_name)


def _attach(module_: nn.Module, config: LoraConfig, base_name: str) -> PeftModel:
    with quiet_peft():
        model = get_peft_model(module_, config)
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
