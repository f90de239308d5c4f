"""Memory that is promised now and taken as it is used."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Zeros whose pages a CPU takes only when they are first written; elsewhere plain zeros.

    torch.zeros writes its zeros, and so takes all the memory at once; a fresh anonymous mapping does not, and
    a private one (not Python's default) does not where it is only read, either.
    """
    if torch.device(device).type != "cpu" or math.prod(shape) == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if hasattr(mmap, "MAP_PRIVATE"):
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:  # Windows, whose mappings are private
        mapping = mmap.mmap(-1, size)
    return torch.frombuffer(mapping, dtype=dtype).view(shape)
