"""A decoder's layers as torch.compile makes them, beside transformers' own.

Which of the two runs is the current step's: graphs are made of compiled layers, on a thread of its own, while
steps go on with plain ones. All layers share what is compiled, for what differs between them is tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from okavango.serving.cuda.state import current

log = logging.getLogger(__name__)

# One compiled form a number of rows, and one for any number; torch gives up beyond its limit.
_FORMS = 128


class _Layer:
    """A layer's forward, in the form that the current step asks for."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self._plain = plain
        self._forms = {
            "fixed": torch.compile(plain, fullgraph=True, dynamic=False),
            "any": torch.compile(plain, fullgraph=True, dynamic=True),
        }

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        form = current().form
        return (self._plain if form is None else self._forms[form])(*inputs, **options)


def install_forms(decoder: PreTrainedModel) -> bool:
    """Give the decoder's layers compiled forms; False where it has no list of layers to compile."""
    layers = getattr(getattr(decoder, decoder.base_model_prefix, None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        log.info("%s has no list of layers: graphs are made of plain ones", type(decoder).__name__)
        return False
    raise_limit()
    for layer in layers:
        layer.forward = _Layer(layer.forward)
    return True


def raise_limit() -> None:
    """Let this thread compile a layer for as many numbers of rows as there are graphs."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _FORMS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * _FORMS)
