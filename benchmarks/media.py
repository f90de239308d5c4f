"""What media cost: text beside a base that could see, one picture under many adapters, streams while pictures
come.

    python benchmarks/media.py                 on the starter base
    python benchmarks/media.py --base tiny     a quick look, on the tiny base

Prints the figures, and writes them with machine and versions to media.json and media.md in
benchmarks/results.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from comparison import Work
from machine import describe
from ours import Bundles, Ours, base_of, engine_options
from report import MIB, PACKAGES, describe_machine, table
from rich.console import Console
from rich.markdown import Markdown
from timing import Figures, Spread

from okavango.modalities.base import Base
from okavango.modalities.build import quiet_transformers, write_description
from okavango.modalities.content import Media, Message, Text
from okavango.modalities.prompt import Rendered
from okavango.platform.telemetry import NullMetrics
from okavango.serving.engine import Engine
from okavango.serving.types import AdapterRef, Event, Request, SamplingParams

ADAPTERS = 8
PICTURES = 32
STREAMS = 8
STREAMED = 192
QUESTION = "What does this picture show?"


class Runs(NullMetrics):
    """Counts what encoders do."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        self.counts[name] += int(amount)

    @property
    def encoder(self) -> int:
        return self.counts["okavango_encoder_runs_total"]


@dataclass(frozen=True)
class Found:
    """Everything by round, seconds and tokens a second.

    Attributes:
        rates, firsts: of text requests, by base: the whole one, and its decoder alone.
        resident: bytes after text requests, of processes of their own, by base.
        shared, separate: seconds until adapters have each answered about one picture, and about one each.
        runs: of the encoder for the one, and for one each.
        gaps: seconds between tokens of running streams, by what arrives beside them.
    """

    rates: dict[str, list[float]]
    firsts: dict[str, list[float]]
    resident: dict[str, int]
    shared: list[float]
    separate: list[float]
    runs: tuple[int, int]
    gaps: dict[str, list[Spread]]


