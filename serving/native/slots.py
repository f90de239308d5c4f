"""Adapters' packed factors for the native kernels, a slot a row."""

# Shapes: S slots, R rank

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from okavango.modalities.lora import LoraWeights, Target
from okavango.modalities.memory import lazy_zeros
from okavango.platform.errors import UnsupportedError
from okavango.serving.backend import RunnerOptions
from okavango.serving.native.packing import pack_factors, round_up


@dataclass(frozen=True)
class PackedFactors:
    """One adapter: its factors behind each other, and their places in a slot."""

    tensor: Tensor
    places: Tensor
    rank: int

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


class Slots:
    """What adapters bring, packed and in the order of its use; what a slot does not need takes no memory.

    Attributes:
        tensor: [S, size].
        places: [S, targets, 3]: rank (a multiple of 16; 0 where nothing is adapted) and where A and B begin.
        numbers: of every target, by name.
    """

    def __init__(self, targets: Sequence[Target], options: RunnerOptions) -> None:
        self._max_rank = options.max_rank
        self._dtype = options.dtype
        self.numbers = {target.name: i for i, target in enumerate(targets)}
        self.size = round_up(options.max_rank) * sum(t.in_features + t.out_features for t in targets)
        self.tensor = lazy_zeros((options.slots + 1, self.size), options.dtype, huge=True)
        self.places = torch.zeros((options.slots + 1, len(targets), 3), dtype=torch.int64)

    def pack(self, weights: LoraWeights) -> PackedFactors:
        """An adapter's factors as they will stand in a slot."""
        places, parts, end = torch.zeros_like(self.places[0]), [], 0
        for name in sorted(weights.factors, key=self.numbers.__getitem__):
            a, b = weights.factors[name]
            packed_a, packed_b = pack_factors(a, b, self._dtype)
            places[self.numbers[name]] = torch.tensor([round_up(len(a)), end, end + len(packed_a)])
            parts += [packed_a, packed_b]
            end += len(packed_a) + len(packed_b)
        return PackedFactors(torch.cat(parts) if parts else self.tensor[0, :0], places, weights.rank)

    def write(self, slot: int, packed: PackedFactors) -> None:
        """Put an adapter into a slot; its former tenant is gone. UnsupportedError over the highest rank."""
        if packed.rank > self._max_rank:
            raise UnsupportedError(
                f"rank {packed.rank} is over the server's limit of {self._max_rank}",
                remedy=f"okavango serve --max-rank {packed.rank}",
            )
        self.tensor[slot, : len(packed.tensor)] = packed.tensor
        self.places[slot] = packed.places
