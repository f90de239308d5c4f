"""Runs one step through the decoder: embeds tokens and media, and has a backend compute the rest.

Decides nothing: which sequences, blocks and slots is the scheduler's; which token is the sampler's.
"""

# Shapes: T rows of the step, D decoder width, V vocabulary

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from okavango.modalities.base import Base, load_decoder
from okavango.modalities.lora import LoraWeights, Target, find_targets
from okavango.modalities.memory import drop_library_pages, give_back
from okavango.modalities.rope import rope_of
from okavango.platform.errors import OkavangoError, UnsupportedError
from okavango.serving.backend import Backend, RunnerOptions
from okavango.serving.native.backend import NativeBackend
from okavango.serving.paged import TorchBackend
from okavango.serving.quantised import Quantised, quantise
from okavango.serving.scheduler import Chunk, Step
from okavango.serving.selfcheck import check_paging, own_logits

log = logging.getLogger(__name__)


class Runner:
    """The decoder with its cache and slots.

    Raises:
        UnsupportedError: the decoder does not go through transformers' attention interface, or has layers
            that share something else between tokens.
        ConfigError: there is no memory for a conversation.
    """

    def __init__(self, base: Base, options: RunnerOptions) -> None:
        drop_library_pages()
        self.options = options
        self.device = torch.device(options.device)
        self.decoder = load_decoder(base, options.dtype, options.device, attention="eager")
        self.targets: tuple[Target, ...] = find_targets(self.decoder)
        quantised = quantise(self.decoder) if options.quantization else None
        with _named(self.decoder):
            expected = own_logits(self.decoder)
            own = self._cuda(base, expected) or self._native(base, expected, quantised)
            self.backend = own or self._torch(expected)
        self.num_blocks = self.backend.num_blocks
        give_back()

    def pack(self, weights: LoraWeights) -> Any:
        """An adapter in the form that `load` copies; may take long, and is called by any thread."""
        return self.backend.pack(weights)

    def load(self, slot: int, packed: Any) -> None:
        """Copy an adapter into a slot; its former tenant is gone."""
        self.backend.load(slot, packed)

    @property
    def block_bytes(self) -> int:
        """What a block's keys and values take, over all layers."""
        tensors = [tensor for cache in self.backend.caches for tensor in (cache.keys, cache.values)]
        return sum(tensor.nbytes for tensor in tensors) // self.num_blocks

    def park(self, blocks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Every layer's keys and values [K, n, P, D] of these blocks, copied to the host."""
        index = self._tensor(blocks)
        return [
            (cache.keys.index_select(1, index).cpu(), cache.values.index_select(1, index).cpu())
            for cache in self.backend.caches
        ]

    def restore(self, parked: Sequence[tuple[Tensor, Tensor]], first: int, blocks: Sequence[int]) -> None:
        """Fill blocks with what `park` copied, from its block number `first` on."""
        index = self._tensor(blocks)
        for cache, (keys, values) in zip(self.backend.caches, parked, strict=True):
            cache.keys.index_copy_(1, index, keys[:, first:].to(self.device))
            cache.values.index_copy_(1, index, values[:, first:].to(self.device))

    @torch.inference_mode()
    def run(self, step: Step, rows: Sequence[int]) -> Tensor:
        """Compute a step's chunks and return the logits [len(rows), V] after these of its rows, which hold
        until the next run."""
        logits = self.backend.replay(step, rows)
        return logits if logits is not None else self.backend.compute(self._embed(step.chunks), step, rows)

    @property
    def can_follow(self) -> bool:
        """Whether `follow` is to be had."""
        return self.backend.can_follow

    @torch.inference_mode()
    def follow(self, step: Step, tokens: Tensor) -> Tensor:
        """As `run`, of a step of single tokens that only the device knows yet [T]; the logits after each."""
        return self.backend.follow(step, tokens)

    def close(self) -> None:
        """End what the backend does beside steps."""
        self.backend.close()

    def look_up(self, tokens: Sequence[int]) -> Tensor:
        """The tokens' own embeddings [T, D]. Called by any thread."""
        embeddings: Tensor = self.decoder.get_input_embeddings()(self._tensor(tokens))
        return embeddings

    def _torch(self, expected: Tensor) -> Backend:
        self.backend = TorchBackend(self.decoder, self.targets, self.options)
        check_paging(self, expected)
        return self.backend

    def _cuda(self, base: Base, expected: Tensor) -> Backend | None:
        """The kernels for GPUs, likewise; graphs are made beside the steps from now on."""
        if self.options.kernels is None or self.device.type != "cuda":
            return None
        if rope_of(self.decoder) or any(encoder.looks_ahead for encoder in base.encoders.values()):
            log.info("steps are computed by torch: this base's pictures are not for the CUDA kernels")
            return None
        try:
            from okavango.serving.cuda.backend import CudaBackend  # Triton is not everywhere

            self.backend = backend = CudaBackend(self.decoder, self.targets, self.options)
        except (ImportError, UnsupportedError) as error:
            log.info("steps are computed by torch: %s", error)
            return None
        try:
            check_paging(self, expected)
        except Exception as error:  # whatever the kernels' compiler has to say of this GPU
            log.warning("steps are computed by torch: %s", error)
        else:
            backend.begin_capture()
            return backend
        del self.backend, backend, self.decoder  # there may be no room for two
        self.decoder = load_decoder(base, self.options.dtype, self.options.device, attention="eager")
        return None

    def _native(self, base: Base, expected: Tensor, quantised: Quantised | None) -> Backend | None:
        """The native kernels, where they are wanted, can be had and compute what the decoder does.

        Weights in eight bits are served by them alone, and refused otherwise.
        """
        special = rope_of(self.decoder) or any(encoder.looks_ahead for encoder in base.encoders.values())
        if self.options.kernels is None or self.device.type != "cpu" or special:
            if quantised is not None:
                raise _needs_native("this base's pictures are not for them" if special else "they are off")
            return None
        try:
            self.backend = NativeBackend(self.decoder, self.targets, self.options, quantised)
            check_paging(self, expected)
        except UnsupportedError as error:
            if quantised is not None:
                raise _needs_native(error.message) from error
            log.info("steps are computed by torch: %s", error)
            if not any(p.numel() == 0 for p in self.decoder.parameters()):
                return None
            self.decoder = load_decoder(base, self.options.dtype, self.options.device, attention="eager")
            return None
        return self.backend

    def _embed(self, chunks: Sequence[Chunk]) -> Tensor:
        """Input embeddings [T, D]: the tokens' own, and what the heads made of the media."""
        embeddings = self.look_up([token for chunk in chunks for token in chunk.tokens])
        offset = 0
        for chunk in chunks:
            for span, vectors in zip(chunk.sequence.request.prompt.spans, chunk.sequence.embeds, strict=True):
                start, end = max(span.start, chunk.start), min(span.end, chunk.end)
                if start < end:
                    rows = slice(offset + start - chunk.start, offset + end - chunk.start)
                    embeddings[rows] = vectors[start - span.start : end - span.start].to(embeddings)
            offset += chunk.count
        return embeddings

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def _needs_native(reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"weights in eight bits need the native kernels of a CPU, and {reason}",
        remedy="leave --quantization out",
    )


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
