"""Which decoders the native kernels compute, and where their parts are.

Llama's shape: pre-norms, rotary positions, grouped queries, a gated MLP. The list of classes only says which
are worth a try; whether the numbers are right is measured when an engine starts (serving/selfcheck.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from okavango.platform.errors import UnsupportedError
from okavango.serving.native.packing import LANES

_CLASSES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
# positions that a table can hold: those that depend on nothing but the position
_ROPE = {"default", "linear", "llama3", "yarn"}
_WIDEST_HEAD = 256


@dataclass(frozen=True)
class Parts:
    """A decoder that the kernels compute: what its layers share, and the layers themselves."""

    layers: tuple[nn.Module, ...]
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    activation: int
    eps: float
    scale: float


def find_parts(decoder: PreTrainedModel, block_size: int) -> Parts:
    """Raises UnsupportedError, saying which part the kernels do not compute."""
    name = type(decoder).__name__
    if name not in _CLASSES:
        raise _unserved(f"{name} is computed by torch")
    config = decoder.config.get_text_config()
    layers = tuple(decoder.model.layers)
    attention = layers[0].self_attn
    parts = Parts(
        layers=layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_width=attention.head_dim,
        inner=config.intermediate_size,
        activation=_ACTIVATIONS.get(config.hidden_act, -1),
        eps=config.rms_norm_eps,
        scale=attention.scaling,
    )
    for fault in _faults(parts, config, block_size):
        raise _unserved(fault)
    return parts


def _faults(parts: Parts, config: object, block_size: int) -> Iterator[str]:
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if parts.activation < 0:
        yield f"activation {getattr(config, 'hidden_act', None)!r}"
    if rope not in _ROPE or getattr(config, "partial_rotary_factor", None) not in (None, 1.0):
        yield f"rotary positions of type {rope!r}"
    widths = (config.hidden_size, parts.inner, parts.head_width, block_size)  # type: ignore[attr-defined]
    if any(width % LANES for width in widths) or parts.head_width > _WIDEST_HEAD:
        yield f"widths {widths} are no multiples of {LANES}"


def _unserved(reason: str) -> UnsupportedError:
    return UnsupportedError(reason, where="native kernels")


@torch.inference_mode()
def rotary_table(decoder: PreTrainedModel, context: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [context, head width] of every position, as the decoder itself makes them."""
    rotary = decoder.model.rotary_emb
    positions = torch.arange(context)[None]
    cosines, sines = rotary(torch.zeros(1, 1, 1), positions)
    return cosines[0].float().contiguous(), sines[0].float().contiguous()