class Asker:
    """Asks about pictures, each a request of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.errors: list[Exception] = []
        self._count = 0

    def all(self, pictures: Sequence[bytes], refs: Sequence[AdapterRef | None], answer: int) -> float:
        """Seconds until all are answered, adapters in turn."""
        began = time.perf_counter()
        asked = [self._ask(each, refs[i % len(refs)], answer) for i, each in enumerate(pictures)]
        for done in asked:
            done.wait()
        if self.errors:
            raise self.errors[0]
        return time.perf_counter() - began

    def prompt(self, picture: bytes) -> Rendered:
        return self.engine.renderer.prompt([Message("user", (Media("image", picture), Text(QUESTION)))])

    def _ask(self, picture: bytes, ref: AdapterRef | None, answer: int) -> threading.Event:
        self._count += 1
        done = threading.Event()

        def sink(event: Event) -> None:
            if event.finish is not None:
                self.errors += [event.error] if event.error is not None else []
                done.set()

        prompt = self.prompt(picture)
        params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
        self.engine.submit(Request(f"picture{self._count}", prompt, ref, params), sink)
        return done


def main() -> None:
    options = parse_options()
    work = Work(options.requests, options.prompt, options.answer)
    with tempfile.TemporaryDirectory() as name, quiet_transformers():
        folder = Path(name)
        base = base_of(options.base, folder)
        with Console(stderr=True).status("memory") as status:
            found = measure(options, base, folder, work, status.update)
    Console().print(Markdown(write(options, base.name, work, found)))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    numbers = {"rounds": 5, "requests": 16, "prompt": 128, "answer": 64, "pictures": PICTURES}
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number, help=f"default: {number}")
    parser.add_argument("--base", default="starter", help='a base, or "tiny" for a quick look')
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--kernels", choices=("native", "torch"), default="native", help="what computes steps"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="a folder")
    return parser.parse_args()


def measure(
    options: argparse.Namespace, base: Base, folder: Path, work: Work, tell: Callable[[str], None]
) -> Found:
    """Both bases in turn, first one and then the other first, so that neither has the quieter half."""
    (folder / "alone").mkdir()
    alone = write_description(folder / "alone", "alone", base.decoder.path, base.decoder.context)
    asked = {"dtype": options.dtype, "kernels": options.kernels, "slots": ADAPTERS}
    bases = {"whole": base, "decoder alone": alone}
    resident = {name: resident_after(each, work, asked) for name, each in bases.items()}
    bundles = Bundles.write(base, folder, ADAPTERS)
    runs = Runs()
    engines = {
        "whole": Engine(base, bundles, engine_options(**asked), runs),
        "decoder alone": Engine(alone, bundles, engine_options(**asked)),
    }
    for engine in engines.values():
        engine.start()
    sides = {name: Ours(engine) for name, engine in engines.items()}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    firsts: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-1, options.rounds):
        tell(f"text, round {number + 1} of {options.rounds}")
        for name in sorted(sides, reverse=number % 2 == 0):
            rate, first = text(sides[name], work, f"{number}/{name}")
            if number >= 0:  # the round before warms up
                rates[name].append(rate)
                firsts[name].append(first)
    engines["decoder alone"].stop()
    whole, asker = sides["whole"], Asker(engines["whole"])
    shared, separate, counted = under_adapters(asker, bundles, runs, options.rounds, tell)
    gaps = beside(whole, asker, options, tell)
    engines["whole"].stop()
    return Found(rates, firsts, resident, shared, separate, counted, gaps)


def text(side: Ours, work: Work, seed: str) -> tuple[float, float]:
    """Tokens a second of requests that come at once, and the median of seconds to the first token of such
    that come one by one."""
    together = side.ask(work.prompts(seed, work.requests, side.vocabulary), [], work.answer)
    one_by_one = work.prompts(f"{seed}/single", work.requests, side.vocabulary)
    alone = side.ask(one_by_one, [], 2, concurrency=1)
    firsts = [answer.trace.first for answer in alone if answer.trace.first is not None]
    return Figures.of([answer.trace for answer in together]).output_rate, statistics.median(firsts)


def under_adapters(
    asker: Asker, bundles: Bundles, runs: Runs, rounds: int, tell: Callable[[str], None]
) -> tuple[list[float], list[float], tuple[int, int]]:
    """Seconds until all adapters have answered about one picture, and about one each; runs of the encoder."""
    shared, separate = [], []
    asker.all([picture(0)], [None], 1)  # the encoder is loaded
    asker.all([picture(0)] * ADAPTERS, bundles.refs, 1)  # and so are the adapters
    counted = (0, 0)
    for number in range(rounds):
        tell(f"one picture under {ADAPTERS} adapters, round {number + 1} of {rounds}")
        first = 1000 * (number + 1)
        before = runs.encoder
        shared.append(asker.all([picture(first)] * ADAPTERS, bundles.refs, 1))
        between = runs.encoder
        different = [picture(first + 1 + i) for i in range(ADAPTERS)]
        separate.append(asker.all(different, bundles.refs, 1))
        counted = (between - before, runs.encoder - between)
    return shared, separate, counted


def beside(
    side: Ours, asker: Asker, options: argparse.Namespace, tell: Callable[[str], None]
) -> dict[str, list[Spread]]:
    """Gaps between tokens of text streams: with nothing beside them, with texts as long as a prompt about a
    picture, and with pictures."""
    length = len(asker.prompt(picture(0)).tokens)
    found: dict[str, list[Spread]] = {"nothing": [], "texts": [], "pictures": []}
    for number in range(options.rounds):
        for name, gaps in found.items():
            tell(f"streams while {name} come, round {number + 1} of {options.rounds}")
            seed = f"streams/{number}/{name}"
            prompts = Work(STREAMS, options.prompt, STREAMED).prompts(seed, STREAMS, side.vocabulary)
            count = 0 if name == "nothing" else options.pictures
            arriving = threading.Timer(0.3, arrive, (side, asker, name, count, length, number))
            arriving.start()
            answers = side.ask(prompts, [], STREAMED)
            arriving.join()
            spread = Spread.of([gap for answer in answers for gap in answer.trace.gaps])
            assert spread is not None
            gaps.append(spread)
    return found


def arrive(side: Ours, asker: Asker, kind: str, count: int, length: int, number: int) -> None:
    if kind == "texts":
        prompts = Work(count, length, 1).prompts(f"beside/{number}", count, side.vocabulary)
        Ours(side.engine, prefix="beside").ask(prompts, [], 1)
    elif kind == "pictures":
        asker.all([picture(10_000 * (number + 1) + i) for i in range(count)], [None], 1)


def picture(seed: int, side: int = 448) -> bytes:
    """A photograph's size, content that nobody has seen, as JPEG."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (14, 14, 3), generator=generator, dtype=torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def resident_after(base: Base, work: Work, options: dict[str, Any]) -> int:
    """Resident bytes of a process that has answered texts alone."""
    asked = {"base": str(base.folder), "bundles": [], "work": asdict(work), "options": options}
    command = [sys.executable, str(Path(__file__).with_name("resident.py")), json.dumps(asked)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["after"])


