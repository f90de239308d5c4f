"""Generation throughput on the starter base: ours, and transformers with PEFT, in turn on the same prompts.

    make bench                           five rounds, 16 requests of 128 tokens in and 64 out
    make bench ARGS="--rounds 1 --requests 4 --prompt 32 --answer 16"

Prints medians and ratios, and writes them with machine and versions to benchmarks/results/cpu.json. Load of
other programs slows both sides, but not alike: measure on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table

from okavango.modalities.base import Base, find_base, load_decoder
from okavango.modalities.build import quiet_transformers
from okavango.modalities.prompt import Rendered
from okavango.modalities.tiny_bundle import write_tiny_bundle
from okavango.platform.bundle import read_manifest
from okavango.platform.config import load_settings
from okavango.serving.engine import Engine, EngineOptions
from okavango.serving.types import AdapterRef, Event, Request, SamplingParams

RESULTS = Path(__file__).parent / "results" / "cpu.json"
ADAPTERS = 8
RANK = 16
CASES = {"base": 0, "1 adapter": 1, f"{ADAPTERS} adapters mixed": ADAPTERS}

Answers = list[list[int]]
Run = Callable[[int], Answers]
"""Adapters, over which the requests are spread in turn (0: the bare base) → the tokens of every answer."""


@dataclass(frozen=True)
class Work:
    """`requests` prompts of `prompt` random tokens, `answer` tokens each, greedy."""

    requests: int
    prompt: int
    answer: int

    def prompts(self, vocabulary: int) -> list[tuple[int, ...]]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(100, vocabulary, (self.requests, self.prompt), generator=generator)
        return [tuple(row) for row in ids.tolist()]


@dataclass(frozen=True)
class Turn:
    """One case in one round: seconds of each side, and the share of answers with the same first token.

    Later tokens say little: the adapters are random, and once one token differs, all that follow may.
    """

    ours: float
    peer: float
    same_first: float

    @property
    def ratio(self) -> float:
        return self.peer / self.ours


@dataclass(frozen=True)
class Summary:
    """One case: medians over the rounds of generated tokens a second, the time for prompts included, and of
    the ratio of two runs that stood next to each other."""

    okavango: float
    peer: float
    ratio: float
    lowest: float
    highest: float
    same_first: float

    @classmethod
    def of(cls, turns: Sequence[Turn], tokens: int) -> Summary:
        ratios = [turn.ratio for turn in turns]
        return cls(
            okavango=tokens / statistics.median(turn.ours for turn in turns),
            peer=tokens / statistics.median(turn.peer for turn in turns),
            ratio=statistics.median(ratios),
            lowest=min(ratios),
            highest=max(ratios),
            same_first=statistics.mean(turn.same_first for turn in turns),
        )


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
    """The engine, from submitted requests to their last events."""

    def __init__(self, engine: Engine, refs: Sequence[AdapterRef], work: Work) -> None:
        self.engine, self.refs, self.work = engine, refs, work
        self.prompts = work.prompts(engine.core.runner.decoder.config.vocab_size)

    def run(self, adapters: int) -> Answers:
        answers: Answers = [[] for _ in self.prompts]
        done = threading.Semaphore(0)
        errors: list[Exception] = []

        def sink_of(answer: list[int]) -> Callable[[Event], None]:
            def sink(event: Event) -> None:
                answer.extend(event.tokens)
                errors.extend([event.error] if event.error else [])
                if event.finish is not None:
                    done.release()

            return sink

        params = SamplingParams(max_tokens=self.work.answer, temperature=0, ignore_eos=True)
        for i, prompt in enumerate(self.prompts):
            ref = self.refs[i % adapters] if adapters else None
            self.engine.submit(Request(f"r{i}", Rendered(prompt), ref, params), sink_of(answers[i]))
        for _ in self.prompts:
            done.acquire()
        if errors:
            raise errors[0]
        return answers


class Peer:
    """transformers' generate over one batch. One adapter is active in PEFT as usual, without the cost of
    choosing; several are mixed by PEFT's adapter_names, one name a row."""

    def __init__(self, base: Base, bundles: Bundles, work: Work) -> None:
        self.decoder = load_decoder(base, torch.bfloat16)
        self.model = PeftModel.from_pretrained(
            load_decoder(base, torch.bfloat16), bundles.folders[0] / "decoder", adapter_name="a0"
        )
        for i, folder in enumerate(bundles.folders[1:], start=1):
            self.model.load_adapter(folder / "decoder", adapter_name=f"a{i}")
        self.model.to(torch.bfloat16).eval()
        self.work = work
        self.ids = torch.tensor(work.prompts(self.decoder.config.vocab_size))

    @torch.inference_mode()
    def run(self, adapters: int) -> Answers:
        options = {
            "input_ids": self.ids,
            "attention_mask": torch.ones_like(self.ids),
            "min_new_tokens": self.work.answer,
            "max_new_tokens": self.work.answer,
            "do_sample": False,
        }
        if adapters > 1:
            options["adapter_names"] = [f"a{i % adapters}" for i in range(len(self.ids))]
        found = (self.model if adapters else self.decoder).generate(**options)  # type: ignore[operator]
        return found[:, self.ids.shape[1] :].tolist()


