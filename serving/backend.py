"""What computes a step: the options and the interface that all backends share."""

# Shapes: T rows of the step, D decoder width, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from okavango.modalities.lora import LoraWeights
from okavango.platform.errors import ConfigError
from okavango.serving.attention import KeyValues, LayerCache, LayerShape
from okavango.serving.scheduler import Step

_FEWEST_BLOCKS, _FEWEST_TOKENS = 2, 64


@dataclass(frozen=True)
class RunnerOptions:
    """How a runner computes.

    Attributes:
        kv_bytes: memory for keys and values; the number of blocks follows from it.
        kernels: folder for compiled native kernels, on a CPU; None means torch's operators alone, on a GPU,
            too.
        quantization: int8, or None for weights in `dtype`.
        max_sequences, max_step_tokens: the most of a step, which graphs are made for.
    """

    dtype: torch.dtype
    device: str
    block_size: int
    kv_bytes: int
    slots: int
    max_rank: int
    kernels: Path | None = None
    quantization: str | None = None
    max_sequences: int = 32
    max_step_tokens: int = 512


class Backend(Protocol):
    """What computes steps: owns keys, values and slots.

    Attributes:
        name: for logs and metrics.
        is_invariant: a row's logits are the same to the bit whatever is computed beside it.
        can_follow: whether steps can be begun before the tokens of the one before are known on the host.
        caches: every layer's keys and values, block by block.
    """

    name: str
    is_invariant: bool
    can_follow: bool
    num_blocks: int

    @property
    def caches(self) -> Sequence[LayerCache | KeyValues]: ...

    def pack(self, weights: LoraWeights) -> Any:
        """An adapter as `load` copies it; may take long, and is called by any thread."""
        ...

    def load(self, slot: int, packed: Any) -> None:
        """Copy what `pack` made into a slot; its former tenant is gone."""
        ...

    def compute(self, embeddings: Tensor, step: Step, rows: Sequence[int]) -> Tensor:
        """Embeddings [T, D] of a step → logits [len(rows), V] after these of its rows, which hold until the
        next step."""
        ...

    def replay(self, step: Step, rows: Sequence[int]) -> Tensor | None:
        """What `compute` gives, where the backend needs no embeddings for it; else None."""
        ...

    def follow(self, step: Step, tokens: Tensor) -> Tensor:
        """A step of single tokens [T], which lie on the device alone → logits [T, V]. Where `can_follow`."""
        ...

    def close(self) -> None:
        """End what goes on beside steps."""
        ...


def num_blocks(shapes: Sequence[LayerShape], options: RunnerOptions) -> int:
    """KV blocks that fit the memory. Raises ConfigError where they would hold no conversation."""
    positions = sum(s.heads * (s.key_width + s.value_width) for s in shapes) * options.dtype.itemsize
    blocks = options.kv_bytes // (positions * options.block_size)
    if blocks < _FEWEST_BLOCKS or blocks * options.block_size < _FEWEST_TOKENS:
        raise ConfigError(
            f"{options.kv_bytes:,} bytes hold {blocks * options.block_size} tokens' keys and values",
            where="kv_bytes",
            remedy="give it more --kv-memory",
        )
    return blocks
