"""Computes whole steps of Llama-like decoders in native code, one call a step: see native/step.cpp.

Takes the decoder's weights over, packed: its own linear layers are empty afterwards.
"""

# Shapes: T rows of the step, D decoder width, V vocabulary, R rank, K inputs, N outputs

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from ctypes import c_int32, c_int64
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from okavango.modalities.lora import LoraWeights, Target
from okavango.modalities.memory import drop_pages, give_back, lazy_zeros
from okavango.platform.errors import UnsupportedError
from okavango.serving.attention import KeyValues
from okavango.serving.backend import RunnerOptions, num_blocks
from okavango.serving.native import library
from okavango.serving.native.embedding import PackedEmbedding
from okavango.serving.native.library import load_library
from okavango.serving.native.packing import LANES, interleave, pack, round_up
from okavango.serving.native.parts import find_parts, rotary_table
from okavango.serving.native.slots import PackedFactors, Slots
from okavango.serving.paged import measure_layers
from okavango.serving.quantised import Quantised
from okavango.serving.scheduler import Step

Join = Callable[[list[Tensor]], Tensor]
_DTYPES = {torch.bfloat16: 1, torch.float32: 0}


class NativeBackend:
    """The kernels over one decoder.

    Raises:
        UnsupportedError: they cannot be built here, or do not compute this decoder.
    """

    name = "native"
    can_follow = False
    is_invariant = True

    def __init__(
        self,
        decoder: PreTrainedModel,
        targets: Sequence[Target],
        options: RunnerOptions,
        quantised: Quantised | None = None,
    ) -> None:
        if options.dtype not in _DTYPES or options.kernels is None:
            raise UnsupportedError(f"{options.dtype} is computed by torch", where="native kernels")
        self._library = load_library(options.kernels)
        self._parts = find_parts(decoder, options.block_size)
        self._options = options
        self._kept: list[Tensor] = []  # what the kernels point to
        self._shapes = shapes = measure_layers(decoder)
        self.num_blocks = num_blocks(shapes, options)
        self.caches = self._allocate()
        self.slots = Slots(targets, options)
        self._quantised = quantised
        self._weights = _Weights(decoder, options.dtype if quantised is None else torch.int8)
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

    def replay(self, step: Step, rows: Sequence[int]) -> Tensor | None:
        return None

    def follow(self, step: Step, tokens: Tensor) -> Tensor:
        raise AssertionError("a CPU computes a step before it is asked for the next one")

    def close(self) -> None:
        """Nothing goes on beside steps."""

    def _allocate(self) -> list[KeyValues]:
        """A block's keys and values lie together, over all layers: whoever reads one reads on from there."""
        shape, size = self._shapes[0], self._options.block_size
        each = (len(self._shapes), shape.heads, 2, size, shape.key_width)
        pool = lazy_zeros((self.num_blocks, *each), self._options.dtype)
        return [
            KeyValues(pool[:, i, :, 0].transpose(0, 1), pool[:, i, :, 1].transpose(0, 1), shape.window)
            for i, shape in enumerate(self._shapes)
        ]

    def _describe(self, decoder: PreTrainedModel) -> library.Model:
        parts, options, config = self._parts, self._options, decoder.config.get_text_config()
        cosines, sines = rotary_table(decoder, config.max_position_embeddings)
        layers = [
            self._layer(layer, cache, i)
            for i, (layer, cache) in enumerate(zip(parts.layers, self.caches, strict=True))
        ]
        head = self._head(decoder)
        return library.Model(
            width=config.hidden_size,
            inner=parts.inner,
            heads=parts.heads,
            kv_heads=parts.kv_heads,
            head_width=parts.head_width,
            vocabulary=self._vocabulary,
            block_size=options.block_size,
            block_stride=self.caches[0].keys.stride(1),
            head_stride=self.caches[0].keys.stride(0),
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
            slots=self.slots.addresses.data_ptr(),
            places=self.slots.places.data_ptr(),
            num_targets=len(self.slots.numbers),
        )

    def _head(self, decoder: PreTrainedModel) -> library.Linear:
        output = decoder.get_output_embeddings()
        head = self._linear([output], lambda own: own[0], ())
        if output.weight is decoder.get_input_embeddings().weight:
            decoder.set_input_embeddings(PackedEmbedding(self._weights.latest))
        output.weight.data = output.weight.data.new_empty(0)
        return head

    def _layer(self, layer: Any, cache: KeyValues, index: int) -> library.Layer:
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
        return self._linear(modules, torch.cat, [f"{prefix}.{name}" for name in names], panels)

    def _gated(self, mlp: nn.Module, prefix: str) -> library.Linear:
        modules: list[Any] = [mlp.get_submodule(name) for name in ("gate_proj", "up_proj")]
        panels = [(i, p) for p in range(len(modules[0].weight) // LANES) for i in range(2)]
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        return self._linear(modules, lambda own: interleave(*own), names, panels)

    def _linear(
        self,
        modules: Sequence[Any],
        join: Join,
        names: Sequence[str],
        panels: Sequence[tuple[int, int]] = (),
    ) -> library.Linear:
        """Layers as one, their rows joined by `join`. `panels`: whose each panel is, and which of its own."""
        numbers = [self.slots.numbers[name] for name in names]
        table = torch.tensor(panels, dtype=torch.int32).view(-1, 2).T.contiguous()
        packed, scales = self._pack(modules, join)
        linear = library.Linear(
            weights=self._weights.put(packed),
            bias=self._bias(modules, join),
            scales=scales,
            inputs=modules[0].weight.shape[1],
            panels=len(packed),
            num_targets=len(numbers),
            targets=(c_int64 * 3)(*numbers),
            panel_target=self._keep(table[0].contiguous()),
            panel_index=self._keep(table[1].contiguous()),
        )
        for module in modules:
            drop_pages(module.weight)
        for module in modules if names else ():
            module.weight.data = module.weight.data.new_empty(0)
        del packed
        give_back()  # else what layers were joined in adds up: up to 100 MiB on the starter
        return linear

    def _pack(self, modules: Sequence[Any], join: Join) -> tuple[Tensor, int | None]:
        dtype = self._options.dtype
        if self._quantised is None:
            return pack(join([module.weight.detach() for module in modules]), dtype), None
        int8s = [self._quantised.pop(module) for module in modules]
        scales = join([int8.scales for int8 in int8s])
        return pack(join([int8.values for int8 in int8s]), dtype, torch.int8), self._padded(scales)

    def _bias(self, modules: Sequence[Any], join: Join) -> int | None:
        if all(module.bias is None for module in modules):
            return None
        each = [m.bias if m.bias is not None else m.weight.new_zeros(len(m.weight)) for m in modules]
        return self._padded(join([bias.detach() for bias in each]))

    def _padded(self, values: Tensor) -> int:
        """The address of a float for every column of every panel."""
        padded = torch.zeros(round_up(len(values)))
        padded[: len(values)] = values
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
    """All packed weights behind each other, in the order of their use. `latest`: what came last."""

    def __init__(self, decoder: PreTrainedModel, dtype: torch.dtype) -> None:
        output = decoder.get_output_embeddings()
        layers = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
        size = sum(m.weight.numel() for m in layers) + LANES * output.weight.shape[1]
        self._tensor = lazy_zeros((size,), dtype, huge=True)
        self._end = 0
        self.latest = self._tensor[:0]

    def put(self, packed: Tensor) -> int:
        """The address of a copy."""
        self.latest = self._tensor[self._end : self._end + packed.numel()].view(packed.shape)
        self.latest.copy_(packed)
        self._end += packed.numel()
        return self.latest.data_ptr()


def _chunks(step: Step) -> Any:
    found, row, table = [], 0, 0
    for chunk in step.chunks:
        found.append(library.Chunk(row, chunk.count, chunk.start, table))
        row += chunk.count
        table += len(chunk.sequence.blocks)
    return (library.Chunk * len(found))(*found)
