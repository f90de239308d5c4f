"""What is lost, and what is won, where the decoder computes with fewer bits than float32.

    python benchmarks/quality.py                          the starter base, 8,192 tokens of English
    python benchmarks/quality.py --base NAME --tokens N

Reads the texts of Python's own help (pydoc_data.topics) in windows, and compares each way to compute with
float32: the loss on the next token, how often both find the same token likeliest, and how far their
distributions are apart; beside them tokens a second of short answers. Writes quality.json and quality.md in
benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from machine import describe
from ours import Bundles, Ours, base_of, engine_options
from report import PACKAGES, describe_machine, table
from torch import Tensor
from workload import Prompts

from okavango.modalities.base import Base, load_tokenizer
from okavango.modalities.build import quiet_transformers
from okavango.modalities.prompt import Rendered
from okavango.serving.engine import Engine
from okavango.serving.scheduler import Chunk, Step
from okavango.serving.sequence import Sequence
from okavango.serving.types import Request

WINDOW = 512
# name: dtype, kernels, quantization; the first is what the others are compared with
WAYS = {
    "float32": ("float32", "native", None),
    "bfloat16, torch": ("bfloat16", "torch", None),
    "bfloat16": ("bfloat16", "native", None),
    "bfloat16, int8 weights": ("bfloat16", "native", "int8"),
}
PROMPT, ANSWER, MANY = 128, 64, 16


@dataclass(frozen=True)
class Quality:
    """Over all positions: mean negative log-likelihood in nats, the share whose likeliest token is float32's,
    and the mean divergence KL(float32 ‖ this) in nats. Rates in tokens a second, medians of three."""

    loss: float
    agreement: float
    divergence: float
    single: float
    many: float


class Sums:
    """Figures of one way, added up over windows of logits."""

    def __init__(self) -> None:
        self.loss = self.same = self.divergence = 0.0
        self.count = 0

    def add(self, logits: Tensor, reference: Tensor, following: Tensor) -> None:
        """Logits [T, V] and float32's, and the tokens [T] that came."""
        own, full = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
        self.loss -= own.gather(-1, following[:, None]).sum().item()
        self.same += (own.argmax(-1) == full.argmax(-1)).sum().item()
        self.divergence += (full.exp() * (full - own)).sum().item()
        self.count += len(following)


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        base = base_of(options.base, Path(folder))
        measured = measure(base, options.tokens)
    text = markdown(measured, base, options.tokens)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {
        "machine": describe(PACKAGES),
        "ways": {name: asdict(quality) for name, quality in measured.items()},
    }
    (options.out / "quality.json").write_text(json.dumps(found, indent=2) + "\n")
    (options.out / "quality.md").write_text(text)
    print(text)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="starter", help='a base\'s name, or "tiny"')
    parser.add_argument("--tokens", type=int, default=8192, help="of text (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder to write into"
    )
    return parser.parse_args()


def measure(base: Base, tokens: int) -> dict[str, Quality]:
    reference: list[Tensor] = []
    found = {}
    for name, (dtype, kernels, quantization) in WAYS.items():
        options = engine_options(dtype, kernels, quantization=quantization)
        engine = Engine(base, Bundles([]), options)
        sums = Sums()
        for number, (logits, following) in enumerate(read(engine, base, tokens)):
            if len(reference) == number:
                reference.append(logits)
            sums.add(logits, reference[number], following)
        engine.start()
        single, many = (rate(Ours(engine), count) for count in (1, MANY))
        engine.stop()
        mean = [total / sums.count for total in (sums.loss, sums.same, sums.divergence)]
        found[name] = Quality(*mean, single, many)
        print(name, found[name], flush=True)
    return found


def read(engine: Engine, base: Base, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of text: their logits [T, V], and the tokens [T] that follow."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = load_tokenizer(base).encode(text)[:tokens]
    blocks = list(range(-(-WINDOW // engine.core.runner.options.block_size)))
    for start in range(0, len(ids) - 1, WINDOW):
        window = ids[start : start + WINDOW]
        sequence = Sequence(Request(f"w{start}", Rendered(tuple(window))), max_tokens=1)
        sequence.blocks = blocks
        step = Step((), (Chunk(sequence, 0, len(window)),))
        logits = engine.core.runner.run(step, range(len(window)))
        yield logits[:-1], torch.tensor(window[1:])


def rate(ours: Ours, count: int) -> float:
    """Generated tokens a second of so many requests at once, their prompts included."""
    rates = []
    for turn in range(4):
        prompts = Prompts(f"quality {turn}", PROMPT)
        answers = ours.ask([prompts.ids(n, ours.vocabulary) for n in range(count)], [], ANSWER)
        took = max(a.trace.ended for a in answers) - min(a.trace.sent for a in answers)
        rates.append(count * ANSWER / took)
    return sorted(rates[1:])[1]


def markdown(measured: dict[str, Quality], base: Base, tokens: int) -> str:
    head = [
        "computed in",
        "loss",
        "same likeliest token",
        "divergence",
        "1 request, tokens/s",
        f"{MANY} requests",
    ]
    rows = [
        [
            name,
            f"{q.loss:.4f}",
            f"{q.agreement:.1%}",
            f"{q.divergence:.5f}",
            f"{q.single:.1f}",
            f"{q.many:.0f}",
        ]
        for name, q in measured.items()
    ]
    return "\n".join(
        (
            "# What fewer bits lose\n\nWritten by `benchmarks/quality.py`; do not edit.\n",
            describe_machine(describe(PACKAGES), f"base {base.name}"),
            f"\n{tokens:,} tokens of the texts of Python's own help, in windows of {WINDOW}. Loss in nats on "
            "the next token; likeliest token and divergence (KL, nats) beside float32's. Rates are of "
            f"answers of {ANSWER} tokens to prompts of {PROMPT}, prompts included.\n",
            table(head, rows),
            "",
        )
    )


if __name__ == "__main__":
    main()
