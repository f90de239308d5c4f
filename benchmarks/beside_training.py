"""What requests notice of a training job on the same machine, and the job of them.

    python benchmarks/beside_training.py                 on the starter base
    python benchmarks/beside_training.py --requests 20   a quicker look

Starts `okavango serve` with its own worker, and asks it in turn with nothing beside it, with a job beside it,
and with nothing again. Prints the figures, and writes them with machine and versions to beside_training.json
and beside_training.md in benchmarks/results.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asking import Form, Model, opened
from client import Client
from machine import describe
from openai import OpenAI
from report import PACKAGES, describe_machine, table
from rich.console import Console
from rich.markdown import Markdown
from timing import Figures, Spread
from workload import Prompts, poisson

from okavango.platform.config import Settings, environment_of, load_settings

OKAVANGO = Path(sys.executable).with_name("okavango")
RESULTS = Path(__file__).parent / "results"
ROWS = 200


@dataclass(frozen=True)
class Found:
    """By what ran beside: requests' figures of every round. Seconds a step of the job: alone, and beside
    requests."""

    figures: dict[str, list[Figures]]
    steps: dict[str, float]


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as home, _server(Path(home), options.base) as url:
        found = asyncio.run(_measure(url, options))
    shown = _markdown(found, options)
    RESULTS.mkdir(exist_ok=True)
    raw = {"figures": {name: [asdict(each) for each in rounds] for name, rounds in found.figures.items()}}
    machine = describe(PACKAGES)
    (RESULTS / "beside_training.json").write_text(
        json.dumps({**machine, "options": vars(options), **raw, "steps": found.steps}, indent=1) + "\n"
    )
    (RESULTS / "beside_training.md").write_text(shown)
    Console().print(Markdown(shown))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="starter")
    parser.add_argument("--requests", type=int, default=60, help="of each turn")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--prompt", type=int, default=128, help="words of a prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


@contextmanager
def _server(home: Path, base: str) -> Iterator[str]:
    settings = Settings(home=home, cache=load_settings().cache)
    process = subprocess.Popen(
        [OKAVANGO, "serve", "--base", base, "--port", "0"],
        env=environment_of(settings),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http://" in line)
        yield "http://" + line.partition("http://")[2].split("/")[0].strip()
    finally:
        process.terminate()
        process.wait(120)


async def _measure(url: str, options: argparse.Namespace) -> Found:
    figures: dict[str, list[Figures]] = {"nothing": [], "a job": []}
    job = _Job(url, options.base)
    steps: dict[str, float] = {}
    await _ask(url, options, "warming")
    for number in range(options.rounds):
        figures["nothing"].append(await _ask(url, options, f"before {number}"))
        await asyncio.to_thread(job.start)
        if not steps:
            steps["alone"] = await asyncio.to_thread(job.pace, lambda: time.sleep(40))
        begun = job.events()
        figures["a job"].append(await _ask(url, options, f"beside {number}"))
        steps["beside requests"] = job.pace_since(begun)
        await asyncio.to_thread(job.cancel)
    figures["nothing"].append(await _ask(url, options, "after"))
    return Found(figures, steps)


async def _ask(url: str, options: argparse.Namespace, seed: str) -> Figures:
    extras = {"ignore_eos": True, "min_tokens": options.output}
    form = Form("completions", "words", options.output, True, 0, extras)
    prompts = Prompts(seed, options.prompt)
    model = Model.parse(options.base)
    calls = [form.call(model, prompts, i) for i in range(options.requests)]
    async with Client(url, None, 600) as client:
        replies = await opened(client, calls, poisson(seed, len(calls), options.rate))
    return Figures.of([reply.trace() for reply in replies])


class _Job:
    """A training job on rows of text, long enough to outlast what is measured."""

    def __init__(self, url: str, base: str) -> None:
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none needed on loopback")
        rows = "".join(json.dumps(_row(i)) + "\n" for i in range(ROWS))
        self._file = self._client.files.create(file=("rows.jsonl", rows.encode()), purpose="fine-tune").id
        self._base = base
        self._id = ""

    def start(self) -> None:
        asked = {"okavango": {"steps": 1_000_000, "save_every": 1_000_000}}
        jobs = self._client.fine_tuning.jobs
        self._id = jobs.create(model=self._base, training_file=self._file, extra_body=asked).id
        while not self.events():
            time.sleep(0.5)

    def events(self) -> Sequence[tuple[float, int]]:
        """(seconds, step) of steps so far, the newest thousand."""
        found: list[Any] = list(self._client.fine_tuning.jobs.list_events(self._id, limit=1000).data)
        return [(each.created_at, each.data["step"]) for each in found if "train_loss" in (each.data or {})]

    def pace(self, wait: Callable[[], None]) -> float:
        before = self.events()
        wait()
        return self.pace_since(before)

    def pace_since(self, before: Sequence[tuple[float, int]]) -> float:
        """Seconds a step since these events."""
        (start, first), (end, last) = max(before), max(self.events())
        return (end - start) / max(1, last - first)

    def cancel(self) -> None:
        jobs = self._client.fine_tuning.jobs
        jobs.cancel(self._id)
        while jobs.retrieve(self._id).status != "cancelled":
            time.sleep(0.5)


def _row(i: int) -> dict[str, Any]:
    question = {"role": "user", "content": f"What comes after {i}, and what do you think of it? " * 3}
    return {"messages": [question, {"role": "assistant", "content": f"{i + 1}, which is one more. " * 4}]}


def _markdown(found: Found, options: argparse.Namespace) -> str:
    machine = describe(PACKAGES)
    lines = [
        "# Requests beside a training job",
        "",
        describe_machine(machine, "the server's defaults"),
        "",
        f"{options.base}; {options.requests} requests a turn, {options.rate:g} a second at random; some "
        f"{options.prompt} tokens in, {options.output} out; the job gets what is left (nice 19, half of the "
        "cores). Medians over turns.",
        "",
    ]
    heads = ("beside it", "first token p50", "p95", "gap p50", "p95", "p99")
    rows = [(name, *_cells(rounds)) for name, rounds in found.figures.items()]
    paces = ", ".join(f"{name} {pace:.2f} s" for name, pace in found.steps.items())
    lines += [table(heads, rows), "", f"A step of the job: {paces}."]
    return "\n".join(lines) + "\n"


def _cells(rounds: Sequence[Figures]) -> list[str]:
    firsts = [each.first for each in rounds]
    gaps = [each.gap for each in rounds]
    return [
        *(_milliseconds(firsts, name) for name in ("p50", "p95")),
        *(_milliseconds(gaps, name) for name in ("p50", "p95", "p99")),
    ]


def _milliseconds(spreads: Sequence[Spread | None], name: str) -> str:
    return f"{statistics.median(getattr(each, name) for each in spreads if each) * 1000:.0f} ms"


if __name__ == "__main__":
    main()
