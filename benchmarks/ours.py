"""Our engine under a workload, driven in its own process: requests in, traces out."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from timing import Trace

from okavango.modalities.base import Base, find_base
from okavango.modalities.prompt import Rendered
from okavango.platform.bundle import MANIFEST, PROMPT, file_sha256, read_manifest
from okavango.platform.config import load_settings
from okavango.serving.engine import Engine, EngineOptions
from okavango.serving.types import AdapterRef, Event, Request, SamplingParams

RANK = 16


@dataclass(frozen=True)
class Answer:
    trace: Trace
    tokens: tuple[int, ...]


class Bundles:
    """Random adapters on disk, and an AdapterSource over them."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.refs = [AdapterRef(folder.name, 1, read_manifest(folder).digest) for folder in folders]
        self._folders = {ref.digest: folder for ref, folder in zip(self.refs, folders, strict=True)}

    @classmethod
    def write(cls, base: Base, folder: Path, count: int, copies: int = 0) -> Bundles:
        """`count` bundles, and more that share their weights on disk; no two have one digest."""
        # Here, since resident.py counts what this module imports.
        from okavango.modalities.tiny_bundle import write_tiny_bundle

        folders = [folder / f"a{number}" for number in range(count)]
        for seed, path in enumerate(folders):
            write_tiny_bundle(path, base, seed=seed, rank=RANK, head=False, probes=False)
        return cls(folders + [copy_of(folders[n % count], folder / f"copy{n}") for n in range(copies)])

    def fetch(self, digest: str) -> Path:
        return self._folders[digest]


def base_of(name: str, folder: Path) -> Base:
    """The base of that name; "tiny" is written into `folder`."""
    from okavango.modalities.tiny import write_tiny_base

    return write_tiny_base(folder / "tiny") if name == "tiny" else find_base(name, load_settings().bases)


def engine_options(dtype: str, kernels: str, **changes: Any) -> EngineOptions:
    """As `okavango serve` has them, but without guesses. `kernels`: native or torch.

    Random prompts are answered in loops, which guesses would run through many times faster than real answers.
    """
    folder = load_settings().cache / "kernels" if kernels == "native" else None
    return EngineOptions(dtype=dtype, kernels=folder, draft_rows=0, **changes)


def copy_of(source: Path, folder: Path) -> Path:
    """A bundle with the weights of another, by a link, and a digest of its own: its prompt is another."""
    folder.mkdir()
    (folder / "decoder").symlink_to(source / "decoder")
    prompt = folder / PROMPT
    prompt.write_text(json.dumps({"system": folder.name}))
    manifest = read_manifest(source)
    manifest = replace(manifest, files={**manifest.files, PROMPT: file_sha256(prompt)})
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest)))
    return folder


@dataclass(eq=False)
class _Collector:
    """One request's sink. The engine calls it on its own threads, one at a time."""

    request: Request
    done: Callable[[], None]
    sent: float = 0.0
    ended: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    error: Exception | None = None

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if event.tokens:
            self.times.append(now)
            self.tokens += event.tokens
        if event.finish is not None:
            self.ended, self.error = now, event.error
            self.done()

    @property
    def answer(self) -> Answer:
        if self.error is not None:
            raise self.error
        model = str(self.request.adapter or "base")
        wanted = self.request.params.max_tokens or 0
        prompt = len(self.request.prompt.tokens)
        times, tokens = tuple(self.times), tuple(self.tokens)
        return Answer(Trace(model, self.sent, times, self.ended, len(tokens), wanted, prompt), tokens)


class Ours:
    """A running engine. What a request asks for is generated greedily, to its full length."""

    name = "okavango"

    def __init__(self, engine: Engine, prefix: str = "r") -> None:
        self.engine = engine
        self._prefix = prefix
        self.vocabulary: int = engine.core.runner.decoder.config.vocab_size
        # What computes steps: native where kernels were wanted, could be had, and fit the decoder.
        self.kernels = type(engine.core.runner.backend).__name__.removesuffix("Backend").lower()
        self._count = 0

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRef],
        length: int,
        *,
        arrivals: Sequence[float] | None = None,
        concurrency: int | None = None,
    ) -> list[Answer]:
        """Answers of `length` tokens, the prompts spread over the adapters in turn (none: the bare base).

        Args:
            arrivals: seconds after the start at which each request comes; all at once by default.
            concurrency: at most so many are under way.
        """
        open_ = threading.Semaphore(concurrency or len(prompts))
        params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
        began, asked = time.perf_counter(), []
        for number, prompt in enumerate(prompts):
            adapter = adapters[number % len(adapters)] if adapters else None
            collector = _Collector(self._request(prompt, adapter, params), open_.release)
            asked.append(collector)
            if arrivals is not None:
                time.sleep(max(0.0, began + arrivals[number] - time.perf_counter()))
            open_.acquire()
            collector.sent = time.perf_counter()
            self.engine.submit(collector.request, collector)
        for _ in range(concurrency or len(prompts)):
            open_.acquire()
        return [collector.answer for collector in asked]

    def _request(self, prompt: Sequence[int], adapter: AdapterRef | None, params: SamplingParams) -> Request:
        self._count += 1
        return Request(f"{self._prefix}{self._count}", Rendered(tuple(prompt)), adapter, params)
