"""The estimate against what a batch takes: tensors that autograd keeps, and the process's own peak."""

import json
import os
import subprocess
import sys
from pathlib import Path

import memory_process
import pytest
import torch
from memory_process import CASES, batch_of, spec_of, trainee_of

from okavango.modalities.base import Base
from okavango.modalities.tiny import write_tiny_base
from okavango.training.build import build_trainee
from okavango.training.check import check_dataset, measure_of
from okavango.training.memory import Estimate, Length, Shape, estimate, shape_of
from okavango.training.spec import parse_spec


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Tiny tensors are quicker on one."""


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A tiny base whose layers are wide enough for activations to count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("okavango.modalities.tiny.WIDTH", 256)
        patch.setattr("okavango.modalities.tiny.CONTEXT", 1024)
        return write_tiny_base(tmp_path_factory.mktemp("bases") / "wide", image=False)


@pytest.mark.parametrize(("precision", "dropout"), CASES)
def test_activations_are_what_autograd_keeps(wide_base: Base, precision: str, dropout: float) -> None:
    spec, length = spec_of(precision, dropout), Length(96, 8)
    trainee, shape = trainee_of(wide_base, spec), shape_of(wide_base, spec)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = batch_of(shape, 4, length)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainee.loss(batch)
    own = {parameter.untyped_storage().data_ptr() for parameter in trainee.parameters()}
    found = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own)
    guess = estimate(shape, [length] * 4)
    assert 0.7 < (guess.activations + guess.attention) / found < 1.4
    assert loss.isfinite()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_weights_and_what_learns_are_counted(tiny_base: Base, precision: str) -> None:
    spec = spec_of(precision, 0.05)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    trainee = build_trainee(tiny_base, spec, dtype, modalities=["image"], learned=["image"])
    guess = estimate(shape_of(tiny_base, spec), [Length(8, 2)])
    learned = trainee.trained().values()
    assert guess.learned == 16 * sum(parameter.numel() for parameter in learned)
    frozen = [parameter for parameter in trainee.parameters() if not parameter.requires_grad]
    assert guess.weights == pytest.approx(sum(parameter.nbytes for parameter in frozen), rel=0.05)


def test_a_step_takes_about_what_is_estimated(wide_base: Base) -> None:
    """A process's peak, so the bounds are wide: allocators and libraries take their share."""
    command = [sys.executable, memory_process.__file__, str(wide_base.folder)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    cases = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(cases) == len(CASES) + 1
    assert cases[-1]["found"] < 0.7 * cases[0]["found"]
    for case in cases:
        assert case["estimate"] > 100e6
        assert 0.6 < case["estimate"] / case["found"] < 1.7, case


def test_targets_and_parts_that_do_not_learn_count_for_less(tiny_base: Base) -> None:
    def learned(**values: object) -> Shape:
        return shape_of(tiny_base, parse_spec({"base": "t", "data": "x", "name": "x", **values}))

    everything = learned()
    narrow = learned(lora={"targets": ["q_proj"]})
    regular = learned(lora={"targets": r".*\.q_proj"})
    assert narrow == regular
    assert 0 < narrow.adapted_layers < everything.adapted_layers
    assert learned(lora={"train": False}).adapted_layers == 0
    assert learned(head={"train": False}).learned < everything.learned


def test_the_check_estimates_the_batch_of_the_longest_rows(tiny_base: Base, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    answers = ["a" * size for size in (5, 90, 40, 80, 3)]
    rows = [{"instruction": "Say it.", "output": answer} for answer in answers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measure = measure_of(tiny_base, spec_of("float32", 0.05, batch_size=2))
    report = check_dataset(path, measure=measure)
    assert [place.row for place in report.longest] == [2, 4, 3, 1, 5]
    assert report.tokens is not None
    assert report.tokens.largest == report.longest[0].size == report.counts.longest
    memory = report.memory
    assert isinstance(memory, Estimate)
    assert (memory.rows, memory.tokens) == (2, 2 * report.counts.longest)
    by_tokens = measure_of(tiny_base, spec_of("float32", 0.05, batch_tokens=3 * report.counts.longest + 1))
    filled = check_dataset(path, measure=by_tokens).memory
    assert filled is not None
    assert (filled.rows, filled.tokens) == (3, 3 * report.counts.longest)
    assert report.to_json()["memory"]["total"] == memory.total
    assert check_dataset(path, measure=measure_of(tiny_base)).memory is None
