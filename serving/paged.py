"""Computes steps with transformers' own modules: attention over pages, adapters slot by slot. Plain torch.

Serves every architecture, on every device, and is the reference for the native kernels (serving/native).
"""

# Shapes: T rows of the step, D decoder width, V vocabulary

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from okavango.modalities.lora import LoraWeights, SlotArena, StepSlots, Target, install
from okavango.platform.errors import UnsupportedError
from okavango.serving.attention import MEASURE, NAME, Decode, LayerCache, LayerShape, Prefill, StepLayout
from okavango.serving.backend import RunnerOptions, num_blocks
from okavango.serving.scheduler import Chunk, Step

# Decoding sequences are padded to the longest of their group; up to so many blocks they share one.
_SHORT_BLOCKS = 16


class TorchBackend:
    """transformers' modules with paged attention and slots put in. Changes the decoder for good."""

    name = "torch"
    is_invariant = False

    def __init__(self, decoder: PreTrainedModel, targets: Sequence[Target], options: RunnerOptions) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.decoder = decoder
        self._slots = StepSlots()
        self._arena = SlotArena(targets, options.slots + 1, options.max_rank, options.dtype, options.device)
        install(decoder, self._arena, self._slots, targets)
        self._layout = StepLayout()
        self.caches = self._allocate()
        self.num_blocks = self.caches[0].keys.shape[1]

    def pack(self, weights: LoraWeights) -> LoraWeights:
        dtype, factors = self.options.dtype, weights.factors.items()
        return LoraWeights({name: (a.to(dtype), b.to(dtype)) for name, (a, b) in factors}, weights.rank)

    def load(self, slot: int, packed: LoraWeights) -> None:
        self._arena.write(slot, packed)

    def compute(self, embeddings: Tensor, step: Step, rows: Sequence[int]) -> Tensor:
        self._slots.segments, self._slots.rows = step.segments, step.num_tokens
        self._lay_out(step.chunks)
        positions = [p for chunk in step.chunks for p in range(chunk.start, chunk.end)]
        output = self.decoder(
            inputs_embeds=embeddings[None],
            position_ids=self._tensor(positions)[None],
            use_cache=False,
            logits_to_keep=self._tensor(rows),
        )
        logits: Tensor = output.logits[0]
        return logits

    def _lay_out(self, chunks: Sequence[Chunk]) -> None:
        size, layout = self.options.block_size, self._layout
        slots: list[int] = []
        unfilled: list[int] = []
        prefills: list[Prefill] = []
        decodes: dict[int, list[tuple[int, Chunk]]] = defaultdict(list)
        row = 0
        for chunk in chunks:
            blocks = chunk.sequence.blocks
            slots += [blocks[p // size] * size + p % size for p in range(chunk.start, chunk.end)]
            if chunk.end % size and chunk.end - chunk.end % size >= chunk.start:
                unfilled.append(blocks[chunk.end // size])
            if chunk.count == 1:
                decodes[max(len(blocks), _SHORT_BLOCKS).bit_length()].append((row, chunk))
            else:
                prefills.append(Prefill(row, row + chunk.count, chunk.start, self._tensor(blocks)))
            row += chunk.count
        layout.slots = self._tensor(slots)
        layout.unfilled = self._tensor(unfilled) if unfilled else None
        layout.prefills = prefills
        layout.decodes = [self._decode_group(group) for group in decodes.values()]

    def _decode_group(self, group: Sequence[tuple[int, Chunk]]) -> Decode:
        tables = [chunk.sequence.blocks for _, chunk in group]
        longest = max(map(len, tables))
        # its own first block pads a table, never another sequence's: see serving/attention.py
        padded = [block for table in tables for block in (table + table[:1] * (longest - len(table)))]
        return Decode(
            rows=self._tensor([row for row, _ in group]),
            blocks=self._tensor(padded),
            lengths=self._tensor([chunk.end for _, chunk in group]),
        )

    def _allocate(self) -> list[LayerCache]:
        """Give every layer its cache, as wide as the layer turns out to be."""
        shapes, options = measure_layers(self.decoder), self.options
        blocks = num_blocks(shapes, options)
        caches = [
            LayerCache(shape, blocks, options.block_size, self._layout, options.dtype, self.device)
            for shape in shapes
        ]
        for module, cache in zip(_attention_modules(self.decoder), caches, strict=True):
            module.okavango_cache = cache  # type: ignore[assignment]
        self.decoder.set_attn_implementation(NAME)
        return caches

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


@torch.inference_mode()
def measure_layers(decoder: PreTrainedModel) -> list[LayerShape]:
    """Every attention layer as a first call shows it. Leaves the decoder on another attention.

    Raises:
        UnsupportedError: a layer does not use transformers' attention interface.
    """
    attentions = _attention_modules(decoder)
    decoder.set_attn_implementation(MEASURE)
    token = torch.zeros((1, 1), dtype=torch.long, device=decoder.device)
    decoder(input_ids=token, position_ids=token, use_cache=False)
    shapes = [getattr(module, "okavango_shape", None) for module in attentions]
    if None in shapes:
        raise UnsupportedError("it does not use transformers' attention interface in every layer")
    return shapes  # type: ignore[return-value]


def _attention_modules(decoder: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules that call the attention interface: those that know their layer and scale scores."""
    found = list(_layered(decoder))
    if not found:
        raise UnsupportedError("it has no attention layers that can be paged")
    return found


def _layered(decoder: PreTrainedModel) -> Iterator[torch.nn.Module]:
    for module in decoder.modules():
        if getattr(module, "layer_idx", None) is not None and type(module).__name__.endswith("Attention"):
            yield module
