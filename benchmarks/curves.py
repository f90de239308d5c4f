"""How the engine's speed changes with what is asked of it: a curve a dimension, a few seconds a point.

    python benchmarks/curves.py                               all curves, on the starter base
    python benchmarks/curves.py --base tiny                   a quick look, on the tiny base
    python benchmarks/curves.py --only context concurrency    some of them

Prints each curve, and writes all with machine and versions to curves.json and curves.md in
benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from dimensions import BUNDLES, CURVES, REGISTERED, Curve, Point, Setup
from machine import describe
from ours import Bundles, base_of, engine_options
from report import PACKAGES, describe_machine, table
from rich.console import Console
from rich.markdown import Markdown
from timing import Figures, Spread

from okavango.modalities.build import quiet_transformers


def prompt_rate(figures: Figures) -> float | None:
    """Of one request at a time: prompt tokens a second until the first token."""
    return figures.prompt_tokens / figures.requests / figures.first.p50 if figures.first else None


def ms(spread: Spread | None, name: str) -> float | None:
    return getattr(spread, name) * 1000 if spread is not None else None


COLUMNS: Mapping[str, Callable[[Figures], float | None]] = {
    "tokens/s": lambda figures: figures.output_rate,
    "prompt tokens/s": prompt_rate,
    "decoding, tokens/s": lambda figures: figures.decode_rate,
    "first token, ms": lambda figures: ms(figures.first, "p50"),
    "its p95": lambda figures: ms(figures.first, "p95"),
    "between tokens, ms": lambda figures: ms(figures.gap, "p50"),
    "their p95": lambda figures: ms(figures.gap, "p95"),
}


@dataclass(frozen=True)
class Measured:
    curve: Curve
    points: tuple[Point, ...]

    @property
    def section(self) -> str:
        columns = self.curve.columns
        rows = [[point.label, *(cell(name, point) for name in columns)] for point in self.points]
        parts = f"## {self.curve.title}", self.curve.about, table([self.curve.axis, *columns], rows)
        return "\n\n".join(parts)


def main() -> None:
    options = parse_options()
    wanted = [CURVES[name] for name in options.only or CURVES]
    with tempfile.TemporaryDirectory() as folder, quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about a base whose name is no id on a hub
        base = base_of(options.base, Path(folder))
        most = min(options.most, max(REGISTERED))
        bundles = Bundles.write(base, Path(folder), BUNDLES, copies=max(0, most - BUNDLES))
        engine = engine_options(options.dtype, options.kernels)
        setup = Setup(base, bundles, Path(folder), engine, options.most)
        found = [measure(curve, setup) for curve in wanted]
    write(options, found)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--base", default="starter", help='a base, or "tiny" for a quick look')
    add("--only", nargs="+", choices=tuple(CURVES), metavar="CURVE", help=f"of {', '.join(CURVES)}")
    add("--most", type=int, default=1 << 30, help="leave out points beyond this number")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--kernels", choices=("native", "torch"), default="native", help="what computes steps")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="a folder")
    return parser.parse_args()


def measure(curve: Curve, setup: Setup) -> Measured:
    """All points of a curve; shows where it is, and the curve at the end."""
    console = Console()
    points: list[Point] = []
    with console.status(curve.title) as status:
        for point in curve.measure(setup):
            points.append(point)
            status.update(f"{curve.title}: {', '.join(each.label for each in points)} done")
    found = Measured(curve, tuple(points))
    console.print(Markdown(found.section))
    return found


def write(options: argparse.Namespace, found: Sequence[Measured]) -> None:
    machine = {**describe(PACKAGES), "threads": torch.get_num_threads()}
    options.out.mkdir(parents=True, exist_ok=True)
    kernels = sorted({point.kernels for each in found for point in each.points})
    raw = {
        "base": options.base,
        "dtype": options.dtype,
        "kernels": kernels,
        "curves": {each.curve.name: [asdict(point) for point in each.points] for each in found},
    }
    (options.out / "curves.json").write_text(json.dumps({**machine, **raw}, indent=2) + "\n")
    parts = [
        "# Growth",
        "Written by `benchmarks/curves.py`; do not edit.",
        describe_machine(machine, f"{machine['threads']} threads"),
        f"Base {options.base}, {options.dtype}, {', '.join(kernels)} kernels, greedy. Times are medians "
        "unless a percentile is named.",
        *(each.section for each in found),
    ]
    (options.out / "curves.md").write_text("\n\n".join(parts) + "\n")


def cell(name: str, point: Point) -> str:
    value = COLUMNS[name](point.figures)
    return "–" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    main()
