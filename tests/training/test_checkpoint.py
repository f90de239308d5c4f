from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from okavango.platform.errors import ConflictError
from okavango.training.checkpoint import Checkpoints, restore


class Small:
    """Two groups of parameters and their optimiser, after a few steps."""

    def __init__(self, steps: int = 3) -> None:
        self.parameters = {"a": nn.Parameter(torch.ones(3)), "b.c": nn.Parameter(torch.zeros(2, 2))}
        groups = [{"params": [p], "lr": 0.1} for p in self.parameters.values()]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        """A step that depends on all three random states."""
        noise = torch.randn(3) + random.random() + np.random.rand()
        loss = (self.parameters["a"] * noise).sum() + (self.parameters["b.c"] - 1).square().sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self) -> list[float]:
        return [x for p in self.parameters.values() for x in p.flatten().tolist()]

    def save(self, checkpoints: Checkpoints, step: int) -> Path:
        return checkpoints.save(step, self.parameters, self.optimizer, {"loss": 0.1 + step})


def seed() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def test_what_goes_on_from_a_checkpoint_ends_where_the_unbroken_run_does(tmp_path: Path) -> None:
    seed()
    unbroken = Small()
    unbroken.save(Checkpoints(tmp_path, "f"), 3)
    for _ in range(4):
        unbroken.step()

    random.seed(99)
    torch.manual_seed(99)
    resumed = Small(steps=0)
    checkpoint = Checkpoints(tmp_path, "f").latest()
    assert checkpoint is not None
    restore(checkpoint, resumed.parameters, resumed.optimizer)
    assert (checkpoint.step, checkpoint.facts["loss"]) == (3, 3.1)
    for _ in range(4):
        resumed.step()
    assert resumed.values() == unbroken.values()


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    small, checkpoints = Small(), Checkpoints(tmp_path, "f")
    for step in (9, 10, 100, 1000):
        small.save(checkpoints, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000100", "step-001000"]


@pytest.mark.parametrize("torn", ["state.json", "state.safetensors", "both"])
@pytest.mark.parametrize("how", ["cut", "gone", "altered"])
def test_a_torn_checkpoint_gives_way_to_the_one_before(tmp_path: Path, torn: str, how: str) -> None:
    small, checkpoints = Small(), Checkpoints(tmp_path, "f")
    small.save(checkpoints, 1)
    newest = small.save(checkpoints, 2)
    for name in ("state.json", "state.safetensors") if torn == "both" else (torn,):
        path = newest / name
        data = bytearray(path.read_bytes())
        match how:
            case "cut":
                path.write_bytes(data[: len(data) // 2])
            case "gone":
                path.unlink()
            case "altered":
                data[len(data) // 2] ^= 1 if name == "state.safetensors" else 0x80
                path.write_bytes(data)
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 1


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    small, checkpoints = Small(), Checkpoints(tmp_path, "f")
    assert checkpoints.latest() is None
    (tmp_path / ".partial").mkdir(parents=True)
    (tmp_path / ".partial" / "state.safetensors").write_bytes(b"half")
    assert checkpoints.latest() is None
    small.save(checkpoints, 5)
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 5
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_one_of_another_run_is_refused(tmp_path: Path) -> None:
    Small().save(Checkpoints(tmp_path, "f"), 1)
    with pytest.raises(ConflictError, match="changed since it was saved"):
        Checkpoints(tmp_path, "other").latest()


def test_it_holds_nothing_that_could_run_code(tmp_path: Path) -> None:
    folder = Small().save(Checkpoints(tmp_path, "f"), 1)
    assert sorted(path.name for path in folder.iterdir()) == ["state.json", "state.safetensors"]
    assert json.loads((folder / "state.json").read_text())["step"] == 1
