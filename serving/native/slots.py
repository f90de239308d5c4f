"""Adapters' packed factors, and which of them the native kernels find in which slot."""

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
    """One adapter: its factors behind each other, and where each of them begins."""

    tensor: Tensor
    places: Tensor
    rank: int

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


class Slots:
    """What adapters bring, packed and in the order of its use. A slot points to it and keeps it; nothing is
    copied, so that an adapter lies in memory once.

    Attributes:
        addresses: [S]: where each slot's factors begin.
        places: [S, targets, 3]: rank (a multiple of 16; 0 where nothing is adapted) and where A and B begin.
        numbers: of every target, by name.
    """

    def __init__(self, targets: Sequence[Target], options: RunnerOptions) -> None:
        self._max_rank = options.max_rank
        self._dtype = options.dtype
        self.numbers = {target.name: i for i, target in enumerate(targets)}
        self.addresses = torch.zeros(options.slots + 1, dtype=torch.int64)
        self._tenants: list[PackedFactors | None] = [None] * (options.slots + 1)
        self.places = torch.zeros((options.slots + 1, len(targets), 3), dtype=torch.int64)

    def pack(self, weights: LoraWeights) -> PackedFactors:
        """An adapter's factors as a slot points to them."""
        size = sum(round_up(len(a)) * (a.shape[1] + b.shape[1]) for a, b in weights.factors.values())
        tensor, places, end = lazy_zeros((size,), self._dtype, huge=True), torch.zeros_like(self.places[0]), 0
        for name in sorted(weights.factors, key=self.numbers.__getitem__):
            a, b = weights.factors[name]
            place = [round_up(len(a))]
            for packed in pack_factors(a, b, self._dtype):
                place.append(end)
                tensor[end : end + len(packed)] = packed
                end += len(packed)
            places[self.numbers[name]] = torch.tensor(place)
        return PackedFactors(tensor, places, weights.rank)

    def write(self, slot: int, packed: PackedFactors) -> None:
        """Put an adapter into a slot; its former tenant is gone. UnsupportedError over the highest rank."""
        if packed.rank > self._max_rank:
            raise UnsupportedError(
                f"rank {packed.rank} is over the server's limit of {self._max_rank}",
                remedy=f"okavango serve --max-rank {packed.rank}",
            )
        self.addresses[slot] = packed.tensor.data_ptr()
        self.places[slot] = packed.places
        self._tenants[slot] = packed
