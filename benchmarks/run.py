"""Ours beside transformers' generate with PEFT and its continuous batching, in turn on the same prompts.

    make bench                           five rounds, 16 requests of 128 tokens in and 64 out
    make bench ARGS="--rounds 1 --requests 4 --prompt 32 --answer 16"

Prints medians and ratios, and writes them with machine and versions to cpu.json and cpu.md in
benchmarks/results. Load of other programs slows all sides, but not alike: measure on a machine that does
nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from comparison import Case, Side, Turns, Work, measure
from ours import Answer, Bundles, Ours, base_of, engine_options
from peers import Continuous, Generate
from report import Report, write
from rich.console import Console
from rich.markdown import Markdown
from timing import Figures
from workload import poisson

from okavango.modalities.base import Base
from okavango.modalities.build import quiet_transformers
from okavango.serving.engine import Engine

ADAPTERS = 8
BASE, ONE, MIXED = "base", "1 adapter", f"{ADAPTERS} adapters mixed"
SINGLE, SINGLE_ONE = "single stream", "single stream, adapter"
TOGETHER = (Case(BASE, 0), Case(ONE, 1), Case(MIXED, ADAPTERS))
CASES = (*TOGETHER, Case(SINGLE, 0, is_single=True), Case(SINGLE_ONE, 1, is_single=True))
RATIOS = ((ONE, BASE), (MIXED, BASE), (SINGLE_ONE, SINGLE))


class Okavango(Ours):
    """Our engine as a side of the comparison."""

    def __init__(self, engine: Engine, bundles: Bundles) -> None:
        super().__init__(engine)
        self.refs = bundles.refs

    def can(self, adapters: int) -> bool:
        return True

    def run(self, prompts: Sequence[Sequence[int]], adapters: int, length: int, **pace: Any) -> list[Answer]:
        return self.ask(prompts, self.refs[:adapters], length, **pace)


def main() -> None:
    options = parse_options()
    work = Work(options.requests, options.prompt, options.answer)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about a base whose name is no id on a hub
        base = base_of(options.base, Path(folder))
        bundles = Bundles.write(base, Path(folder), ADAPTERS)
        with Console(stderr=True).status("memory") as status:
            found = compare(options, base, bundles, work, status.update)
    shown = write(found, options.out, "cpu")
    Console().print(Markdown(shown))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    numbers = {"rounds": 5, "requests": 16, "prompt": 128, "answer": 64, "arrivals": 64}
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number, help=f"default: {number}")
    parser.add_argument("--base", default="starter", help='a base, or "tiny" for a quick look')
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--kernels", choices=("native", "torch"), default="native", help="what computes ours")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="a folder")
    return parser.parse_args()


def compare(
    options: argparse.Namespace, base: Base, bundles: Bundles, work: Work, tell: Callable[[str], None]
) -> Report:
    memory = measure_memory(options, base, bundles, work)
    engine = Engine(base, bundles, engine_options(**engine_asked(options)))
    engine.start()
    ours, dtype = Okavango(engine, bundles), getattr(torch, options.dtype)
    continuous = Continuous(base, dtype, work.requests, work.prompt, work.answer)
    sides: list[Side] = [ours, Generate(base, bundles, dtype), continuous]
    turns = measure(sides, CASES, work, ours.vocabulary, options.rounds, tell)
    continuous.close()
    tell("requests that arrive at random")
    arrivals = {case.name: arrive(ours, case, work, options.arrivals, turns) for case in TOGETHER}
    engine.stop()
    return Report(
        dtype=options.dtype,
        kernels=ours.kernels,
        base=base.name,
        work=work,
        cases=CASES,
        turns=turns,
        ours=ours.name,
        ratios=RATIOS,
        memory=memory,
        arrivals=arrivals,
        threads=torch.get_num_threads(),
    )


def engine_asked(options: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": options.dtype, "kernels": options.kernels, "slots": ADAPTERS}


def arrive(ours: Okavango, case: Case, work: Work, count: int, turns: Turns) -> Figures:
    """Requests that come at random, at half of the rate at which they were answered when all came at once."""
    answered = statistics.median(turn.rate for turn in turns[case.name][ours.name]) / work.answer
    prompts = work.prompts(f"arrivals/{case.name}", count, ours.vocabulary)
    when = poisson(case.name, count, answered / 2)
    answers = ours.run(prompts, case.adapters, work.answer, arrivals=when)
    return Figures.of([answer.trace for answer in answers])


def measure_memory(options: argparse.Namespace, base: Base, bundles: Bundles, work: Work) -> dict[str, int]:
    """Resident bytes of a process that runs our engine alone."""
    asked = {
        "base": str(base.folder),
        "bundles": [str(bundles.fetch(ref.digest)) for ref in bundles.refs],
        "work": asdict(work),
        "options": engine_asked(options),
    }
    command = [sys.executable, str(Path(__file__).with_name("resident.py")), json.dumps(asked)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
