"""Adapters' packed factors for the native kernels, a slot a row."""

# Shapes: S slots, R rank

from __future__ import annotations

from collections.abc import Sequence

import torch

from okavango.modalities.lora import LoraWeights, Target
from okavango.modalities.memory import lazy_zeros
from okavango.platform.errors import UnsupportedError
from okavango.serving.backend import RunnerOptions
from okavango.serving.native.packing import pack_factors, round_up


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

    def write(self, slot: int, weights: LoraWeights) -> None:
        """Put an adapter into a slot; its former tenant is gone. UnsupportedError over the highest rank."""
        if weights.rank > self._max_rank:
            raise UnsupportedError(
                f"rank {weights.rank} is over the server's limit of {self._max_rank}",
                remedy=f"okavango serve --max-rank {weights.rank}",
            )
        row, places, end = self.tensor[slot], self.places[slot], 0
        places.zero_()
        for name in sorted(weights.factors, key=self.numbers.__getitem__):
            a, b = weights.factors[name]
            starts = []
            for packed in pack_factors(a, b, self._dtype):
                starts.append(end)
                row[end : end + len(packed)] = packed
                end += len(packed)
            places[self.numbers[name]] = torch.tensor([round_up(len(a)), *starts])
