"""What the step that a thread computes is made of: what attention and linear layers look up while they run.

transformers' modules pass neither tables nor slots down to their layers, and a graph is captured on a thread
of its own while another one serves. So each thread has its own current step.
"""

# Shapes: T rows of the step, B decoding rows, C chunks, Q tiles of chunks, L tiles of slots

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from okavango.serving.cuda.arena import Arena
from okavango.serving.cuda.kernels.lora import Tiles
from okavango.serving.cuda.plan import Room, Sizes


@dataclass(frozen=True)
class StepTables:
    """A step's tables on the device; serving/cuda/plan.py says what is in them.

    Attributes:
        room: entries of each, which is what kernels are launched for.
        tables: by name.
        arena: adapters' factors; None where the step has none, and linear layers are the base's alone.
        form: how layers run: plain (None), compiled for this number of rows (fixed), or for any.
    """

    room: Room
    tables: Mapping[str, Tensor]
    sizes: Sizes
    arena: Arena | None
    form: Literal["fixed", "any"] | None = None

    @property
    def decode(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `attend_decode` takes them."""
        names = ("decode_rows", "decode_lengths", "decode_starts", "blocks")
        rows, lengths, starts, blocks = (self.tables[name] for name in names)
        return rows, lengths, starts, blocks

    @property
    def prefill(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `attend_prefill` takes them."""
        tiles = self.tables["tile_chunks"], self.tables["tile_firsts"]
        chunks = self.tables["chunk_rows"], self.tables["chunk_counts"], self.tables["chunk_seen"]
        return (*tiles, *chunks, self.tables["chunk_starts"], self.tables["blocks"])

    @property
    def slot_tiles(self) -> Tiles:
        tables = self.tables
        return Tiles(tables["slot_rows"], tables["slot_counts"], tables["slots"], self.sizes.slot_tile)


class _Current(threading.local):
    step: StepTables | None = None


_current = _Current()


def current() -> StepTables:
    """The step that this thread computes."""
    assert _current.step is not None, "a layer runs outside a step"
    return _current.step


@contextmanager
def computing(step: StepTables) -> Iterator[None]:
    """Within, this thread computes that step."""
    before, _current.step = _current.step, step
    try:
        yield
    finally:
        _current.step = before
