"""Which number format a run computes in, and how much its logits may differ by."""

from __future__ import annotations

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


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; nan where a value is."""
    expected = expected.float()
    return float((found.float() - expected).norm() / expected.norm())


def _native_bf16(device: str) -> bool:
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
