"""A process that takes training steps and says what its memory came to: one JSON object a line.

    MALLOC_MMAP_THRESHOLD_=1048576 python memory_process.py BASE

With that variable the C library gives back what is freed; otherwise it may hold as much again, by chance.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from okavango.modalities.base import Base, read_base
from okavango.training.build import build_trainee
from okavango.training.collate import Batch, Row, collate
from okavango.training.memory import Length, Shape, estimate, shape_of
from okavango.training.model import Trainee
from okavango.training.spec import TrainSpec, parse_spec

CASES = [("float32", 0.05), ("float32", 0.0), ("bf16", 0.05), ("bf16", 0.0)]
ROWS, LENGTH = 24, Length(512, 64)


def spec_of(precision: str, dropout: float, **values: Any) -> TrainSpec:
    lora = {"r": 8, "dropout": dropout}
    return parse_spec(
        {"base": "tiny", "data": "x", "name": "x", "precision": precision, "lora": lora, **values}
    )


def trainee_of(base: Base, spec: TrainSpec) -> Trainee:
    dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
    return build_trainee(base, spec, dtype)


def batch_of(shape: Shape, rows: int, length: Length) -> Batch:
    """Rows of random tokens that begin with nothing in common."""
    chance = np.random.default_rng(0)
    loss = np.arange(length.tokens + 1) > length.tokens - length.answer
    tokens = [chance.integers(0, shape.vocabulary, length.tokens + 1).astype(np.int32) for _ in range(rows)]
    return collate([Row(1, each, loss, (), ()) for each in tokens], lambda modality, digest: torch.empty(0))


def step(base: Base, spec: TrainSpec, shape: Shape, rows: int, length: Length) -> None:
    trainee = trainee_of(base, spec)
    optimizer = torch.optim.AdamW(trainee.trained().values(), fused=True)
    batch = batch_of(shape, rows, length)
    trainee.loss(batch, smoothing=0.1).backward()
    optimizer.step()


def peak_of_step(base: Base, spec: TrainSpec, shape: Shape) -> int:
    """Bytes by which a step raises this process's memory, as Linux counts it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _bytes("VmRSS")
    step(base, spec, shape, ROWS, LENGTH)
    return _bytes("VmHWM") - before


def _bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    torch.set_num_threads(1)
    base = read_base(Path(sys.argv[1]))
    for precision, dropout, recompute in [*((*case, False) for case in CASES), (*CASES[0], True)]:
        spec = spec_of(precision, dropout, recompute=recompute)
        shape = shape_of(base, spec)
        step(base, spec, shape, 1, LENGTH)  # libraries allocate with their first use
        found = peak_of_step(base, spec, shape)
        guess = estimate(shape, [LENGTH] * ROWS).total
        print(json.dumps({"case": [precision, dropout, recompute], "found": found, "estimate": guess}))


if __name__ == "__main__":
    main()
