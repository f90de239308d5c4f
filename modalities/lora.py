"""Batched LoRA for serving: adapters in slots, a slot a token, mixed in one forward.

`SlotArena` owns the tensors: slot-major, so that one adapter is one contiguous row and a swap is one copy.
`SlotLinear` wraps a decoder's linear layer once, when the engine starts; no module is replaced later.
Which adapter sits in which slot is decided elsewhere (serving.adapters.slots). Training uses PEFT.
"""

# Shapes: T tokens in the step, S slots, R rank of the arena, r rank of an adapter, I in, O out features

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from okavango.modalities.memory import lazy_zeros
from okavango.platform.errors import UnsupportedError


@dataclass(frozen=True)
class Target:
    """A linear layer that adapters may adapt, by its name in the decoder."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class LoraWeights:
    """One adapter's factors on the host.

    Attributes:
        factors: by target name: A [r, I] and B transposed [r, O], the scale multiplied into B.
        rank: the largest r among them.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    rank: int

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.factors.values())


@dataclass
class StepSlots:
    """Which of the step's `rows` belong to which slot: (slot, first row, end row), rows of one slot adjacent.

    Rows that no segment covers run on the bare base. Shared by every SlotLinear of one decoder.
    """

    segments: Sequence[tuple[int, int, int]] = ()
    rows: int = 0


class SlotArena:
    """A[S, R, I] and B[S, R, O] of every target, as views into one tensor whose rows are slots."""

    def __init__(
        self, targets: Sequence[Target], slots: int, rank: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.rank = rank
        self.slots = slots
        width = sum(rank * (t.in_features + t.out_features) for t in targets)
        self._rows = lazy_zeros((slots, width), dtype, device)
        self._views = dict(self._make_views(targets, width))
        self.ranks: list[dict[str, int]] = [{} for _ in range(slots)]

    def _make_views(
        self, targets: Sequence[Target], width: int
    ) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        offset = 0
        for target in targets:
            views = []
            for features in (target.in_features, target.out_features):
                shape = (self.slots, self.rank, features)
                views.append(self._rows.as_strided(shape, (width, features, 1), offset))
                offset += self.rank * features
            yield target.name, (views[0], views[1])

    def views(self, name: str) -> tuple[Tensor, Tensor]:
        return self._views[name]

    def write(self, slot: int, weights: LoraWeights) -> None:
        """Put an adapter into a slot; its former tenant is gone."""
        if weights.rank > self.rank:
            raise UnsupportedError(
                f"rank {weights.rank} is over the server's limit of {self.rank}",
                remedy=f"okavango serve --max-rank {weights.rank}",
            )
        for name, (a, b) in weights.factors.items():
            rank = a.shape[0]
            # A GPU copies by itself what is page-locked; the step's kernels come after, in the same stream.
            self._views[name][0][slot, :rank].copy_(a, non_blocking=True)
            self._views[name][1][slot, :rank].copy_(b, non_blocking=True)
        self.ranks[slot] = {name: a.shape[0] for name, (a, _) in weights.factors.items()}


class SlotLinear(nn.Module):
    """A linear layer whose rows each get their own slot's low-rank update: y + (x Aᵀ) B."""

    def __init__(self, base: nn.Module, name: str, arena: SlotArena, step: StepSlots) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.a, self.b = arena.views(name)
        self.ranks = arena.ranks
        self.step = step

    def forward(self, x: Tensor) -> Tensor:  # [..., T, I] → [..., T, O]
        y = self.base(x)
        if not self.step.segments:
            return y
        rows_in, rows_out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if len(rows_in) != self.step.rows:  # an expert's, say: whose rows they are cannot be told
            raise UnsupportedError(
                f"sees {len(rows_in)} of the step's {self.step.rows} rows", where=self.name
            )
        for slot, start, end in self.step.segments:
            rank = self.ranks[slot].get(self.name, 0)
            if rank:
                low = rows_in[start:end] @ self.a[slot, :rank].T
                rows_out[start:end].addmm_(low, self.b[slot, :rank])
        return y


def find_targets(decoder: nn.Module) -> tuple[Target, ...]:
    """Every linear layer that an adapter may adapt: all but the output layer, whose rows are others."""
    output = decoder.get_output_embeddings()  # type: ignore[operator]
    return tuple(
        Target(name, *_features(module))
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output
    )


def install(decoder: nn.Module, arena: SlotArena, step: StepSlots, targets: Sequence[Target]) -> None:
    """Wrap the decoder's target layers, once."""
    for target in targets:
        parent, _, child = target.name.rpartition(".")
        owner = decoder.get_submodule(parent)
        setattr(owner, child, SlotLinear(getattr(owner, child), target.name, arena, step))


def _features(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return rows, columns
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features
