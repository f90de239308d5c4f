"""What all kernels ask of the device that they run on."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634
# what stands in for minus infinity: differences of it are numbers
HIDDEN = -1.0e30
# a window as wide as this hides nothing
NO_WINDOW = 1 << 30


def is_exact(tensor: Tensor) -> bool:
    """Whether products are of float32 and shall not be rounded to the matrix units' shorter format."""
    return tensor.dtype == torch.float32


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors; few where there is no GPU: Triton's interpreter computes one program at a time."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may begin while the one before it ends: programmatic dependent launch, from Hopper
    on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def dependent(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that waits for its predecessor by itself."""
    return {"launch_pdl": True} if can_overlap(device) else {}
