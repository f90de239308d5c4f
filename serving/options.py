"""How an engine runs, and what it tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from okavango.modalities.base import Base
from okavango.modalities.precision import resolve_dtype
from okavango.platform.errors import ConfigError
from okavango.serving.backend import RunnerOptions
from okavango.serving.encoders import EncoderOptions
from okavango.serving.scheduler import Limits

GIB = 1 << 30
_POSITIVE = (
    "max_sequences",
    "max_prefill_tokens",
    "max_waiting",
    "block_size",
    "kv_bytes",
    "draft_kv_bytes",
    "slots",
    "max_rank",
)
_DRAFT_RANK = 16
_NOT_NEGATIVE = ("parking_bytes", "host_cache_bytes", "feature_cache_bytes")


@dataclass(frozen=True)
class EngineOptions:
    """How one engine runs.

    Attributes:
        dtype: auto, bfloat16 or float32.
        max_sequences: sequences in one step.
        max_step_tokens: tokens in one step; prompts are computed in chunks that fit.
        max_prefill_tokens: of these, tokens of prompts while anybody generates, so that streams keep moving.
        slot_patience: tokens that adapters in slots may be served ahead of one that waits for a slot.
        share_prefixes: whether principals share what is computed of equal prompts. They can then find out
            what others have asked, by `cached_tokens` and by the time that it takes.
        draft_rows: a step that computes single tokens is filled up to so many rows with guesses, where that
            cannot change an answer: on the native kernels. 0 makes none.
        draft: a smaller base of the same vocabulary, whose decoder guesses where look-up finds nothing.
        draft_kv_bytes: memory for that one's keys and values.
        weights: (principal, its share of the machine); 1 for those that are not named.
        max_waiting: requests that may wait; one more is refused.
        block_size: token positions a KV block.
        kv_bytes: memory for keys and values; on a CPU it is taken only as it is used.
        parking_bytes: host memory for keys and values of preempted requests, used where copying is quicker
            than computing again; on a CPU it rarely is.
        slots: adapters in one step.
        max_rank: the highest LoRA rank that is served.
        host_cache_bytes: adapters kept in host memory; the one used last is kept in any case.
        feature_cache_bytes: encoder outputs kept.
        preload: modalities whose encoder is loaded at the start; others' at the first medium.
        disabled: modalities that are not served.
        encoder_idle_seconds: an encoder that nobody needed for so long is unloaded; None keeps it.
        memory_bytes: for keys and values, adapters, encoders and their features together, beside the
            decoder's weights: what the first two leave is the others'. None sets no such limit.
        kernels: folder for compiled native kernels, on a CPU; None means torch's operators alone, on a GPU,
            too.
        quantization: int8 for weights in eight bits, on the native kernels; None leaves them in `dtype`.
        threads: torch's threads; None leaves them as they are.
    """

    dtype: str = "auto"
    device: str = "cpu"
    max_sequences: int = 32
    max_step_tokens: int = 512
    max_prefill_tokens: int = 256
    slot_patience: int = 1024
    share_prefixes: bool = False
    draft_rows: int = 16
    draft: Base | None = None
    draft_kv_bytes: int = GIB
    weights: tuple[tuple[str, float], ...] = ()
    max_waiting: int = 256
    block_size: int = 16
    kv_bytes: int = 4 * GIB
    parking_bytes: int = 0
    slots: int = 8
    max_rank: int = 64
    host_cache_bytes: int = 2 * GIB
    feature_cache_bytes: int = GIB // 4
    preload: tuple[str, ...] = ()
    disabled: tuple[str, ...] = ()
    encoder_idle_seconds: float | None = None
    memory_bytes: int | None = None
    kernels: Path | None = None
    quantization: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, not {getattr(self, name)}", where=name)
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ConfigError(f"must be at least 0, not {getattr(self, name)}", where=name)
        if self.quantization not in (None, "int8"):
            raise ConfigError(f"must be int8 or nothing, not {self.quantization!r}", where="quantization")
        both = set(self.preload) & set(self.disabled)
        if both:
            raise ConfigError(
                f"{', '.join(sorted(both))}: loaded at the start, and disabled", where="preload"
            )
        idle = self.encoder_idle_seconds
        if idle is not None and not 0 <= idle < float("inf"):
            raise ConfigError(f"must be 0 or more, not {idle}", where="encoder_idle_seconds")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"must be at least 1, not {self.threads}", where="threads")
        if self.draft is not None and self.draft_rows < 1:
            raise ConfigError(
                f"no step has room for what the draft base {self.draft.name} guesses",
                where="draft_rows",
                remedy="raise --draft-rows, or leave --draft-base out",
            )
        for principal, weight in self.weights:
            if not 0 < weight < float("inf"):
                raise ConfigError(f"must be above 0, not {weight}", where=f"weights[{principal}]")
        if self.max_step_tokens <= self.max_sequences:
            raise ConfigError(
                f"must be above max_sequences ({self.max_sequences}), or prompts would never get a turn",
                where="max_step_tokens",
            )

    def encoders(self, kv_bytes: int) -> EncoderOptions:
        """How encoders are held beside so many bytes of keys and values.

        Raises:
            ConfigError: keys, values and adapters leave nothing of the memory.
        """
        capacity = None
        if self.memory_bytes is not None:
            capacity = self.memory_bytes - kv_bytes - self.host_cache_bytes - self.parking_bytes
            if capacity < 0:
                raise ConfigError(
                    f"{self.memory_bytes:,} bytes are less than keys and values ({kv_bytes:,}), adapters "
                    f"({self.host_cache_bytes:,}) and parking ({self.parking_bytes:,}) may take",
                    where="memory_bytes",
                    remedy="raise --memory, or lower --kv-memory or --adapter-memory",
                )
        return EncoderOptions(self.preload, self.disabled, self.encoder_idle_seconds, capacity)

    @property
    def limits(self) -> Limits:
        """What of it the scheduler needs."""
        return Limits(
            max_sequences=self.max_sequences,
            max_step_tokens=self.max_step_tokens,
            max_prefill_tokens=self.max_prefill_tokens,
            slot_patience=self.slot_patience,
            share_prefixes=self.share_prefixes,
            draft_rows=self.draft_rows,
            weights=dict(self.weights),
        )

    @property
    def runner(self) -> RunnerOptions:
        """What of it the runner needs."""
        return RunnerOptions(
            dtype=resolve_dtype(self.dtype, self.device),
            device=self.device,
            block_size=self.block_size,
            kv_bytes=self.kv_bytes,
            slots=self.slots,
            max_rank=self.max_rank,
            kernels=self.kernels,
            quantization=self.quantization,
            max_sequences=self.max_sequences,
            max_step_tokens=self.max_step_tokens,
        )

    @property
    def draft_runner(self) -> RunnerOptions:
        """What the draft base's runner needs. It serves no adapter, but none has fewer slots than one."""
        return replace(
            self.runner, kv_bytes=self.draft_kv_bytes, slots=1, max_rank=_DRAFT_RANK, quantization=None
        )


@dataclass(frozen=True)
class EngineStats:
    """A look at what is held right now; for people and tests, not for decisions."""

    preparing: int
    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    slots: tuple[str, ...]
    encoders_loaded: tuple[str, ...]
