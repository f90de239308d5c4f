"""A long run: random arrivals, cancels and time limits, many adapters on few slots, little memory.

In float32 every answer is held against those that the same weights gave to the same prompt before, so a row
that was computed for another shows. At the end nothing may be held, and resident memory must be flat.

    python benchmarks/soak.py --base tiny --minutes 60
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

from ours import Bundles, base_of
from resident import resident
from workload import Prompts

from okavango.modalities.build import quiet_transformers
from okavango.modalities.prompt import Rendered
from okavango.platform.config import load_settings
from okavango.platform.errors import BusyError
from okavango.serving.engine import Engine, EngineOptions
from okavango.serving.types import AdapterRef, Event, FinishReason, Request, SamplingParams

WEIGHTS = 16  # adapters of their own weights; the others are copies under digests of their own
PROMPTS = 20
MIB = 1 << 20
SKEW = 0.8
# growth of resident memory, from the second quarter to the last, that allocators explain
SLACK = 0.03, 24 * MIB

Key = tuple[int | None, int, bool]


class Tally:
    """Metrics as plain sums, for the summary."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        with self._lock:
            self.counts[" ".join([name, *labels.values()])] += amount

    def gauge(self, name: str, value: float, **labels: str) -> None:
        pass

    def observe(self, name: str, value: float, **labels: str) -> None:
        pass


@dataclass
class Findings:
    """What the run has seen so far. `answers`: the longest so far, by weights, prompt and whether sampled."""

    answers: dict[Key, tuple[int, ...]] = field(default_factory=dict)
    finished: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    tokens: int = 0
    refused: int = 0

    def take(self, key: Key, tokens: tuple[int, ...], event: Event, *, exact: bool) -> None:
        self.finished[str(event.finish)] += 1
        self.tokens += len(tokens)
        if event.finish is FinishReason.ERROR:
            self.errors.append(f"{key}: {event.error}")
        known = self.answers.setdefault(key, tokens)
        shared = min(len(known), len(tokens))
        if exact and known[:shared] != tokens[:shared]:
            self.errors.append(f"{key}: answered {tokens[:shared]}, and {known[:shared]} before")
        self.answers[key] = max(known, tokens, key=len)


