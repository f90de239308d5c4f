"""Steps as CUDA graphs, for a ladder of sizes: captured on a thread of their own while steps run without.

A graph is a step of fixed room. What a step has less of than its graph is padding: rows of no sequence, tiles
of no chunk. Before a graph serves, it is replayed once on a step of its own and compared with what plain
layers make of that; one that differs is not used.
"""

# Shapes: T rows of the graph, D decoder width, O rows of logits, V vocabulary

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from okavango.modalities.precision import PARITY_BOUNDS, relative_error
from okavango.serving.cuda.compiled import raise_limit
from okavango.serving.cuda.plan import Plan, Room
from okavango.serving.cuda.staging import Staging
from okavango.serving.cuda.state import StepTables

log = logging.getLogger(__name__)

Forward = Callable[[StepTables, Tensor | None], Tensor]
"""A step's tables and its embeddings [T, D], which None leaves to the decoder → logits [O, V]."""


@dataclass
class StepGraph:
    """One size's graph, and the memory that it reads and writes.

    Attributes:
        step: its tables, which a replay finds filled.
        memory: where all of them lie.
        embeddings: [T, D] for steps that may hold media; None where tokens are looked up in the graph.
        check: a step to try it with, and `expected`, the logits that plain layers give; None once it was.
        logits: [O, V], what a replay overwrites.
        graph: None where there are no CUDA graphs: the step is computed each time, as it would be captured.
    """

    step: StepTables
    memory: Tensor
    embeddings: Tensor | None
    check: Plan
    expected: Tensor | None
    logits: Tensor
    graph: torch.cuda.CUDAGraph | None


class Graphs:
    """The ladder. `capture` runs on any one thread, `replay` on another.

    Args:
        forward: computes a step.
        width: D.
    """

    def __init__(self, forward: Forward, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._forward = forward
        self._width = width
        self._dtype = dtype
        self._device = device
        self._ready: list[StepGraph] = []
        self._lock = threading.Lock()
        self._staging = Staging(device)
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None
        self._pool = torch.cuda.graph_pool_handle() if is_cuda else None

    def __len__(self) -> int:
        return len(self._ready)

    def find(self, room: Room, *, uses_slots: bool, has_embeddings: bool) -> StepGraph | None:
        """The smallest graph that holds such a step."""
        with self._lock:
            fitting = [
                graph
                for graph in self._ready
                if graph.step.room.holds(room)
                and (graph.step.arena is not None or not uses_slots)
                and (graph.embeddings is not None) == has_embeddings
            ]
        return min(fitting, key=_cost, default=None)

    @torch.inference_mode()
    def replay(
        self, graph: StepGraph, plan: Plan, embeddings: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor | None:
        """Logits [O, V] that hold until the next replay; None where the graph has turned out to be wrong.

        `tokens`: [T] on the device, in place of the plan's.
        """
        if graph.expected is not None and not self._passes(graph, graph.expected):
            return None
        self._run(graph, plan, embeddings, tokens)
        return graph.logits[: plan.room.outputs]

    @torch.inference_mode()
    def capture(self, step: StepTables, check: Plan, *, has_embeddings: bool) -> None:
        """Add a graph for steps of that room; its tables come without memory. Takes seconds."""
        raise_limit()
        with self._beside():
            memory, step, embeddings = self._filled(step, check, has_embeddings)
            expected = self._forward(replace(step, form=None), embeddings).clone()
            logits = self._forward(step, embeddings)
            cuda_graph = None
            if self._stream is not None:
                self._forward(step, embeddings)  # once more, for what only a first call does
                self._stream.synchronize()
                cuda_graph = torch.cuda.CUDAGraph()
                cuda_graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    logits = self._forward(step, embeddings)
                finally:
                    cuda_graph.capture_end()
                self._stream.synchronize()
        made = StepGraph(step, memory, embeddings, check, expected, logits, cuda_graph)
        with self._lock:
            self._ready.append(made)

    @torch.inference_mode()
    def agrees(self, step: StepTables, check: Plan) -> bool:
        """Whether such a step's layers give what plain ones do, without a graph."""
        raise_limit()
        with self._beside():
            _, step, embeddings = self._filled(step, check, has_embeddings=True)
            count = check.room.outputs
            expected = self._forward(replace(step, form=None), embeddings)[:count]
            error = relative_error(self._forward(step, embeddings)[:count], expected)
        return error <= PARITY_BOUNDS[self._dtype]

    def _beside(self) -> AbstractContextManager[Any]:
        """Within, this thread's work goes beside that of others."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def _filled(
        self, step: StepTables, check: Plan, has_embeddings: bool
    ) -> tuple[Tensor, StepTables, Tensor | None]:
        """Memory for a step's tables, and the step with the check's numbers in them."""
        memory = torch.zeros(step.room.size, dtype=torch.int32, device=self._device)
        piece = Staging(self._device).borrow(step.room.size)
        piece.send(check.write(step.room, piece.numbers), memory)
        shape = (step.room.rows, self._width)
        embeddings = torch.randn(shape, dtype=self._dtype, device=self._device) if has_embeddings else None
        return memory, replace(step, tables=step.room.views(memory)), embeddings

    def _passes(self, graph: StepGraph, expected: Tensor) -> bool:
        own = graph.embeddings.clone() if graph.embeddings is not None else None
        self._run(graph, graph.check, own)
        count = graph.check.room.outputs
        error = relative_error(graph.logits[:count], expected[:count])
        if error <= PARITY_BOUNDS[self._dtype]:
            graph.expected = None
            return True
        log.warning("the graph of %d rows differs by %.2g and is not used", graph.step.room.rows, error)
        with self._lock:
            self._ready.remove(graph)
        return False

    def _run(
        self, graph: StepGraph, plan: Plan, embeddings: Tensor | None, tokens: Tensor | None = None
    ) -> None:
        piece = self._staging.borrow(graph.step.room.size)
        piece.send(plan.write(graph.step.room, piece.numbers), graph.memory)
        if embeddings is not None:
            assert graph.embeddings is not None
            graph.embeddings[: len(embeddings)].copy_(embeddings)
        if tokens is not None:
            graph.step.tables["tokens"][: len(tokens)].copy_(tokens)
        if graph.graph is not None:
            graph.graph.replay()
        else:
            graph.logits = self._forward(graph.step, graph.embeddings)


def _cost(graph: StepGraph) -> tuple[int, bool]:
    return graph.step.room.rows, graph.step.arena is not None


def ladder(most: int) -> list[int]:
    """Sizes up to `most`, which is one: close to each other where a step's time depends on them."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]
    sizes += range(192, 513, 64)
    sizes += range(768, most + 1, 256)
    return sorted({size for size in sizes if size < most} | {most})
