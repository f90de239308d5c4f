"""Computes steps with transformers' own modules: attention over pages, adapters slot by slot. Plain torch.

Serves every architecture, on every device, and is the reference for the native kernels (serving/native).
"""

# Shapes: T rows of the step, D decoder width, V vocabulary

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from okavango.modalities.lora import LoraWeights, SlotArena, StepSlots, Target, install
from okavango.modalities.rope import places_of, rope_of
from okavango.platform.errors import UnsupportedError
from okavango.serving.attention import MEASURE, NAME, Decode, LayerCache, LayerShape, Prefill, StepLayout
from okavango.serving.backend import RunnerOptions, num_blocks
from okavango.serving.scheduler import Chunk, Step
from okavango.serving.sequence import Sequence as EngineSequence

# Decoding sequences are padded to the longest of their group; up to so many blocks they share one.
_SHORT_BLOCKS = 16


class TorchBackend:
    """transformers' modules with paged attention and slots put in. Changes the decoder for good."""

    name = "torch"
    is_invariant = False

    def __init__(self, decoder: PreTrainedModel, targets: Sequence[Target], options: RunnerOptions) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.can_follow = self.device.type != "cpu"  # which has computed a step when asked for the next
        self.decoder = decoder
        self._slots = StepSlots()
        self._arena = SlotArena(targets, options.slots + 1, options.max_rank, options.dtype, options.device)
        install(decoder, self._arena, self._slots, targets)
        self._layout = StepLayout()
        self._rope = rope_of(decoder)
        self._places: WeakKeyDictionary[EngineSequence, tuple[NDArray[np.int64], int]] = WeakKeyDictionary()
        self.caches = self._allocate()
        self.num_blocks = self.caches[0].keys.shape[1]

    def pack(self, weights: LoraWeights) -> LoraWeights:
        dtype, factors = self.options.dtype, weights.factors.items()
        packed = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in factors}
        return LoraWeights(_locked(packed) if self.device.type == "cuda" else packed, weights.rank)

    def load(self, slot: int, packed: LoraWeights) -> None:
        self._arena.write(slot, packed)

    def compute(self, embeddings: Tensor, step: Step, rows: Sequence[int]) -> Tensor:
        self._slots.segments, self._slots.rows = step.segments, step.num_tokens
        self._lay_out(step.chunks)
        positions = [p for chunk in step.chunks for p in range(chunk.start, chunk.end)]
        with self._rope.at(self._in_grids(step.chunks)) if self._rope is not None else nullcontext():
            output = self.decoder(
                inputs_embeds=embeddings[None],
                position_ids=self._tensor(positions)[None],
                use_cache=False,
                logits_to_keep=self._tensor(rows),
            )
        logits: Tensor = output.logits[0]
        return logits

    def replay(self, step: Step, rows: Sequence[int]) -> Tensor | None:
        return None

    def follow(self, step: Step, tokens: Tensor) -> Tensor:
        return self.compute(self.decoder.get_input_embeddings()(tokens), step, range(len(tokens)))

    def close(self) -> None:
        """Nothing goes on beside steps."""

    def _in_grids(self, chunks: Sequence[Chunk]) -> Tensor:
        """[3, 1, T]: the rows' places, of a decoder that tells a picture's positions by row and column."""
        found = []
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence not in self._places:
                self._places[sequence] = places_of(sequence.num_prompt, sequence.request.prompt.spans)
            places, after = self._places[sequence]
            later = np.arange(max(chunk.start, sequence.num_prompt), chunk.end) - sequence.num_prompt + after
            found += [places[:, chunk.start : chunk.end], np.broadcast_to(later, (3, len(later)))]
        return torch.from_numpy(np.concatenate(found, axis=1))[:, None].to(self.device)

    def _lay_out(self, chunks: Sequence[Chunk]) -> None:
        size, layout = self.options.block_size, self._layout
        slots: list[int] = []
        unfilled: list[int] = []
        prefills: list[Prefill] = []
        decodes: dict[int, list[tuple[int, Chunk]]] = defaultdict(list)
        row = 0
        for chunk in chunks:
            blocks, held = chunk.sequence.blocks, chunk.sequence.held
            slots += [blocks[p // size] * size + p % size for p in range(chunk.start, chunk.end)]
            if chunk.end % size and chunk.end - chunk.end % size >= chunk.start:
                unfilled.append(blocks[chunk.end // size])
            if chunk.count == 1:
                decodes[max(len(held), _SHORT_BLOCKS).bit_length()].append((row, chunk))
            else:
                gone = chunk.sequence.num_dropped * size
                mutual = [(start - gone, end - gone) for start, end in _mutual(chunk)]
                seen = chunk.start - gone
                prefills.append(Prefill(row, row + chunk.count, seen, self._tensor(held), mutual))
            row += chunk.count
        layout.slots = self._tensor(slots)
        layout.unfilled = self._tensor(unfilled) if unfilled else None
        layout.prefills = prefills
        layout.decodes = [self._decode_group(group) for group in decodes.values()]

    def _decode_group(self, group: Sequence[tuple[int, Chunk]]) -> Decode:
        size = self.options.block_size
        tables = [chunk.sequence.held for _, chunk in group]
        longest = max(map(len, tables))
        # its own first block pads a table, never another sequence's: see serving/attention.py
        padded = [block for table in tables for block in (table + table[:1] * (longest - len(table)))]
        return Decode(
            rows=self._tensor([row for row, _ in group]),
            blocks=self._tensor(padded),
            lengths=self._tensor([chunk.end - chunk.sequence.num_dropped * size for _, chunk in group]),
        )

    def _allocate(self) -> list[LayerCache]:
        """Give every layer its cache, as wide as the layer turns out to be."""
        shapes, options = measure_layers(self.decoder), self.options
        blocks = num_blocks(shapes, options)
        caches = [
            LayerCache(shape, blocks, options.block_size, self._layout, options.dtype, self.device)
            for shape in shapes
        ]
        for module, cache in zip(attention_modules(self.decoder), caches, strict=True):
            module.okavango_cache = cache  # type: ignore[assignment]
        self.decoder.set_attn_implementation(NAME)
        return caches

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def _mutual(chunk: Chunk) -> list[tuple[int, int]]:
    """Ranges of positions that see each other, of those that the chunk computes."""
    spans = chunk.sequence.request.prompt.spans
    return [
        (span.start, span.end)
        for span in spans
        if span.looks_ahead and span.start < chunk.end and chunk.start < span.end
    ]


def _locked(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The same factors in one piece of page-locked memory, which a GPU reads while the host goes on."""
    tensors = [tensor for pair in factors.values() for tensor in pair]
    if not tensors:
        return {}
    flat = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory()
    pieces = flat.split([tensor.numel() for tensor in tensors])
    views = [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
    return dict(zip(factors, zip(views[::2], views[1::2], strict=True), strict=True))


@torch.inference_mode()
def measure_layers(decoder: PreTrainedModel) -> list[LayerShape]:
    """Every attention layer as a first call shows it. Leaves the decoder on another attention.

    Raises:
        UnsupportedError: a layer does not use transformers' attention interface.
    """
    attentions = attention_modules(decoder)
    decoder.set_attn_implementation(MEASURE)
    token = torch.zeros((1, 1), dtype=torch.long, device=decoder.device)
    decoder(input_ids=token, position_ids=token, use_cache=False)
    shapes = [getattr(module, "okavango_shape", None) for module in attentions]
    if None in shapes:
        raise UnsupportedError("it does not use transformers' attention interface in every layer")
    return shapes  # type: ignore[return-value]


def attention_modules(decoder: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules that call the attention interface: those that know their layer and scale scores."""
    found = list(_layered(decoder))
    if not found:
        raise UnsupportedError("it has no attention layers that can be paged")
    return found


def _layered(decoder: PreTrainedModel) -> Iterator[torch.nn.Module]:
    for module in decoder.modules():
        if getattr(module, "layer_idx", None) is not None and type(module).__name__.endswith("Attention"):
            yield module
