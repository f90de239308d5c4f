"""A comparison as JSON for programs and as Markdown for people, both from one run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comparison import Against, Case, Summary, Turns, Work, own_ratio
from machine import describe
from timing import Figures, Spread

PACKAGES = ("okavango", "torch", "transformers", "peft")
MIB = 1 << 20
PERCENTILES = ("p50", "p95", "p99")
_MEMORY = {"resident": "", "of it anonymous": "anonymous_"}


@dataclass(frozen=True)
class Report:
    """A finished comparison.

    Attributes:
        kernels: what computed our steps.
        ours: our side's name in `turns`.
        ratios: cases of ours to set beside each other: (case, the case that it is measured against).
        memory: resident bytes of our engine's process; see resident.py.
        arrivals: by case, requests that came at random at half of what we can answer.
    """

    dtype: str
    kernels: str
    base: str
    work: Work
    cases: tuple[Case, ...]
    turns: Turns
    ours: str
    ratios: tuple[tuple[str, str], ...]
    memory: dict[str, int]
    arrivals: dict[str, Figures]
    threads: int

    @property
    def summaries(self) -> dict[str, Summary]:
        return {case.name: Summary.of(self.turns[case.name], self.ours) for case in self.cases}

    @property
    def own(self) -> dict[str, float]:
        return {
            f"{case} / {other}": own_ratio(self.turns, case, other, self.ours) for case, other in self.ratios
        }


def write(report: Report, folder: Path, name: str) -> str:
    """Write <name>.json and <name>.md; the latter's text."""
    machine = describe(PACKAGES)
    shown = markdown(report, machine)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(shown)
    (folder / f"{name}.json").write_text(json.dumps({**machine, **as_json(report)}, indent=2) + "\n")
    return shown


def as_json(report: Report) -> dict[str, Any]:
    return {
        "threads": report.threads,
        "dtype": report.dtype,
        "kernels": report.kernels,
        "base": report.base,
        "work": asdict(report.work),
        "cases": {name: asdict(summary) for name, summary in report.summaries.items()},
        "own_ratios": report.own,
        "memory": report.memory,
        "arrivals": {name: asdict(figures) for name, figures in report.arrivals.items()},
        "rates": {
            case: {side: [turn.rate for turn in turns] for side, turns in sides.items()}
            for case, sides in report.turns.items()
        },
    }


def markdown(report: Report, machine: dict[str, object]) -> str:
    first = report.turns[report.cases[0].name]
    peers = [side for side in first if side != report.ours]
    parts = [
        "# Throughput beside transformers and PEFT",
        "Written by `make bench`; do not edit.",
        describe_machine(machine, f"{report.threads} threads"),
        _setting(report, len(first[report.ours])),
        table(["case", report.ours, *peers], [_row(*each, peers) for each in report.summaries.items()]),
        "Ours beside itself, each round by itself:",
        table(["", "ratio"], [[name, f"{ratio:.2f}"] for name, ratio in report.own.items()]),
        "Resident memory of a process that runs our engine alone, on the same requests:",
        _memory(report.memory),
        "Requests that arrive at random, at half of the rates above; milliseconds to the first token:",
        table(["case", "a second", *PERCENTILES], [_arrivals(*each) for each in report.arrivals.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def describe_machine(machine: dict[str, Any], more: str) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"{machine['machine']}, {machine['cpus']} CPUs, {more}, load {machine['load']:.1f}; "
        f"Python {machine['python']}, {versions}."
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def ms(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["–"] * len(PERCENTILES)
    return [f"{seconds * 1000:.0f}" for seconds in (spread.p50, spread.p95, spread.p99)]


def _setting(report: Report, rounds: int) -> str:
    work = report.work
    return (
        f"Base {report.base}, {report.dtype}, {report.kernels} kernels, greedy; {work.requests} requests at "
        f"once, {work.prompt} tokens in, {work.answer} out, no prompt twice. Generated tokens/s, the time "
        f"for prompts included; of a single stream, those after its first. Medians of {rounds} rounds; × is "
        "ours over the peer's in the same round, with its range."
    )


def _memory(resident: dict[str, int]) -> str:
    when = ["loaded", "peak", "after"]
    rows = [[label, *(_mib(resident.get(f"{key}{each}")) for each in when)] for label, key in _MEMORY.items()]
    return table(["", *when], rows)


def _mib(size: int | None) -> str:
    return "–" if size is None else f"{size / MIB:.0f} MiB"


def _arrivals(name: str, figures: Figures) -> list[str]:
    return [name, f"{figures.request_rate:.2f}", *ms(figures.first)]


def _row(name: str, summary: Summary, peers: Sequence[str]) -> list[str]:
    return [name, f"**{summary.rate:.1f}**", *(_against(summary.peers.get(peer)) for peer in peers)]


def _against(peer: Against | None) -> str:
    if peer is None:
        return "–"
    return f"{peer.rate:.1f} (× {peer.ratio:.2f}, {peer.lowest:.2f} to {peer.highest:.2f})"
