"""Generation throughput on the starter base: ours, and transformers with PEFT, in turn on the same prompts.

    make bench                           five rounds, 16 requests of 128 tokens in and 64 out
    make bench ARGS="--rounds 1 --requests 4"

Prints medians and ratios, and writes them with machine and versions to benchmarks/results/cpu.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table

from okavango.modalities.base import Base, find_base, load_decoder
from okavango.modalities.prompt import Rendered
from okavango.modalities.tiny_bundle import write_tiny_bundle
from okavango.platform.bundle import read_manifest
from okavango.platform.config import load_settings
from okavango.serving.engine import Engine, EngineOptions
from okavango.serving.types import AdapterRef, Event, Request, SamplingParams

RESULTS = Path(__file__).parent / "results" / "cpu.json"
ADAPTERS = 8
RANK = 16


@dataclass(frozen=True)
class Work:
    """`requests` prompts of `prompt` random tokens, `answer` tokens each, greedy."""

    requests: int
    prompt: int
    answer: int

    @property
    def generated(self) -> int:
        return self.requests * self.answer

    def prompts(self, vocabulary: int) -> list[tuple[int, ...]]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.requests, self.prompt)
        ids = torch.randint(100, vocabulary, shape, generator=generator)
        return [tuple(row) for row in ids.tolist()]


class Bundles:
    """Random adapters on disk, by digest."""

    def __init__(self, base: Base, folder: Path) -> None:
        self.folders = [folder / str(i) for i in range(ADAPTERS)]
        for i, path in enumerate(self.folders):
            write_tiny_bundle(path, base, seed=i, rank=RANK, head=False, probes=False)
        self.refs = [AdapterRef(f"a{i}", 1, read_manifest(p).digest) for i, p in enumerate(self.folders)]

    def fetch(self, digest: str) -> Path:
        return next(p for p, ref in zip(self.folders, self.refs, strict=True) if ref.digest == digest)


class Ours:
    """The engine, its answers counted."""

    def __init__(self, base: Base, bundles: Bundles, work: Work) -> None:
        self.engine = Engine(base, bundles, EngineOptions(dtype="bfloat16", slots=ADAPTERS))
        self.engine.start()
        self.bundles, self.work, self.count = bundles, work, 0

    def run(self, adapters: int) -> None:
        """All requests at once, spread over so many adapters; 0 is the bare base."""
        done = threading.Semaphore(0)

        def sink(event: Event) -> None:
            if event.finish is not None:
                assert event.error is None, event.error
                done.release()

        params = SamplingParams(max_tokens=self.work.answer, temperature=0, ignore_eos=True)
        for i, prompt in enumerate(self.work.prompts(self.engine.tokenizer.vocab_size)):
            self.count += 1
            ref = self.bundles.refs[i % adapters] if adapters else None
            self.engine.submit(Request(f"r{self.count}", Rendered(prompt), ref, params), sink)
        for _ in range(self.work.requests):
            done.acquire()


class Peer:
    """transformers' generate; adapters through PEFT's adapter_names, which mixes them in one batch."""

    def __init__(self, base: Base, bundles: Bundles, work: Work) -> None:
        self.decoder = load_decoder(base, torch.bfloat16)
        self.model = PeftModel.from_pretrained(
            load_decoder(base, torch.bfloat16), bundles.folders[0] / "decoder", adapter_name="a0"
        )
        for i, folder in enumerate(bundles.folders[1:], start=1):
            self.model.load_adapter(folder / "decoder", adapter_name=f"a{i}")
        self.model.to(torch.bfloat16).eval()
        self.work = work

    @torch.inference_mode()
    def run(self, adapters: int) -> None:
        ids = torch.tensor(self.work.prompts(self.decoder.config.vocab_size))
        counts = {"min_new_tokens": self.work.answer, "max_new_tokens": self.work.answer, "do_sample": False}
        options = {"attention_mask": torch.ones_like(ids), **counts}
        if adapters:
            names = [f"a{i % adapters}" for i in range(len(ids))]
            self.model.generate(input_ids=ids, adapter_names=names, **options)
        else:
            self.decoder.generate(ids, **options)


def main() -> None:
    options = parse_options()
    work = Work(options.requests, options.prompt, options.answer)
    base = find_base("starter", load_settings().bases)
    with tempfile.TemporaryDirectory() as folder:
        bundles = Bundles(base, Path(folder))
        ours, peer = Ours(base, bundles, work), Peer(base, bundles, work)
        cases: dict[str, tuple[Callable[[int], None], int]] = {
            f"{who}, {what}": (runner.run, adapters)
            for what, adapters in (("base", 0), ("1 adapter", 1), (f"{ADAPTERS} adapters mixed", ADAPTERS))
            for who, runner in (("okavango", ours), ("transformers + PEFT", peer))
        }
        report(work, measure(cases, work, options.rounds))
        ours.engine.stop()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--answer", type=int, default=64)
    return parser.parse_args()


def measure(
    cases: dict[str, tuple[Callable[[int], None], int]], work: Work, rounds: int
) -> dict[str, list[float]]:
    """Generated tokens/s of every case in every round; the cases take turns, after one unmeasured round."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, (run, adapters) in cases.items():
            began = time.perf_counter()
            run(adapters)
            if turn > 0:
                found[name].append(work.generated / (time.perf_counter() - began))
    return found


def report(work: Work, found: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(values) for name, values in found.items()}
    table = Table(title=f"{work.requests} requests, {work.prompt} tokens in, {work.answer} out, bfloat16")
    for column in ("case", "tokens/s", "spread", "of our base"):
        table.add_column(column)
    ours = medians["okavango, base"]
    for name, median in medians.items():
        spread = f"{min(found[name]):.0f} to {max(found[name]):.0f}"
        table.add_row(name, f"{median:.0f}", spread, f"{median / ours:.2f}")
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({**describe(), "work": vars(work), "tokens_per_second": found}, indent=2) + "\n"
    )


def describe() -> dict[str, object]:
    """Machine and versions."""
    cpus = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpus.read_text().splitlines() if "model name" in line]
    return {
        "machine": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("okavango", "torch", "transformers", "peft")},
    }


if __name__ == "__main__":
    main()