def main() -> None:
    options = parse_options()
    work = Work(options.requests, options.prompt, options.answer)
    base = find_base("starter", load_settings().bases)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about a base whose name is no id on a hub
        bundles = Bundles(base, Path(folder))
        peer = Peer(base, bundles, work)
        engine = Engine(base, bundles, EngineOptions(dtype="bfloat16", slots=ADAPTERS))
        engine.start()
        found = measure(Ours(engine, bundles.refs, work).run, peer.run, options.rounds)
        engine.stop()
    report(work, found)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, number in (("rounds", 5), ("requests", 16), ("prompt", 128), ("answer", 64)):
        parser.add_argument(f"--{name}", type=int, default=number, help=f"default: {number}")
    return parser.parse_args()


def measure(ours: Run, peer: Run, rounds: int) -> dict[str, list[Turn]]:
    """Every case in every round, after an unmeasured one. The sides take turns in going first."""
    found: dict[str, list[Turn]] = {case: [] for case in CASES}
    for number in range(rounds + 1):
        for case, adapters in CASES.items():
            order = [ours, peer] if number % 2 else [peer, ours]
            timed = {run: time_run(run, adapters) for run in order}
            if number > 0:
                found[case].append(compare(timed[ours], timed[peer]))
    return found


def time_run(run: Run, adapters: int) -> tuple[float, Answers]:
    began = time.perf_counter()
    answers = run(adapters)
    return time.perf_counter() - began, answers


def compare(ours: tuple[float, Answers], peer: tuple[float, Answers]) -> Turn:
    assert [len(each) for each in ours[1]] == [len(each) for each in peer[1]], "unequal work"
    same = [mine[0] == theirs[0] for mine, theirs in zip(ours[1], peer[1], strict=True)]
    return Turn(ours[0], peer[0], statistics.mean(same))


def report(work: Work, found: dict[str, list[Turn]]) -> None:
    tokens = work.requests * work.answer
    summary = {case: Summary.of(turns, tokens) for case, turns in found.items()}
    machine = describe()
    shape = f"{work.requests} requests at once, {work.prompt} tokens in, {work.answer} out, bfloat16"
    table = Table(title=f"Generated tokens/s: {shape}, {machine['threads']} threads")
    for name in ("case", "okavango", "PEFT", "ratio", "its range", "first tokens equal"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for case, row in summary.items():
        numbers = f"{row.okavango:.1f}", f"{row.peer:.1f}", f"{row.ratio:.2f}"
        table.add_row(case, *numbers, f"{row.lowest:.2f} to {row.highest:.2f}", f"{row.same_first:.0%}")
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    cases = {
        case: {"summary": asdict(row), "turns": [asdict(turn) for turn in found[case]]}
        for case, row in summary.items()
    }
    RESULTS.write_text(json.dumps({**machine, "work": asdict(work), "cases": cases}, indent=2) + "\n")


def describe() -> dict[str, object]:
    """Machine and versions. `load`: processes that ran or waited to, on average over the last minute."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "machine": names[0] if names else platform.processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("okavango", "torch", "transformers", "peft")},
    }


if __name__ == "__main__":
    main()
