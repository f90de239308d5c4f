"""Runs one step through the decoder. Owns the weights, the KV tensors and the slot arena.

Decides nothing: which sequences, blocks and slots is the scheduler's; which token is the sampler's.
"""

# Shapes: T rows of the step, D decoder width, V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from okavango.modalities.base import Base, load_decoder
from okavango.modalities.lora import LoraWeights, SlotArena, StepSlots, Target, find_targets, install
from okavango.platform.errors import UnsupportedError
from okavango.serving.attention import NAME, Decode, LayerCache, Prefill, StepLayout
from okavango.serving.scheduler import Chunk, Step


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
        UnsupportedError: the decoder does not go through transformers' attention interface.
    """

    def __init__(self, base: Base, options: RunnerOptions) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.decoder = load_decoder(base, options.dtype, options.device, attention=NAME)
        self.targets: tuple[Target, ...] = find_targets(self.decoder)
        self._slots = StepSlots()
        self._arena = SlotArena(
            self.targets, options.slots + 1, options.max_rank, options.dtype, options.device
        )
        install(self.decoder, self._arena, self._slots, self.targets)
        self._layout = StepLayout()
        self._attentions = _attention_modules(self.decoder)
        self.num_blocks = self._allocate()
        self._check_interface()

    def load(self, slot: int, weights: LoraWeights) -> None:
        self._arena.write(slot, weights)

    @torch.inference_mode()
    def run(self, step: Step, rows: Sequence[int]) -> Tensor:
        """Compute a step's chunks and return the logits [len(rows), V] after these of its rows."""
        self._slots.segments = step.segments
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
        size = self.options.block_size
        slots, prefills, decodes, row = [], [], [], 0
        for chunk in chunks:
            blocks = chunk.sequence.blocks
            slots += [blocks[p // size] * size + p % size for p in range(chunk.start, chunk.end)]
            if chunk.count == 1:
                decodes.append((row, chunk.end, blocks))
            else:
                prefills.append(Prefill(row, row + chunk.count, chunk.start, self._tensor(blocks)))
            row += chunk.count
        self._layout.slots = self._tensor(slots)
        self._layout.prefills = prefills
        self._layout.decode = self._decode_layout(decodes) if decodes else None

    def _decode_layout(self, decodes: Sequence[tuple[int, int, list[int]]]) -> Decode:
        longest = max(len(blocks) for _, _, blocks in decodes)
        return Decode(
            rows=self._tensor([row for row, _, _ in decodes]),
            blocks=self._tensor([blocks + [0] * (longest - len(blocks)) for _, _, blocks in decodes]),
            lengths=self._tensor([length for _, length, _ in decodes]),
        )

    def _allocate(self) -> int:
        """Give every layer its cache; the number of blocks that fit."""
        config = self.decoder.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        element = torch.empty(0, dtype=self.options.dtype).element_size()
        block_bytes = 2 * len(self._attentions) * self.options.block_size * heads * width * element
        blocks = max(1, self.options.kv_bytes // block_bytes)
        shape = (blocks, self.options.block_size, heads, width)
        for module in self._attentions:
            cache = LayerCache(shape, self._layout, self.options.dtype, self.device)
            module.okavango_cache = cache  # type: ignore[assignment]
        return blocks

    @torch.inference_mode()
    def _check_interface(self) -> None:
        """Run one token, so that a decoder which goes round the interface is refused at start."""
        token = self._tensor([0])
        self._layout.slots, self._layout.prefills = token, ()
        self._layout.decode = Decode(rows=token, blocks=token[None], lengths=token + 1)
        self._layout.calls = 0
        self.decoder(input_ids=token[None], position_ids=token[None], use_cache=False)
        if self._layout.calls != len(self._attentions):
            name = type(self.decoder).__name__
            raise UnsupportedError(f"{name} does not use transformers' attention interface in every layer")

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def _attention_modules(decoder: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules that call the attention interface: those that know their layer and scale scores."""
    found = list(_layered(decoder))
    if not found:
        raise UnsupportedError(f"{type(decoder).__name__} has no attention layers that can be paged")
    return found


def _layered(decoder: PreTrainedModel) -> Iterator[torch.nn.Module]:
    for module in decoder.modules():
        if getattr(module, "layer_idx", None) is not None and type(module).__name__.endswith("Attention"):
            yield module
