"""Encoders as adapters adapt them: an adapter's LoRA on an encoder's linear layers, for the time of a block.

An encoder serves one adapter at a time, and its runs are few and large. So nothing is packed or copied: the
factors are added where the layers' outputs come by.
"""

# Shapes: r rank, I in, O out features

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from okavango.modalities.encoders import skeleton
from okavango.modalities.lora import LoraWeights, Target

if TYPE_CHECKING:
    from okavango.modalities.base import EncoderSpec


def encoder_targets(spec: EncoderSpec) -> tuple[Target, ...]:
    """Every linear layer that an encoder calls for its features, found without its weights.

    Others cannot be adapted: what pools a vector that nobody asks for, or what a fused attention holds, which
    computes with its layers' weights and never calls them.
    """
    module, run = skeleton(spec)
    called: dict[str, nn.Linear] = {}
    hooks = [
        layer.register_forward_hook(partial(_note, called, name, layer))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return tuple(Target(name, layer.in_features, layer.out_features) for name, layer in called.items())


def _note(called: dict[str, nn.Linear], name: str, layer: nn.Linear, *_: object) -> None:
    called[name] = layer


@contextmanager
def adapted(module: nn.Module, weights: LoraWeights | None) -> Iterator[None]:
    """Within, the module's linear layers add an adapter's update: y + (x Aᵀ) B."""
    factors = weights.factors if weights is not None else {}
    hooks = [
        module.get_submodule(name).register_forward_hook(_adding(a, b)) for name, (a, b) in factors.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adding(a: Tensor, b: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def add(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        low = torch.matmul(x, a.T.to(x))
        return output + torch.matmul(low, b.to(x))

    return add
