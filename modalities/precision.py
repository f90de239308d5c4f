"""Which number format a run computes in, and how much its logits may differ by."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from okavango.platform.errors import ConfigError

# Relative Frobenius error of logits that ought to be the same. float32 sums in another order differ near
# 1e-6; a wrong scale, head, template or preprocessing by 1e-2 and more. bfloat16 products in another order
# differ by some 5e-2.
PARITY_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 1.5e-1}
_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it natively, float32 else.

    Raises:
        ConfigError: no such format.
    """
    if name == "auto":
        return torch.bfloat16 if _native_bf16(device) else torch.float32
    if name not in _NAMES:
        raise ConfigError(f"{name!r} is not one of auto, {', '.join(_NAMES)}", where="dtype")
    return _NAMES[name]


def check_device(name: str) -> None:
    """Whether torch can compute there.

    Raises:
        ConfigError: no device that is served, or one that this machine or this torch does not have.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name, re.ASCII):
        raise ConfigError(f"{name!r} is not one of cpu, cuda, cuda:1", where="device")
    if name == "cpu":
        return
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU or no driver"
        remedy = "look at nvidia-smi and torch.version.cuda, or use --device cpu"
        raise ConfigError(f"CUDA cannot be used: {reason}", where=f"device {name}", remedy=remedy)
    count = torch.cuda.device_count()
    if int(name.partition(":")[2] or 0) >= count:
        raise ConfigError(f"this machine has {count} GPUs, counted from 0", where=f"device {name}")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; nan where a value is."""
    expected = expected.float()
    return float((found.float() - expected).norm() / expected.norm())


def _native_bf16(device: str) -> bool:
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
