"""Computes whole steps of Llama-like decoders in native code, one call a step: see native/step.cpp.

Takes the decoder's weights over, packed: its own linear layers are empty afterwards.
"""

# Shapes: T rows of the step, D decoder width, V vocabulary, R rank, K inputs, N outputs

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import c_int32, c_int64
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from okavango.modalities.lora import LoraWeights, Target
from okavango.modalities.memory import lazy_zeros
from okavango.platform.errors import UnsupportedError
from okavango.serving.attention import LayerCache, StepLayout
from okavango.serving.backend import RunnerOptions, num_blocks
from okavango.serving.native import library
from okavango.serving.native.library import load_library
from okavango.serving.native.packing import LANES, interleave, pack, round_up
from okavango.serving.native.parts import find_parts, rotary_table
from okavango.serving.native.slots import PackedFactors, Slots
from okavango.serving.paged import measure_layers
from okavango.serving.scheduler import Step

_DTYPES = {torch.bfloat16: 1, torch.float32: 0}


class NativeBackend:
    """The kernels over one decoder.

    Raises:
        UnsupportedError: they cannot be built here, or do not compute this decoder.
    """

    name = "native"
    is_invariant = True

    def __init__(self, decoder: PreTrainedModel, targets: Sequence[Target], options: RunnerOptions) -> None:
        if options.dtype not in _DTYPES or options.kernels is None:
            raise UnsupportedError(f"{options.dtype} is computed by torch", where="native kernels")
        self._library = load_library(options.kernels)
        self._parts = find_parts(decoder, options.block_size)
        self._options = options
        self._kept: list[Tensor] = []  # what the kernels point to
        self._shapes = shapes = measure_layers(decoder)
        self.num_blocks = num_blocks(shapes, options)
        size, device = options.block_size, torch.device("cpu")
        self.caches = [
            LayerCache(s, self.num_blocks, size, StepLayout(), options.dtype, device) for s in shapes
        ]
        self.slots = Slots(targets, options)
        self._weights = _Weights(decoder, options.dtype)
        self._vocabulary = decoder.get_output_embeddings().weight.shape[0]
        model = self._describe(decoder)
        is_half = _DTYPES[options.dtype]
        self._decoder = self._library.okv_create(ctypes.byref(model), is_half)
        for rest in decoder.parameters():  # views into the file, all of which they would keep in memory
            rest.data = rest.data.clone()
        weakref.finalize(self, self._library.okv_destroy, self._decoder, is_half)

    def pack(self, weights: LoraWeights) -> PackedFactors:
        return self.slots.pack(weights)

    def load(self, slot: int, packed: PackedFactors) -> None:
        self.slots.write(slot, packed)

    def compute(self, embeddings: Tensor, step: Step, rows: Sequence[int]) -> Tensor:
        x = embeddings.float().contiguous()
        logits = torch.empty(len(rows), self._vocabulary)
        tables = [block for chunk in step.chunks for block in chunk.sequence.blocks]
        described = library.Step(
            rows=len(x),
            num_chunks=len(step.chunks),
            num_segments=len(step.segments),
            num_outputs=len(rows),
            x=x.data_ptr(),
            chunks=_chunks(step),
            tables=(c_int32 * len(tables))(*tables),
            segments=(library.Segment * len(step.segments))(*starmap(library.Segment, step.segments)),
            outputs=(c_int64 * len(rows))(*rows),
            logits=ctypes.cast(logits.data_ptr(), ctypes.POINTER(ctypes.c_float)),
        )
        self._library.okv_run(self._decoder, _DTYPES[self._options.dtype], ctypes.byref(described))
        return logits

    def _describe(self, decoder: PreTrainedModel) -> library.Model:
        parts, options, config = self._parts, self._options, decoder.config.get_text_config()
        cosines, sines = rotary_table(decoder, config.max_position_embeddings)
        layers = [
            self._layer(layer, cache, i)
            for i, (layer, cache) in enumerate(zip(parts.layers, self.caches, strict=True))
        ]
        output = decoder.get_output_embeddings()
        head = self._linear([output], pack(output.weight.detach(), options.dtype), ())
        if output.weight is not decoder.get_input_embeddings().weight:
            output.weight.data = output.weight.data.new_empty(0)
        return library.Model(
            width=config.hidden_size,
            inner=parts.inner,
            heads=parts.heads,
            kv_heads=parts.kv_heads,
            head_width=parts.head_width,
            vocabulary=self._vocabulary,
            blocks=self.num_blocks,
            block_size=options.block_size,
            max_rank=round_up(options.max_rank),
            activation=parts.activation,
            threads=torch.get_num_threads(),
            num_layers=len(layers),
            eps=parts.eps,
            scale=parts.scale,
            cosines=self._keep(cosines),
            sines=self._keep(sines),
            final_norm=self._floats(decoder.model.norm.weight),
            layers=(library.Layer * len(layers))(*layers),
            head=head,
            slots=self.slots.tensor.data_ptr(),
            places=self.slots.places.data_ptr(),
            slot_size=self.slots.size,
            num_targets=len(self.slots.numbers),
        )

    def _layer(self, layer: Any, cache: LayerCache, index: int) -> library.Layer:
        attention, mlp = layer.self_attn, layer.mlp
        prefix = f"model.layers.{index}"
        return library.Layer(
            attention_norm=self._floats(layer.input_layernorm.weight),
            mlp_norm=self._floats(layer.post_attention_layernorm.weight),
            query_norm=self._norm(attention, "q_norm"),
            key_norm=self._norm(attention, "k_norm"),
            qkv=self._fused(attention, ("q_proj", "k_proj", "v_proj"), f"{prefix}.self_attn"),
            out=self._fused(attention, ("o_proj",), f"{prefix}.self_attn"),
            gate_up=self._gated(mlp, f"{prefix}.mlp"),
            down=self._fused(mlp, ("down_proj",), f"{prefix}.mlp"),
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            window=self._shapes[index].window or 0,
        )

    def _fused(self, owner: nn.Module, names: Sequence[str], prefix: str) -> library.Linear:
        """Layers that see the same input, as one: their outputs stand behind each other."""
        modules: list[Any] = [owner.get_submodule(name) for name in names]
        panels = [(i, p) for i, module in enumerate(modules) for p in range(len(module.weight) // LANES)]
        weights = torch.cat([module.weight.detach() for module in modules])
        packed = pack(weights, self._options.dtype)
        return self._linear(modules, packed, [f"{prefix}.{name}" for name in names], panels)

    def _gated(self, mlp: nn.Module, prefix: str) -> library.Linear:
        modules: list[Any] = [mlp.get_submodule(name) for name in ("gate_proj", "up_proj")]
        weights = interleave(*(module.weight.detach() for module in modules))
        panels = [(i, p) for p in range(len(weights) // LANES // 2) for i in range(2)]
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        return self._linear(modules, pack(weights, self._options.dtype), names, panels, gated=True)

    def _linear(
        self,
        modules: Sequence[Any],
        packed: Tensor,
        names: Sequence[str],
        panels: Sequence[tuple[int, int]] = (),
        *,
        gated: bool = False,
    ) -> library.Linear:
        numbers = [self.slots.numbers[name] for name in names]
        table = torch.tensor(panels, dtype=torch.int32).view(-1, 2).T.contiguous()
        linear = library.Linear(
            weights=self._weights.put(packed),
            bias=self._bias(modules, gated),
            inputs=modules[0].weight.shape[1],
            panels=len(packed),
            num_targets=len(numbers),
            targets=(c_int64 * 3)(*numbers),
            panel_target=self._keep(table[0].contiguous()),
            panel_index=self._keep(table[1].contiguous()),
        )
        for module in modules if names else ():
            module.weight.data = module.weight.data.new_empty(0)
        return linear

    def _bias(self, modules: Sequence[Any], gated: bool) -> int | None:
        if all(module.bias is None for module in modules):
            return None
        each = [m.bias if m.bias is not None else m.weight.new_zeros(len(m.weight)) for m in modules]
        bias = interleave(each[0], each[1]) if gated else torch.cat(each)
        padded = torch.zeros(round_up(len(bias)))
        padded[: len(bias)] = bias.detach()
        return self._keep(padded)

    def _norm(self, attention: nn.Module, name: str) -> int | None:
        norm = getattr(attention, name, None)
        return None if norm is None else self._floats(norm.weight)

    def _floats(self, weight: Tensor) -> int:
        return self._keep(weight.detach().float().contiguous().clone())

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


class _Weights:
    """All packed weights behind each other, in the order of their use."""

    def __init__(self, decoder: PreTrainedModel, dtype: torch.dtype) -> None:
        output = decoder.get_output_embeddings()
        layers = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
        size = sum(m.weight.numel() for m in layers) + LANES * output.weight.shape[1]
        self._tensor = lazy_zeros((size,), dtype, huge=True)
        self._end = 0

    def put(self, packed: Tensor) -> int:
        """The address of a copy."""
        place = self._tensor[self._end : self._end + packed.numel()]
        place.copy_(packed.flatten())
        self._end += packed.numel()
        return place.data_ptr()


def _chunks(step: Step) -> Any:
    found, row, table = [], 0, 0
    for chunk in step.chunks:
        found.append(library.Chunk(row, chunk.count, chunk.start, table))
        row += chunk.count
        table += len(chunk.sequence.blocks)
    return (library.Chunk * len(found))(*found)
