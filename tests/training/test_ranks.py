"""Several processes take the steps that one would take, whatever each one's rows hold."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from training_fixtures import Workshop, picture_row, text_row, write_rows

from okavango.platform.catalog.records import JobRecord
from okavango.platform.errors import NotReadyError
from okavango.training import ranks
from okavango.training.monitor import Monitor, Reason, Stopped
from okavango.training.ranks import Ranks
from okavango.training.run import Outcome
from okavango.training.worker import run_job, submit

STILL = {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}, "views": 0, "align": {"steps": 0}, "lr": 1e-3}


def submitted(workshop: Workshop, **values: Any) -> JobRecord:
    return submit(workshop.catalog, workshop.settings, workshop.spec(**STILL, **values))


def train(workshop: Workshop, job: JobRecord, monitor: Monitor | None = None) -> Outcome:
    return run_job(workshop.catalog, workshop.store, workshop.settings, job.id, monitor or Monitor())


def learned(workshop: Workshop, outcome: Outcome) -> dict[str, torch.Tensor]:
    folder = workshop.store.fetch(outcome.version.digest)
    return {
        f"{path.relative_to(folder)}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        if "probes" not in path.name
        for name, tensor in load_file(path).items()
    }


def losses(workshop: Workshop, job: JobRecord) -> list[float]:
    events = workshop.catalog.list_events(job.id, kind="metrics", limit=1000)
    return [event.data["train_loss"] for event in events if event.data]


@pytest.fixture
def mixed(workshop: Workshop) -> Path:
    """Batches in which one process has pictures alone, or texts alone, or nothing."""
    rows = [
        *(picture_row(f"images/{i}.png", name) for i, name in enumerate(("red fox", "blue car", "tree"))),
        *(text_row("What is it?", f"number {i}, and {'very ' * i}good") for i in range(4)),
    ]
    return write_rows(workshop.folder / "mixed.jsonl", rows)


@pytest.mark.parametrize(
    "values",
    [
        {"batch_size": 4, "accumulation": 2},
        {"batch_size": 3, "joint": {"weight": 0.5, "width": 16}},
        {"batch_size": 1},
    ],
    ids=["in accumulated batches", "with a contrastive loss", "with nothing for one of them"],
)
def test_two_learn_what_one_does(workshop: Workshop, mixed: Path, values: dict[str, Any]) -> None:
    found = []
    for processes in (1, 2):
        job = submitted(workshop, data=mixed, steps=5, processes=processes, **values)
        outcome = train(workshop, job)
        found.append((learned(workshop, outcome), losses(workshop, job)))
    (alone, told), (together, told_together) = found
    assert alone.keys() == together.keys()
    assert len(told) == 5
    assert told_together == pytest.approx(told, rel=1e-4)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    assert not any(name in os.environ for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"))


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(workshop: Workshop, mixed: Path) -> None:
    noisy = {"data": mixed, "steps": 8, "processes": 2, "save_every": 3}
    unbroken = learned(workshop, train(workshop, submitted(workshop, **noisy)))
    job, monitor = submitted(workshop, **noisy), Monitor()
    monitor.listeners.append(
        lambda event: monitor.stop(Reason.INTERRUPT) if event.message == "step 4" else None
    )
    with pytest.raises(Stopped):
        train(workshop, job, monitor)
    resumed = learned(workshop, train(workshop, job))
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())


def test_one_that_dies_gives_the_job_back(workshop: Workshop, mixed: Path) -> None:
    job, monitor = submitted(workshop, data=mixed, steps=10_000, processes=2), Monitor()
    killed = threading.Event()

    def kill(event: Any) -> None:
        if event.message == "step 3" and not killed.is_set():
            killed.set()
            os.kill(_other(job.id), signal.SIGKILL)

    monitor.listeners.append(kill)
    with pytest.raises(NotReadyError, match="a process of the job ended by exit code -9"):
        train(workshop, job, monitor)
    assert workshop.catalog.get_job(job.id).state == "queued"


def test_one_that_does_not_come_is_not_waited_for(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = subprocess.Popen

    def broken(command: list[str], **options: Any) -> Any:
        return started([sys.executable, "-c", "raise SystemExit(7)"], **options)

    monkeypatch.setattr(ranks.subprocess, "Popen", broken)
    with (
        pytest.raises(NotReadyError, match="exit code 7"),
        ranks.joined(2, workshop.settings, "job-none"),
    ):
        pytest.fail("nobody came")


def test_alone_nothing_is_shared_or_added() -> None:
    alone = Ranks(Accelerator(cpu=True))
    parameter = nn.Parameter(torch.ones(2))
    assert alone.share([1, 2, 3]) == [1, 2, 3]
    assert alone.tell("x") == "x"
    assert alone.add_up([parameter], 2.5) == 2.5
    assert parameter.grad is None


def _other(job: str) -> int:
    """The process that another one of a job started."""
    for _ in range(100):
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if b"okavango.training.rank" in words and job.encode() in words:
                return int(path.parent.name)
        time.sleep(0.05)
    raise AssertionError("there is no other process")
