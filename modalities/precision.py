"""Which number format a run computes in."""

from __future__ import annotations

import torch

from okavango.platform.errors import ConfigError

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


def _native_bf16(device: str) -> bool:
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
