"""How fast a check of data is, and how much memory it takes, however many rows there are.

    python benchmarks/data.py                                a million rows of each format, about ten minutes
    python benchmarks/data.py --rows 20000 --out build/look  a quick look

Each check runs in a process of its own, at a tenth of the rows and at all of them, which tells what a row
takes. Beside them: parsing the same file with json.loads, line by line, which is the least that any reader
does; and `datasets`, which loads it as Arrow and checks nothing. Files are made with one seed, in a temporary
folder. Writes data.json and data.md to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("okavango", "datasets", "pyarrow", "transformers")
RESULTS = Path(__file__).parent / "results"
TEXT = "the a red blue old new small large dog cat tree house river stone of in with and under over"
PICTURES = 1000
HEAD = ("rows", "rows/s", "rows a CPU second", "beside json.loads", "start, MiB", "peak, MiB", "bytes a row")
_MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """`share`: of the rows that are asked for; what looks at media or tokens takes longer a row."""

    name: str
    file: str
    share: float = 1.0
    base: bool = False


CASES = (
    Case("OpenAI messages, JSONL", "openai.jsonl"),
    Case("ShareGPT, JSON array", "sharegpt.json"),
    Case("Alpaca, parquet", "alpaca.parquet"),
    Case(f"LLaVA with {PICTURES:,} pictures, JSONL", "llava.jsonl", 0.1),
    Case("OpenAI messages, tokens counted", "openai.jsonl", 0.1, base=True),
)
PEERS = {"json.loads": "openai.jsonl", "datasets": "openai.jsonl"}


@dataclass(frozen=True)
class Run:
    """One process. `seconds` by the clock, `cpu` on a processor, which other work on the machine changes
    less. `peak`: resident bytes at most; `start`: those before the first row."""

    rows: int
    seconds: float
    cpu: float
    start: int
    peak: int

    @property
    def rate(self) -> float:
        return self.rows / self.seconds

    @property
    def cpu_rate(self) -> float:
        return self.rows / self.cpu

    @property
    def grown(self) -> int:
        return self.peak - self.start


def main() -> None:
    options = parse_options()
    if options.one:
        print(json.dumps(asdict(one(*options.one))))
        return
    from machine import describe

    machine = describe(PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        found = {case.name: pair(case, options, Path(folder)) for case in CASES}
        peers = {name: pair(Case(name, file), options, Path(folder)) for name, file in PEERS.items()}
    write(machine, found, peers, options.out)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, default=1_000_000)
    add("--base", default="starter", help='whose tokens are counted; "" for none')
    add("--out", type=Path, default=RESULTS, help="a folder")
    add("--one", nargs=3, metavar=("WHAT", "FILE", "BASE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def pair(case: Case, options: argparse.Namespace, folder: Path) -> tuple[Run, Run] | None:
    """A case at a tenth of its rows, and at all of them."""
    if case.base and not options.base:
        return None
    what = case.name if case.name in PEERS else "check"
    rows = int(options.rows * case.share)
    found = []
    for count in (rows // 10, rows):
        file = folder / str(count) / case.file
        if not file.exists():
            make(file, count)
        command = [sys.executable, __file__, "--one", what, str(file), options.base if case.base else ""]
        cache = {"OKAVANGO_CACHE": str(folder / "cache")} if not case.base else {}
        result = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | cache
        )
        found.append(Run(**json.loads(result.stdout.splitlines()[-1])))
        print(f"{case.name}: {count:,} rows, {found[-1].rate:,.0f} a second", flush=True)
    return found[0], found[1]


def one(what: str, file: str, base: str) -> Run:
    """Run one thing in this process."""
    prepared = PREPARE[what](Path(file), base)
    start, begin, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    rows = prepared()
    seconds = time.perf_counter() - begin, time.process_time() - cpu
    return Run(rows, *seconds, start, resident("VmHWM"))


def _check(file: Path, base: str) -> Callable[[], int]:
    from okavango.training.check import check_dataset, measure_of

    measure = None
    if base:
        from okavango.modalities.base import find_base
        from okavango.platform.config import load_settings

        measure = measure_of(find_base(base, load_settings().bases))

    def run() -> int:
        report = check_dataset(file, measure=measure)
        report.require_ok()
        return report.counts.rows

    return run


def _parse(file: Path, base: str) -> Callable[[], int]:
    def run() -> int:
        with file.open("rb") as lines:
            return sum(1 for line in lines if json.loads(line))

    return run


def _load(file: Path, base: str) -> Callable[[], int]:
    import datasets

    datasets.disable_progress_bars()

    def run() -> int:
        with tempfile.TemporaryDirectory() as cache:
            table = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=cache)
            return len(table)

    return run


PREPARE = {"check": _check, "json.loads": _parse, "datasets": _load}


def resident(name: str) -> int:
    """Bytes of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def make(file: Path, rows: int) -> None:
    """A file of so many different rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    chance = random.Random(f"{file.name} {rows}")
    pairs = ((f"{i}: {said(chance, 25)}?", said(chance, 12)) for i in range(rows))
    MAKE[file.name](file, pairs)


def said(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(TEXT.split(), k=words))


Pairs = Iterator[tuple[str, str]]


def _openai(file: Path, pairs: Pairs) -> None:
    roles = ("user", "assistant")
    turns = (
        [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)] for pair in pairs
    )
    _lines(file, ({"messages": messages} for messages in turns))


def _sharegpt(file: Path, pairs: Pairs) -> None:
    with file.open("w") as out:
        for i, pair in enumerate(pairs):
            row = {"system": "Be brief.", "conversations": _talk(*pair)}
            out.write(("," if i else "[") + json.dumps(row))
        out.write("]")


def _alpaca(file: Path, pairs: Pairs) -> None:
    import datasets

    datasets.disable_progress_bars()
    questions, answers = zip(*pairs, strict=True)
    datasets.Dataset.from_dict({"instruction": questions, "output": answers}).to_parquet(file)


def _llava(file: Path, pairs: Pairs) -> None:
    from PIL import Image

    (file.parent / "images").mkdir()
    for i in range(PICTURES):
        Image.effect_noise((64, 64), i / 10).save(file.parent / "images" / f"{i}.png")
    rows = (
        {"id": i, "image": f"images/{i % PICTURES}.png", "conversations": _talk(f"<image>\n{ask}", answer)}
        for i, (ask, answer) in enumerate(pairs)
    )
    _lines(file, rows)


def _talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _lines(file: Path, rows: Iterator[dict[str, Any]]) -> None:
    with file.open("w") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


MAKE = {"openai.jsonl": _openai, "sharegpt.json": _sharegpt, "alpaca.parquet": _alpaca, "llava.jsonl": _llava}
Pairings = Mapping[str, tuple[Run, Run] | None]


def write(machine: dict[str, Any], found: Pairings, peers: Pairings, folder: Path) -> None:
    from report import describe_machine, table

    floor = peers["json.loads"]
    assert floor is not None
    rows = [cells(name, pair, floor[1].cpu_rate) for name, pair in {**found, **peers}.items() if pair]
    parts = [
        "# Checking data",
        "Written by `benchmarks/data.py`; do not edit.",
        describe_machine(machine, "one process"),
        "Start and peak are resident memory; the peak of parquet includes pages of the mapped Arrow file, "
        "which the system may drop. What a row takes is the difference of two peaks, at all rows and at a "
        "tenth of them. The ratio is that of CPU time.",
        table(["", *HEAD], rows),
    ]
    raw = {
        name: [asdict(run) for run in pair] for name, pair in {**found, **peers}.items() if pair is not None
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").write_text(json.dumps({**machine, "runs": raw}, indent=2) + "\n")
    (folder / "data.md").write_text("\n\n".join(parts) + "\n")
    print((folder / "data.md").read_text())


def cells(name: str, pair: tuple[Run, Run], floor: float) -> list[str]:
    few, many = pair
    a_row = (many.grown - few.grown) / (many.rows - few.rows)
    sizes = [f"{size / _MIB:.0f}" for size in (many.start, many.peak)]
    rates = [f"{rate:,.0f}" for rate in (many.rate, many.cpu_rate)]
    return [name, f"{many.rows:,}", *rates, f"{many.cpu_rate / floor:.2f} ×", *sizes, f"{a_row:.0f}"]


if __name__ == "__main__":
    main()
