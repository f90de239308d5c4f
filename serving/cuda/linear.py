"""Linear layers of a decoder, put together where they see the same input, with adapters on top.

q, k and v of an attention, or gate and up of an MLP, become one product. The first of them that is called
computes it for all; the others return their share. Which belong together is seen, not listed: a first run
notes what each layer is given.
"""

# Shapes: T rows of the step, I inputs, O outputs of a group

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okavango.modalities.lora import Target
from okavango.platform.errors import UnsupportedError
from okavango.serving.cuda.arena import Arena, Group
from okavango.serving.cuda.kernels.lora import add_lora
from okavango.serving.cuda.state import current

_MOST_LAYERS = 3


class _Outputs:
    outputs: Tensor | None = None


class _OutputsOfThread(threading.local):
    outputs: Tensor | None = None


class _Shared:
    """A group's outputs, between the call of its first layer and that of its last.

    Each thread has its own; what torch.compile traces has one that no thread ever fills.
    """

    def __init__(self) -> None:
        self._traced = _Outputs()
        self._own = _OutputsOfThread()

    def put(self, outputs: Tensor | None) -> None:
        (self._traced if torch.compiler.is_compiling() else self._own).outputs = outputs

    def get(self) -> Tensor:
        found = (self._traced if torch.compiler.is_compiling() else self._own).outputs
        assert found is not None
        return found


class FirstLinear(nn.Module):
    """A group of linear layers in place of its first."""

    bias: Tensor | None
    offset: Tensor

    def __init__(self, layers: Sequence[nn.Linear], offset: Tensor, shared: _Shared) -> None:
        super().__init__()
        self.widths = [layer.out_features for layer in layers]
        weight = torch.cat([layer.weight for layer in layers]) if len(layers) > 1 else layers[0].weight
        self.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        self.register_buffer("bias", _joined_bias(layers), persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self._shared = shared

    def forward(self, x: Tensor) -> Tensor:  # [..., T, I] → [..., T, outputs of the first]
        compute = torch.ops.okavango.linear if torch.compiler.is_compiling() else _linear
        outputs: Tensor = compute(x, self.weight, self.bias, self.offset, self.widths)
        if len(self.widths) > 1:
            self._shared.put(outputs)
        return outputs[..., : self.widths[0]]


class NextLinear(nn.Module):
    """A further layer of a group: its share [begin, end) of what the first has computed."""

    def __init__(self, begin: int, end: int, is_last: bool, shared: _Shared) -> None:
        super().__init__()
        self.begin = begin
        self.end = end
        self.is_last = is_last
        self._shared = shared

    def forward(self, x: Tensor) -> Tensor:
        outputs = self._shared.get()
        if self.is_last:
            self._shared.put(None)
        return outputs[..., self.begin : self.end]


def find_groups(decoder: nn.Module, targets: Sequence[Target], run: Callable[[], None]) -> list[Group]:
    """The decoder's linear layers as `run`, which computes one token, shows them.

    Raises:
        UnsupportedError: one is not called once for every row, or is none of torch's own.
    """
    with _watching(decoder, targets) as calls:
        run()
    called = [name for name, _ in calls]
    if sorted(called) != sorted(target.name for target in targets):
        raise UnsupportedError("not every linear layer is computed once a token")
    by_name = {target.name: target for target in targets}
    groups: list[list[str]] = []
    last: tuple[str, Tensor] | None = None
    for name, x in calls:
        if x.numel() != by_name[name].in_features:
            raise UnsupportedError("sees other rows than the step's", where=name)
        parent = name.rpartition(".")[0]
        if last is not None and last[0] == parent and last[1] is x and len(groups[-1]) < _MOST_LAYERS:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = parent, x
    return [_group([by_name[name] for name in names]) for names in groups]


def install_groups(decoder: nn.Module, arena: Arena) -> None:
    """Put the arena's groups in place of the decoder's layers, for good."""
    device = arena.rows.device
    offsets = torch.tensor(arena.offsets(), dtype=torch.int64, device=device)
    for i, group in enumerate(arena.groups):
        shared = _Shared()
        layers: list[Any] = [decoder.get_submodule(name) for name in group.names]
        own: list[nn.Module] = [FirstLinear(layers, offsets[i : i + 1].clone(), shared)]
        begin = group.widths[0]
        for width in group.widths[1:]:
            end = begin + width
            own.append(NextLinear(begin, end, end == sum(group.widths), shared))
            begin = end
        for name, module in zip(group.names, own, strict=True):
            parent, _, child = name.rpartition(".")
            setattr(decoder.get_submodule(parent), child, module)


@contextmanager
def _watching(decoder: nn.Module, targets: Sequence[Target]) -> Iterator[list[tuple[str, Tensor]]]:
    """Within, notes which target is called with what."""
    calls: list[tuple[str, Tensor]] = []
    hooks = []
    for target in targets:
        module = decoder.get_submodule(target.name)
        if type(module) is not nn.Linear:
            raise UnsupportedError(f"{type(module).__name__} layers are computed by torch")

        def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str = target.name) -> None:
            calls.append((name, inputs[0]))

        hooks.append(module.register_forward_pre_hook(note))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _group(targets: Sequence[Target]) -> Group:
    names, widths = (tuple(t.name for t in targets)), tuple(t.out_features for t in targets)
    return Group(names, targets[0].in_features, widths)


def _joined_bias(layers: Sequence[nn.Linear]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    each = [
        layer.bias.detach() if layer.bias is not None else layer.weight.new_zeros(layer.out_features)
        for layer in layers
    ]
    return torch.cat(each)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor, widths: list[int]) -> Tensor:
    """x Wᵀ + bias [..., T, O], and the current step's adapters on top."""
    step = current()
    if step.arena is None:
        return F.linear(x, weight, bias)
    y = F.linear(x, weight, bias)
    factors = step.arena.factors(offset, widths)
    add_lora(y.view(-1, len(weight)), x.reshape(-1, x.shape[-1]), factors, step.slot_tiles)
    return y


_SCHEMA = "(Tensor x, Tensor weight, Tensor? bias, Tensor offset, int[] widths) -> Tensor"
_operator = torch.library.custom_op("okavango::linear", _linear, mutates_args=(), schema=_SCHEMA)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor, widths: list[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
