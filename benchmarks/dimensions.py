"""The dimensions along which curves.py measures: what varies, what stays, and how a point is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ours import RANK, Bundles, Ours
from timing import Figures
from workload import Prompts, spread

from okavango.modalities.base import Base
from okavango.serving.engine import Engine
from okavango.serving.options import EngineOptions
from okavango.serving.types import AdapterRef

BUNDLES = 4  # on disk; further adapters share their weights
ZIPF = 1.0
REGISTERED = (1, 10, 100, 1000)
DISTINCT = (0, 1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384)
CONCURRENCIES = (1, 4, 16, 64, 256)
PREFIX_ADAPTERS = 8


@dataclass(frozen=True)
class Shape:
    """`requests` of `prompt` tokens, the first `shared` alike, with `answer` tokens to generate; at most
    `concurrency` under way."""

    requests: int
    prompt: int
    answer: int
    concurrency: int
    shared: int = 0


@dataclass(frozen=True)
class Point:
    """`kernels`: what computed the steps."""

    kernels: str
    label: str
    shape: Shape
    figures: Figures


@dataclass(frozen=True)
class Setup:
    """What all curves stand on. `most`: points beyond this number are left out."""

    base: Base
    bundles: Bundles
    folder: Path
    options: EngineOptions
    most: int

    def upto(self, points: Sequence[int]) -> list[int]:
        return [each for each in points if each <= self.most]

    def refs(self, count: int) -> list[AdapterRef]:
        return self.bundles.refs[:count]

    @contextmanager
    def engine(self, base: Base | None = None, **changes: Any) -> Iterator[Ours]:
        engine = Engine(base or self.base, self.bundles, replace(self.options, **changes))
        engine.start()
        try:
            yield Ours(engine)
        finally:
            engine.stop()


@dataclass(frozen=True)
class Curve:
    """`axis`: what a point's label says. `columns`: figures of interest, of those that curves.py knows."""

    name: str
    title: str
    axis: str
    about: str
    columns: tuple[str, ...]
    measure: Callable[[Setup], Iterator[Point]]


def take(ours: Ours, label: str, shape: Shape, adapters: Sequence[AdapterRef] = (), seed: str = "") -> Point:
    """One point. No prompt comes twice to an engine unless label and seed do."""
    prompts = Prompts(f"{label}/{seed}", shape.prompt, shape.shared)
    ids = [prompts.ids(number, ours.vocabulary) for number in range(shape.requests)]
    answers = ours.ask(ids, adapters, shape.answer, concurrency=shape.concurrency)
    return Point(ours.kernels, label, shape, Figures.of([answer.trace for answer in answers]))


def warm(ours: Ours, adapters: Sequence[AdapterRef] = (), requests: int = 8) -> None:
    """What is done once in an engine's life is done when this returns: packing, allocating, compiling."""
    take(ours, "warming", Shape(requests, 64, 8, requests), adapters)


def registered(setup: Setup) -> Iterator[Point]:
    shape = Shape(requests=64, prompt=32, answer=16, concurrency=16)
    with setup.engine() as ours:
        warm(ours)
        for count in setup.upto(REGISTERED):
            for name, skew in (("evenly", 0.0), ("skewed", ZIPF)):
                label, refs = f"{count}, {name}", setup.refs(count)
                for seed in ("caches", "measured"):
                    asked = spread(f"{label}/{seed}", shape.requests, refs, skew)
                    point = take(ours, label, shape, asked, seed)
                yield point


def distinct(setup: Setup) -> Iterator[Point]:
    shape = Shape(requests=64, prompt=32, answer=32, concurrency=64)
    with setup.engine(slots=max(DISTINCT), max_sequences=64, max_rank=RANK) as ours:
        warm(ours, setup.refs(max(DISTINCT)), requests=64)
        for count in setup.upto(DISTINCT):
            yield take(ours, str(count) if count else "the bare base", shape, setup.refs(count))


def context(setup: Setup) -> Iterator[Point]:
    """A decoder whose own context is shorter is told that it has more: the words are senseless then, the work
    is the same."""
    answer = 16
    longest = max(setup.upto(CONTEXTS))
    base = setup.base
    if longest > base.decoder.context:
        base = stretched(base, setup.folder / "stretched", longest)
    with setup.engine(base) as ours:
        warm(ours)
        for length in setup.upto(CONTEXTS):
            yield take(ours, str(length), Shape(1, length - answer, answer, 1))


def concurrency(setup: Setup) -> Iterator[Point]:
    most = max(setup.upto(CONCURRENCIES))
    with setup.engine(max_sequences=most, max_step_tokens=max(512, 2 * most)) as ours:
        warm(ours)
        for count in setup.upto(CONCURRENCIES):
            yield take(ours, str(count), Shape(max(8, count), prompt=64, answer=32, concurrency=count))


def prefix(setup: Setup) -> Iterator[Point]:
    own = Shape(requests=16, prompt=384, answer=16, concurrency=16)
    with setup.engine() as ours:
        warm(ours, setup.refs(PREFIX_ADAPTERS))
        for name, refs in (
            ("the bare base", []),
            (f"{PREFIX_ADAPTERS} adapters", setup.refs(PREFIX_ADAPTERS)),
        ):
            yield take(ours, f"{name}, prompts that differ", own, refs)
            shared = replace(own, shared=352)
            label = f"{name}, prompts that begin alike"
            take(ours, label, replace(shared, requests=max(1, len(refs))), refs)
            yield take(ours, label, shared, refs)


def stretched(base: Base, folder: Path, length: int) -> Base:
    """The same decoder with another limit of its context."""
    shutil.copytree(base.decoder.path, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "max_position_embeddings": length}))
    return replace(base, decoder=replace(base.decoder, path=folder, context=length))


_LOAD = ("tokens/s", "first token, ms", "its p95", "between tokens, ms", "their p95")
CURVES = {
    curve.name: curve
    for curve in (
        Curve(
            "registered",
            "Adapters registered",
            "adapters, asked for",
            "On 8 slots, 16 requests under way, 32 tokens in, 16 out; at random, evenly or skewed (the k-th "
            "adapter with weight 1/k). Caches have seen as much traffic of the same kind before. Adapters "
            f"beyond {BUNDLES} share their files, which the system keeps in memory: a cold disk is slower.",
            _LOAD,
            registered,
        ),
        Curve(
            "distinct",
            "Distinct adapters in a batch",
            "adapters",
            "On 64 slots, 64 requests at once, 32 tokens in and 32 out, spread evenly.",
            _LOAD,
            distinct,
        ),
        Curve(
            "context",
            "Context",
            "tokens",
            "One request at a time on the bare base; the last 16 tokens are generated.",
            ("first token, ms", "prompt tokens/s", "decoding, tokens/s"),
            context,
        ),
        Curve(
            "concurrency",
            "Concurrency",
            "requests at once",
            "On the bare base, 64 tokens in and 32 out.",
            (*_LOAD, "decoding, tokens/s"),
            concurrency,
        ),
        Curve(
            "prefix",
            "Prefix shared or not",
            "16 requests to",
            "384 tokens in, of which 352 are the same or none, 16 out, all at once; an earlier request of "
            "each adapter had the same beginning.",
            _LOAD,
            prefix,
        ),
    )
}
