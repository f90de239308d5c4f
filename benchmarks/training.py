"""How fast the training loop is beside what transformers and PEFT do by themselves, and at which memory.

    python benchmarks/training.py                                        on the starter base
    python benchmarks/training.py --base tiny --steps 8 --rounds 1       a quick look
    python benchmarks/training.py --base 8b --device cuda --cases text   a random 8B, on a GPU

Both sides train the same LoRA on the same rows for as many steps of as many rows: Python's own docstrings,
and short answers about pictures. Each turn is a process of its own, and the sides take turns. Prints the
figures, and writes them with machine and versions to training.json and training.md, or training-<base>, in
benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from machine import describe
from report import MIB, PACKAGES, describe_machine, table
from rich.console import Console
from rich.markdown import Markdown

RESULTS = Path(__file__).parent / "results"
OURS, PEER = "okavango", "Trainer + PEFT"
CASES = {"text": "docstrings", "pictures": "pictures"}
Turns = Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]
"""By case and side, what training_side.py printed, round by round."""


def main() -> None:
    options = parse_options()
    turns: dict[str, dict[str, list[dict[str, float]]]] = {}
    shown = ""
    with Console(stderr=True).status("") as status, tempfile.TemporaryDirectory() as folder:
        for case in options.cases:
            turns[case] = {OURS: [], PEER: []}
            for number in range(options.rounds):
                sides = (OURS, PEER) if number % 2 == 0 else (PEER, OURS)
                for side in sides:
                    status.update(f"{CASES[case]}, round {number + 1} of {options.rounds}: {side}")
                    turns[case][side].append(turn(options, case, side, Path(folder)))
                shown = write(options, turns)  # each round: a run that is cut short leaves what it has found
    Console().print(Markdown(shown))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    numbers = {"rounds": 3, "steps": 24, "batch": 16, "rows": 1024}
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number, help=f"default: {number}")
    parser.add_argument("--base", default="starter", help="a base, tiny, smollm2-135m or 8b")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "float32"))
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder")
    return parser.parse_args()


def turn(options: argparse.Namespace, case: str, side: str, folder: Path) -> dict[str, float]:
    own = Path(tempfile.mkdtemp(dir=folder))
    asked = {"case": case, "side": side, "folder": str(own)}
    asked |= {name: getattr(options, name) for name in ("base", "steps", "batch", "rows", "device", "dtype")}
    command = [sys.executable, str(Path(__file__).with_name("training_side.py")), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side}: {done.stderr[-4000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def write(options: argparse.Namespace, turns: Turns) -> str:
    """Write the results; their text."""
    machine = describe(PACKAGES)
    name = "training" if options.base == "starter" else f"training-{options.base}"
    options.out.mkdir(parents=True, exist_ok=True)
    asked = {key: value for key, value in vars(options).items() if key != "out"}
    raw = {**machine, "asked": asked, "turns": turns}
    (options.out / f"{name}.json").write_text(json.dumps(raw, indent=2) + "\n")
    head = ["rows", "rounds", "side", "tokens/s", "over the peer", "a step, s", "peak, MiB", "held-out loss"]
    parts = [
        "# Training beside transformers and PEFT",
        "Written by `benchmarks/training.py`; do not edit.",
        describe_machine(machine, f"on {where(options.device)}"),
        f"Base {options.base}, {options.dtype}, {options.steps} steps of {options.batch} rows, LoRA of rank "
        "16 on all linear layers; medians of the rounds, ratios of the same round with their "
        "range. Tokens are those of rows, padding left out.",
        table(head, [row for case, sides in turns.items() for row in rows_of(CASES[case], sides)]),
    ]
    shown = "\n\n".join(parts) + "\n"
    (options.out / f"{name}.md").write_text(shown)
    return shown


def rows_of(case: str, sides: Mapping[str, Sequence[Mapping[str, float]]]) -> list[list[str]]:
    def median(side: str, key: str) -> float:
        return statistics.median(each[key] for each in sides[side])

    pairs = zip(sides[OURS], sides[PEER], strict=True)
    ratios = [ours["tokens_per_second"] / peer["tokens_per_second"] for ours, peer in pairs]
    against = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return [
        [
            case,
            str(len(sides[side])),
            side,
            f"{median(side, 'tokens_per_second'):,.0f}",
            against if side == OURS else "1",
            f"{median(side, 'seconds'):.2f}",
            f"{median(side, 'peak') / MIB:,.0f}",
            f"{median(side, 'valid_loss'):.3f}",
        ]
        for side in sides
    ]


def where(device: str) -> str:
    if device == "cpu":
        return "its CPUs"
    import torch

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
