"""Numbers on their way to the device, through page-locked memory, so that the host need not wait for them."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PIECES = 2


class Staging:
    """Pieces of host memory that take turns; one is written again only when its copy has been made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pieces = cycle([Piece(device) for _ in range(_PIECES)])

    def borrow(self, size: int) -> Piece:
        """A piece of that many numbers to write to."""
        piece = next(self._pieces)
        piece.make_ready(size)
        return piece


class Piece:
    """`numbers`: the host's memory as an array."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._tensor = torch.empty(0, dtype=torch.int32)
        self._sent = torch.cuda.Event() if self._is_cuda else None
        self.numbers: NDArray[np.int32] = self._tensor.numpy()

    def make_ready(self, size: int) -> None:
        if self._sent is not None:
            self._sent.synchronize()
        if len(self._tensor) < size:
            self._tensor = torch.empty(2 * size, dtype=torch.int32, pin_memory=self._is_cuda)
            self.numbers = self._tensor.numpy()

    def send(self, used: int, target: Tensor) -> None:
        """Copy the first `used` numbers to the beginning of a tensor on the device."""
        target[:used].copy_(self._tensor[:used], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
