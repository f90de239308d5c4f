"""Our engine on a GPU: steps as clients see them, prompts, swaps; and the limits of the GPU itself."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from comparison import Work
from invented import random_decoder, write_adapters, write_base
from ours import Answer, Bundles, Ours
from transformers import AutoConfig, PreTrainedConfig

from okavango.modalities.base import Base
from okavango.serving.engine import Engine, EngineOptions
from okavango.serving.types import AdapterRef

GIB = 1 << 30
RANK = 16
ADAPTERS = 64  # in slots; a larger batch has several rows an adapter
OWN_FILES = 4  # adapters with weights of their own on disk; others are links to these
SETTLED = 8  # steps after the last prompt that are not counted


@dataclass(frozen=True)
class Shape:
    """A decoder, and how its engine is set up."""

    name: str
    config: dict[str, Any]
    batches: tuple[int, ...]
    kv_bytes: int

    @property
    def decoder(self) -> PreTrainedConfig:
        return AutoConfig.for_model("llama", **self.config)


LLAMA = Shape(
    "8B Llama",
    {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    (1, 32, 64, 128),
    14 * GIB,
)
SMOL = Shape(
    "SmolLM2-135M",
    {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    (1, 32, 128),
    4 * GIB,
)


@dataclass(frozen=True)
class Steps:
    """Seconds between a stream's tokens while so many generate, and of the graph alone on the GPU."""

    median: float
    mean: float
    highest: float
    graph: float | None


class Side:
    """An engine over random weights that are made where they compute."""

    def __init__(self, shape: Shape, folder: Path, adapters: int = ADAPTERS, **options: Any) -> None:
        self.shape = shape
        folder.mkdir(parents=True)
        self.base: Base = write_base(folder, shape.decoder)
        count = min(adapters, OWN_FILES)
        self.bundles: Bundles = write_adapters(self.base, folder, [RANK] * count, adapters - count)
        settings = {
            "dtype": "bfloat16",
            "device": "cuda",
            "kernels": folder,
            "max_sequences": max(shape.batches),
            "max_step_tokens": 4096,
            "max_prefill_tokens": 4096,
            "slots": adapters,
            "max_rank": RANK,
            "kv_bytes": shape.kv_bytes,
            "host_cache_bytes": 32 * GIB,
        }
        with patch("okavango.serving.runner.load_decoder", self._decoder):
            self.engine = Engine(self.base, self.bundles, EngineOptions(**{**settings, **options}))
        self.backend: Any = self.engine.core.runner.backend
        self._may_step = threading.Event()
        self._may_step.set()
        step = self.engine.core.step

        def gated() -> None:
            self._may_step.wait()
            step()

        self.engine.core.step = gated  # type: ignore[method-assign]
        self.engine.start()
        self.ours = Ours(self.engine)
        self._asked = 0

    def _decoder(self, base: Base, dtype: torch.dtype, device: str, attention: str) -> Any:
        torch.manual_seed(0)
        return random_decoder(self.shape.decoder, dtype, device, attn_implementation=attention)

    def floor(self, batch: int, adapters: int, copied: float, context: int = 512) -> float:
        """Seconds in which what a step reads is read once, at `copied` bytes a second."""
        decoder, runner = self.engine.core.runner.decoder, self.engine.core.runner
        weights = sum(p.nbytes for p in decoder.parameters())
        if not decoder.config.tie_word_embeddings:
            weights -= decoder.get_input_embeddings().weight.nbytes
        position = runner.block_bytes // runner.options.block_size
        slot = self.backend._arena.unit * RANK * runner.options.dtype.itemsize
        return (weights + batch * context * position + min(batch, adapters) * slot) / copied

    @property
    def refs(self) -> list[AdapterRef]:
        return self.bundles.refs

    def close(self) -> None:
        self.engine.stop()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, requests are taken and no step begins."""
        self._may_step.clear()
        try:
            yield
        finally:
            self._may_step.set()

    def prompts(self, count: int, length: int) -> list[list[int]]:
        self._asked += 1
        return Work(count, length, 1).prompts(f"{self._asked}", count, self.ours.vocabulary)

    def warm(self, refs: Sequence[AdapterRef]) -> None:
        """Bring adapters to the host and into slots."""
        self.ours.ask(self.prompts(max(1, len(refs)), 4), refs, 2)

    def steps(self, batch: int, refs: Sequence[AdapterRef], context: int = 512, answer: int = 96) -> Steps:
        """Steps of a full batch, `context` positions in the middle of it."""
        answers = self.ours.ask(self.prompts(batch, context - answer // 2), refs, answer)
        gaps = common_gaps(answers)
        graph = self.replays(batch, bool(refs))
        return Steps(statistics.median(gaps), statistics.fmean(gaps), max(gaps), graph)

    def replays(self, batch: int, uses_slots: bool, times: int = 20) -> float | None:
        """Seconds of the graph that such a step takes, as the last one left its tables."""
        fitting = [
            each
            for each in self.backend._graphs._ready
            if each.embeddings is None
            and each.step.room.rows == batch
            and (each.step.arena is not None) == uses_slots
        ]
        return timed(fitting[0].graph.replay, times) if fitting else None

    def prefill(self, count: int, length: int, refs: Sequence[AdapterRef], times: int = 3) -> float:
        """Seconds from the first step until all prompts have their first token."""
        found = []
        for _ in range(times + 1):
            prompts = self.prompts(count, length)
            ends: list[list[Answer]] = []
            with self.held():
                asking = threading.Thread(
                    target=lambda p=prompts, e=ends: e.append(self.ours.ask(p, refs, 1))
                )
                asking.start()
                while len(self.engine._desk) < count:
                    time.sleep(0.001)
                began = time.perf_counter()
            asking.join()
            found.append(max(answer.trace.times[0] for answer in ends[0]) - began)
        return statistics.median(found[1:])

    def first_token(self, ref: AdapterRef | None) -> float:
        """Seconds to the first token of a short prompt that comes alone."""
        [answer] = self.ours.ask(self.prompts(1, 8), [ref] if ref else [], 1)
        return answer.trace.times[0] - answer.trace.sent

    def swap(self, times: int = 20) -> float:
        """Seconds of copying an adapter into a slot, on the GPU."""
        runner, adapter = self.engine.core.runner, self.engine._host.get(self.refs[0].digest)
        slot = runner.options.slots
        return timed(lambda: runner.load(slot, adapter.lora), times)


def common_gaps(answers: Sequence[Answer]) -> list[float]:
    """Seconds between the tokens of one answer, while all are being generated."""
    begin = max(answer.trace.times[0] for answer in answers)
    end = min(answer.trace.times[-1] for answer in answers)
    times = [at for at in answers[0].trace.times if begin <= at <= end][SETTLED:]
    return [after - before for before, after in pairwise(times)]


def timed(work: Callable[[], Any], times: int) -> float:
    """Seconds of the GPU, the median of single runs."""
    found = []
    for number in range(times + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        if number >= 3:
            found.append(begin.elapsed_time(end) / 1000)
    return statistics.median(found)


def ceilings() -> dict[str, float]:
    """What the GPU does at most: bytes a second copied (read and written), products, and copies to it."""
    big = torch.randn(2 * GIB // 4, device="cuda")
    other = torch.empty_like(big)
    copied = 2 * big.nbytes / timed(lambda: other.copy_(big), 10)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    products = 2 * 8192**3 / timed(lambda: left @ right, 10)
    host = torch.empty(84 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device="cuda")
    sent = host.nbytes / timed(lambda: target.copy_(host, non_blocking=True), 10)
    return {"copy": copied, "products": products, "from_host": sent}
