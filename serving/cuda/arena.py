"""Slots for adapters on a GPU: one row each, filled by one copy.

A row holds an adapter at the adapter's own rank, group by group of layers that see the same input: see
serving/cuda/kernels/lora.py. What it does not adapt is zero. So a small adapter takes the beginning of a row,
and neither a copy nor a kernel touches the rest.
"""

# Shapes: S slots, J layers of a group, I inputs, O outputs of a layer, r an adapter's rank

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from okavango.modalities.lora import LoraWeights
from okavango.platform.errors import UnsupportedError
from okavango.serving.cuda.kernels.lora import Factors

_ALIGNED = 16


@dataclass(frozen=True)
class Group:
    """Layers of one parent that see the same input: their names in the decoder, inputs, and outputs each."""

    names: tuple[str, ...]
    inputs: int
    widths: tuple[int, ...]

    @property
    def unit(self) -> int:
        """Elements of its factors at rank 1."""
        return len(self.widths) * self.inputs + sum(self.widths)


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter as a slot holds it: [rank * unit], page-locked where a GPU copies it."""

    tensor: Tensor
    rank: int

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


class Arena:
    """Adapters' factors [S, highest rank * unit], and each slot's rank [S + 1]; slot 0 is the base."""

    def __init__(
        self, groups: Sequence[Group], slots: int, max_rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.groups = tuple(groups)
        self.max_rank = max_rank
        self.unit = sum(group.unit for group in groups)
        self.rows = torch.zeros((slots, max_rank * self.unit), dtype=dtype, device=device)
        self.ranks = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        sizes = [size for group in groups for size in (group.inputs, *group.widths)]
        self._aligned = all(size % _ALIGNED == 0 for size in sizes)

    def offsets(self) -> list[int]:
        """Where each group begins in a row of rank 1."""
        found, end = [], 0
        for group in self.groups:
            found.append(end)
            end += group.unit
        return found

    def factors(self, offset: Tensor, widths: Sequence[int]) -> Factors:
        """Of the group that begins at `offset` [1]."""
        return Factors(self.rows, self.ranks, offset, tuple(widths), self.max_rank, self._aligned)

    def pack(self, weights: LoraWeights) -> PackedAdapter:
        """Raises UnsupportedError over the highest rank."""
        rank = weights.rank
        if rank > self.max_rank:
            raise UnsupportedError(
                f"rank {rank} is over the server's limit of {self.max_rank}",
                remedy=f"okavango serve --max-rank {rank}",
            )
        flat = torch.empty(rank * self.unit, dtype=self.rows.dtype, pin_memory=self.rows.is_cuda)
        for group, offset in zip(self.groups, self.offsets(), strict=True):
            begin = rank * offset
            parts = [(name, 0, group.inputs) for name in group.names]
            parts += [(name, 1, width) for name, width in zip(group.names, group.widths, strict=True)]
            for name, which, width in parts:
                place, begin = flat[begin : begin + rank * width], begin + rank * width
                size = 0
                if name in weights.factors:
                    factor = weights.factors[name][which]
                    size = factor.numel()
                    place[:size].view(factor.shape).copy_(factor)
                place[size:].zero_()
        return PackedAdapter(flat, rank)

    def write(self, slot: int, packed: PackedAdapter) -> None:
        """Put an adapter into a slot; its former tenant is gone. The host goes on while a GPU copies."""
        self.rows[slot - 1, : len(packed.tensor)].copy_(packed.tensor, non_blocking=True)
        self.ranks[slot].fill_(packed.rank)