def write(options: argparse.Namespace, base: str, work: Work, found: Found) -> str:
    """Write media.json and media.md; the latter's text."""
    machine = {**describe(PACKAGES), "threads": torch.get_num_threads()}
    options.out.mkdir(parents=True, exist_ok=True)
    raw = {"base": base, "dtype": options.dtype, "kernels": options.kernels, "work": asdict(work)}
    described = {**machine, **raw, "pictures": options.pictures, **asdict(found)}
    (options.out / "media.json").write_text(json.dumps(described, indent=2) + "\n")
    parts = [
        "# What media cost",
        "Written by `benchmarks/media.py`; do not edit.",
        describe_machine(machine, f"{machine['threads']} threads"),
        f"Base {base}, {options.dtype}, {options.kernels} kernels, greedy; medians of {options.rounds} "
        "rounds, ratios of the same round with their range.",
        "## Text beside a base that could see and hear",
        f"{work.requests} requests at once, {work.prompt} tokens in, {work.answer} out; first tokens of as "
        "many that come one by one; memory of processes of their own after such requests.",
        _text(found),
        f"## One picture under {ADAPTERS} adapters",
        "Seconds until each has answered with one token; adapters that leave the encoder alone.",
        _adapters(found),
        f"## {STREAMS} text streams while {options.pictures} pictures come at once",
        "Milliseconds between tokens. Texts: as many prompts as long as one about a picture.",
        _gaps(found),
    ]
    shown = "\n\n".join(parts) + "\n"
    (options.out / "media.md").write_text(shown)
    return shown


def _text(found: Found) -> str:
    rows = [
        [
            name,
            f"{statistics.median(found.rates[name]):.1f}",
            f"{statistics.median(found.firsts[name]) * 1000:.1f}",
            f"{found.resident[name] / MIB:.0f}",
        ]
        for name in found.rates
    ]
    ratios = [
        "ratio",
        *(_ratio(values["whole"], values["decoder alone"]) for values in (found.rates, found.firsts)),
    ]
    memory = f"{found.resident['whole'] / found.resident['decoder alone']:.3f}"
    return table(["base", "tokens/s", "first token, ms", "resident, MiB"], [*rows, [*ratios, memory]])


def _adapters(found: Found) -> str:
    rows = [
        ["one picture", f"{statistics.median(found.shared):.3f}", str(found.runs[0])],
        [f"{ADAPTERS} pictures", f"{statistics.median(found.separate):.3f}", str(found.runs[1])],
        ["ratio", _ratio(found.shared, found.separate), ""],
    ]
    return table(["", "seconds", "encoder runs"], rows)


def _gaps(found: Found) -> str:
    rows = []
    for name, spreads in found.gaps.items():
        cells = [
            statistics.median(getattr(each, share) for each in spreads) for share in ("p50", "p95", "p99")
        ]
        slower = _ratio([each.p99 for each in spreads], [each.p99 for each in found.gaps["nothing"]])
        rows.append([name, *(f"{cell * 1000:.1f}" for cell in cells), slower])
    return table(["beside them", "p50", "p95", "p99", "p99, ratio"], rows)


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
