"""Runs one step through the decoder. Owns the weights, the KV tensors and the slot arena.

Decides nothing: which sequences, blocks and slots is the scheduler's; which token is the sampler's.
"""

# Shapes: T rows of the step, D decoder width, V vocabulary

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from okavango.modalities.base import Base, load_decoder
from okavango.modalities.lora import LoraWeights, SlotArena, StepSlots, Target, find_targets, install
from okavango.platform.errors import ConfigError, OkavangoError, UnsupportedError
from okavango.serving.attention import MEASURE, NAME, Decode, LayerCache, LayerShape, Prefill, StepLayout
from okavango.serving.scheduler import Chunk, Step
from okavango.serving.selfcheck import check_paging

# Decoding sequences are padded to the longest of their group; up to so many blocks they share one.
_SHORT_BLOCKS = 16
_FEWEST_BLOCKS, _FEWEST_TOKENS = 2, 64


@dataclass(frozen=True)
class RunnerOptions:
    """`kv_bytes`: memory for keys and values; the number of blocks follows from it."""

    dtype: torch.dtype
    device: str
    block_size: int
    kv_bytes: int
    slots: int
    max_rank: int


class Runner:
    """The decoder with its cache and slots.

    Raises:
        UnsupportedError: the decoder does not go through transformers' attention interface, or has layers
            that share something else between tokens.
        ConfigError: there is no memory for a conversation.
    """

    def __init__(self, base: Base, options: RunnerOptions) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.decoder = load_decoder(base, options.dtype, options.device, attention="eager")
        self.targets: tuple[Target, ...] = find_targets(self.decoder)
        self._slots = StepSlots()
        self._arena = SlotArena(
            self.targets, options.slots + 1, options.max_rank, options.dtype, options.device
        )
        install(self.decoder, self._arena, self._slots, self.targets)
        self._layout = StepLayout()
        with _named(self.decoder):
            self.num_blocks = self._allocate(_attention_modules(self.decoder))
            check_paging(self)

    def load(self, slot: int, weights: LoraWeights) -> None:
        self._arena.write(slot, weights)

    @torch.inference_mode()
    def run(self, step: Step, rows: Sequence[int]) -> Tensor:
        """Compute a step's chunks and return the logits [len(rows), V] after these of its rows."""
        self._slots.segments, self._slots.rows = step.segments, step.num_tokens
        self._lay_out(step.chunks)
        positions = [p for chunk in step.chunks for p in range(chunk.start, chunk.end)]
        output = self.decoder(
            inputs_embeds=self._embed(step.chunks)[None],
            position_ids=self._tensor(positions)[None],
            use_cache=False,
            logits_to_keep=self._tensor(rows),
        )
        return output.logits[0]

    def _embed(self, chunks: Sequence[Chunk]) -> Tensor:
        """Input embeddings [T, D]: the tokens' own, and what the heads made of the media."""
        ids = [token for chunk in chunks for token in chunk.sequence.tokens[chunk.start : chunk.end]]
        embeddings: Tensor = self.decoder.get_input_embeddings()(self._tensor(ids))
        offset = 0
        for chunk in chunks:
            for span, vectors in zip(chunk.sequence.request.prompt.spans, chunk.sequence.embeds, strict=True):
                start, end = max(span.start, chunk.start), min(span.end, chunk.end)
                if start < end:
                    rows = slice(offset + start - chunk.start, offset + end - chunk.start)
                    embeddings[rows] = vectors[start - span.start : end - span.start].to(embeddings)
            offset += chunk.count
        return embeddings

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

    def _allocate(self, attentions: Sequence[torch.nn.Module]) -> int:
        """Give every layer its cache, as wide as the layer turns out to be; the number of blocks that fit."""
        shapes = self._measure(attentions)
        options = self.options
        positions = sum(s.heads * (s.key_width + s.value_width) for s in shapes) * options.dtype.itemsize
        blocks = options.kv_bytes // (positions * options.block_size)
        if blocks < _FEWEST_BLOCKS or blocks * options.block_size < _FEWEST_TOKENS:
            raise ConfigError(
                f"{options.kv_bytes:,} bytes hold {blocks * options.block_size} tokens' keys and values",
                where="kv_bytes",
                remedy="give it more --kv-memory",
            )
        for module, shape in zip(attentions, shapes, strict=True):
            cache = LayerCache(shape, blocks, options.block_size, self._layout, options.dtype, self.device)
            module.okavango_cache = cache  # type: ignore[assignment]
        self.decoder.set_attn_implementation(NAME)
        return blocks

    @torch.inference_mode()
    def _measure(self, attentions: Sequence[torch.nn.Module]) -> list[LayerShape]:
        self.decoder.set_attn_implementation(MEASURE)
        token = self._tensor([0])
        self.decoder(input_ids=token[None], position_ids=token[None], use_cache=False)
        shapes = [getattr(module, "okavango_shape", None) for module in attentions]
        if None in shapes:
            raise UnsupportedError("it does not use transformers' attention interface in every layer")
        return shapes  # type: ignore[return-value]

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


@contextmanager
def _named(decoder: PreTrainedModel) -> Iterator[None]:
    """Whatever a decoder's first runs raise means that it cannot be served."""
    name = type(decoder).__name__
    try:
        yield
    except UnsupportedError as error:
        raise UnsupportedError(error.message, where=name, remedy=error.remedy) from error
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, OkavangoError):
            raise
        raise UnsupportedError(f"fails when it is computed in pieces: {error!r}", where=name) from error


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