class Soak:
    """Keeps an engine busy with visitors who come, go and change their minds."""

    def __init__(
        self, engine: Engine, refs: Sequence[AdapterRef], seed: int, crowd: int, exact: bool
    ) -> None:
        self.engine, self.refs, self.exact = engine, refs, exact
        self.found = Findings()
        self.draw = Random(seed)
        self._room = threading.Semaphore(crowd)
        self._crowd = crowd
        self._lock = threading.Lock()
        self._count = 0
        vocabulary: int = engine.core.runner.decoder.config.vocab_size
        longest = min(200, engine.context // 3)
        self._prompts = [
            Prompts(f"{seed}/{i}", self.draw.randint(1, longest)).ids(0, vocabulary) for i in range(PROMPTS)
        ]
        self._weights = [(rank + 1) ** -SKEW for rank in range(len(refs))]

    def run(self, seconds: float, samples: list[int]) -> None:
        """Visit for so long, then wait for everybody; resident memory is sampled on the way."""
        began = sampled = time.monotonic()
        while time.monotonic() - began < seconds:
            self._room.acquire()
            self._visit()
            if self.draw.random() < 0.02:  # a pause, in which the engine may run dry
                time.sleep(self.draw.expovariate(10))
            if time.monotonic() - sampled > seconds / 100:
                samples.append(resident("VmRSS"))
                sampled = time.monotonic()
        for _ in range(self._crowd):
            assert self._room.acquire(timeout=120), "requests are left that never end"

    def _visit(self) -> None:
        self._count += 1
        adapter = None
        if self.draw.random() > 0.15:
            adapter = self.draw.choices(range(len(self.refs)), self._weights)[0]
        number, sampled = self.draw.randrange(PROMPTS), self.draw.random() < 0.3
        request = self._request(adapter, number, sampled)
        leaves = self.draw.randint(0, 20) if self.draw.random() < 0.2 else None
        weights = None if adapter is None else adapter % WEIGHTS
        sink = _Visitor(self, (weights, number, sampled), request.id, leaves)
        try:
            self.engine.submit(request, sink)
        except BusyError:
            self.found.refused += 1
            self._room.release()
            return
        if leaves == 0:
            self.engine.abort(request.id)

    def _request(self, adapter: int | None, number: int, sampled: bool) -> Request:
        params = SamplingParams(
            max_tokens=self.draw.randint(1, 48),
            temperature=0.9 if sampled else 0,
            seed=number if sampled else None,
            ignore_eos=self.draw.random() < 0.9,
        )
        prompt = Rendered(tuple(self._prompts[number]))
        ref = None if adapter is None else self.refs[adapter]
        timeout = self.draw.uniform(0.01, 0.3) if self.draw.random() < 0.05 else None
        return Request(f"visit-{self._count}", prompt, ref, params, timeout=timeout)

    def ended(self, key: Key, tokens: tuple[int, ...], event: Event) -> None:
        with self._lock:
            self.found.take(key, tokens, event, exact=self.exact)
        self._room.release()


@dataclass(eq=False)
class _Visitor:
    """A sink that leaves after so many tokens."""

    soak: Soak
    key: Key
    request: str
    leaves: int | None
    tokens: tuple[int, ...] = ()

    def __call__(self, event: Event) -> None:
        self.tokens += event.tokens
        if event.finish is not None:
            self.soak.ended(self.key, self.tokens, event)
        elif self.leaves is not None and len(self.tokens) >= self.leaves:
            self.soak.engine.abort(self.request)


def growth(samples: Sequence[int]) -> tuple[int, int]:
    """Resident bytes in the second quarter of the run, when all is warm, and in the last; medians."""
    quarter = max(1, len(samples) // 4)
    return int(median(samples[quarter : 2 * quarter] or samples)), int(median(samples[-quarter:]))


def is_flat(before: int, after: int) -> bool:
    share, bytes_ = SLACK
    return after - before <= max(share * before, bytes_)


def left_over(engine: Engine) -> list[str]:
    """What a stopped engine still holds."""
    engine.core.scheduler.check_integrity()
    stats = engine.stats()
    held = {"preparing": stats.preparing, "running": stats.running, "waiting": stats.waiting}
    return [f"{count} requests are {state}" for state, count in held.items() if count]


def main() -> int:
    asked = arguments()
    with tempfile.TemporaryDirectory() as temporary, quiet_transformers():
        base = base_of(asked.base, Path(temporary))
        own = min(WEIGHTS, asked.adapters)
        bundles = Bundles.write(base, Path(temporary), own, copies=asked.adapters - own)
        tally = Tally()
        engine = Engine(base, bundles, engine_options(asked), tally)
        engine.start()
        soak = Soak(engine, bundles.refs, asked.seed, asked.crowd, asked.dtype == "float32")
        samples: list[int] = []
        engine.pin(bundles.refs[: asked.pins])
        soak.run(asked.minutes * 60, samples)
        kernels = engine.core.runner.backend.name
        faults = [*left_over(engine), *soak.found.errors]
        engine.stop()
    before, after = growth(samples)
    moments = samples[0], samples[len(samples) // 2], samples[-1]
    if not is_flat(before, after):
        faults.append(f"memory grew from {before / MIB:.0f} to {after / MIB:.0f} MiB")
    print("\n".join(summary(asked, kernels, soak.found, tally, moments)))
    print("\n".join(faults[:20]) if faults else "nothing is left over, no answer changed, memory is flat")
    return 1 if faults else 0


def engine_options(asked: argparse.Namespace) -> EngineOptions:
    return EngineOptions(
        dtype=asked.dtype,
        slots=asked.slots,
        max_rank=16,
        max_sequences=16,
        max_waiting=asked.crowd,
        max_step_tokens=96,
        kv_bytes=int(asked.kv_mib * MIB),
        host_cache_bytes=int(asked.host_mib * MIB),
        kernels=load_settings().cache / "kernels" if asked.kernels == "native" else None,
    )


def summary(
    asked: argparse.Namespace, kernels: str, found: Findings, tally: Tally, memory: tuple[int, int, int]
) -> Sequence[str]:
    start, middle, end = (size / MIB for size in memory)
    ends = ", ".join(f"{count:,} {name}" for name, count in sorted(found.finished.items()))
    return [
        f"{asked.minutes:g} minutes, base {asked.base}, {asked.adapters} adapters on {asked.slots} slots, "
        f"{asked.pins} of them pinned, {kernels} kernels",
        f"requests: {ends}; {found.refused:,} refused",
        f"tokens: {found.tokens:,}; distinct questions: {len(found.answers):,}",
        *(f"{name}: {count:,.0f}" for name, count in sorted(tally.counts.items())),
        f"resident memory: {start:.0f} MiB at the start, {middle:.0f} in the middle, {end:.0f} at the end",
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--base", default="tiny", help="tiny, a base's name, or its folder")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--pins", type=int, default=1, help="adapters that always have a slot")
    parser.add_argument("--crowd", type=int, default=48, help="requests here at a time, at most")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kernels", choices=["native", "torch"], default="native")
    parser.add_argument("--kv-mib", type=float, default=0.5, help="small, so that blocks run short")
    parser.add_argument("--host-mib", type=float, default=8, help="small, so that adapters are loaded again")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
