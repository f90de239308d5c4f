"""A batch's loss and gradients as a CUDA graph, one for each size of batch (training.tight).

A step of small kernels takes a GPU less time than a host needs to launch them: on an H100 a step of a decoder
of 135M was waited for nine tenths of the time. A graph is launched once. It holds a batch's forward pass from
the embeddings on, its loss, and the backward pass down to the factors and the embeddings; what made the
embeddings is autograd's as ever. Eager steps and replayed ones compute the same kernels on the same sizes and
draw the same random numbers, so that a run which is resumed needs no graphs to go on alike.
"""

# Shapes: T as in training.tight, D decoder width

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from okavango.training.collate import Batch
from okavango.training.tight import Tight

log = logging.getLogger(__name__)

Compute = Callable[[Tensor, Batch, float], Tensor]
"""Embeddings [1, T, D], their batch, label smoothing → loss."""
_MOST_GRAPHS = 96


@dataclass
class _Recorded:
    """A graph, what it reads, and what it writes: a loss, and the embeddings' gradient if they have one."""

    graph: torch.cuda.CUDAGraph
    embeddings: Tensor
    batch: Batch
    loss: Tensor
    upstream: Tensor | None


class Graphs:
    """The graphs of one decoder and the parameters that learn in it.

    Args:
        module: holds the parameters.
    """

    def __init__(self, module: nn.Module, compute: Compute) -> None:
        self._compute = compute
        self._owners = dict(_owners(module))
        self._parameters = [getattr(owner, name) for owner, name in self._owners.values()]
        self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._recorded: OrderedDict[Any, _Recorded] = OrderedDict()
        self._pool: Any = None
        self._is_warm = False
        self._turn = 0

    def loss(self, embeddings: Tensor, batch: Batch, smoothing: float) -> Tensor:
        """The loss, whose backward pass gives gradients that are there already.

        Raises RuntimeError where this cannot be recorded; nothing has been drawn or computed then.
        """
        key = _key(embeddings, batch, smoothing)
        if key not in self._recorded:
            self._recorded[key] = self._record(embeddings, batch, smoothing)
            if len(self._recorded) > _MOST_GRAPHS:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        loss: Tensor = _Replay.apply(embeddings, self, self._recorded[key], batch, *self._parameters)
        return loss

    def replay(self, recorded: _Recorded, embeddings: Tensor, batch: Batch) -> int:
        """Fill the gradients; the number of this turn."""
        recorded.embeddings.copy_(embeddings)
        for held, own in zip(_tensors(recorded.batch), _tensors(batch), strict=True):
            held.copy_(own)
        recorded.graph.replay()
        self._turn += 1
        return self._turn

    def gradients(self, turn: int, scale: Tensor) -> list[Tensor]:
        """The parameters', as the turn left them, scaled."""
        assert turn == self._turn, "another batch was computed before this one's backward pass"
        return list(torch._foreach_mul(self._gradients, scale))

    def _record(self, embeddings: Tensor, batch: Batch, smoothing: float) -> _Recorded:
        state = torch.cuda.get_rng_state()
        try:
            if not self._is_warm:
                self._warm_up(embeddings, batch, smoothing)
            return self._capture(embeddings, batch, smoothing)
        finally:
            torch.cuda.set_rng_state(state)

    def _warm_up(self, embeddings: Tensor, batch: Batch, smoothing: float) -> None:
        """Once without a graph, for whatever libraries set up when they are first used."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self._twins() as twins:
            given = embeddings.detach().requires_grad_(embeddings.requires_grad)
            wanted = [given, *twins] if given.requires_grad else twins
            torch.autograd.grad(self._compute(given, batch, smoothing), wanted)
            del given, wanted
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # graphs have memory of their own
        self._pool = torch.cuda.graph_pool_handle()
        self._is_warm = True

    def _capture(self, embeddings: Tensor, batch: Batch, smoothing: float) -> _Recorded:
        given = embeddings.detach().clone().requires_grad_(embeddings.requires_grad)
        held = _copied(batch)
        graph = torch.cuda.CUDAGraph()
        with self._twins() as twins, torch.cuda.graph(graph, pool=self._pool):
            loss = self._compute(given, held, smoothing)
            wanted = [given, *twins] if given.requires_grad else twins
            found = list(torch.autograd.grad(loss, wanted))
            upstream = found.pop(0) if given.requires_grad else None
            torch._foreach_copy_(self._gradients, found)
            loss = loss.detach()
        return _Recorded(graph, given.detach(), held, loss, upstream)

    @contextmanager
    def _twins(self) -> Iterator[list[nn.Parameter]]:
        """Within, parameters of the same memory stand in for the module's: autograd keeps the stream that it
        first met a parameter on, and one that is not the recording's would end it."""
        twins = [nn.Parameter(parameter.detach()) for parameter in self._parameters]
        try:
            for (owner, name), twin in zip(self._owners.values(), twins, strict=True):
                owner._parameters[name] = twin
            yield twins
        finally:
            for (owner, name), own in zip(self._owners.values(), self._parameters, strict=True):
                owner._parameters[name] = own


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, graphs: Graphs, recorded: _Recorded, batch: Batch, *_: Tensor
    ) -> Tensor:
        ctx.graphs, ctx.turn = graphs, graphs.replay(recorded, embeddings, batch)
        ctx.upstream = None if recorded.upstream is None else recorded.upstream.clone()
        return recorded.loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = upstream
        given = None if ctx.upstream is None else ctx.upstream * scale.to(ctx.upstream.dtype)
        return given, None, None, None, *ctx.graphs.gradients(ctx.turn, scale)


def _owners(module: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    for path, each in module.named_modules():
        for name, parameter in each._parameters.items():
            if parameter is not None and parameter.requires_grad:
                yield f"{path}.{name}", (each, name)


def _key(embeddings: Tensor, batch: Batch, smoothing: float) -> Any:
    assert isinstance(batch.layout, Tight)
    sizes = batch.layout.size, len(batch.predicting), batch.places is None
    return *sizes, embeddings.requires_grad, smoothing


def _copied(batch: Batch) -> Batch:
    """With tensors of its own, without media."""
    copied: Batch = replace(_cloned(batch), layout=_cloned(batch.layout), spans=(), media={})
    return copied


def _tensors(batch: Batch) -> list[Tensor]:
    return [*_named(batch).values(), *_named(batch.layout).values()]


def _cloned(record: Any) -> Any:
    return replace(record, **{name: tensor.clone() for name, tensor in _named(record).items()})


def _named(record: Any) -> Mapping[str, Tensor]:
    """A dataclass's tensors by their names."""
    found = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
