"""`okavango train`, stopped by Ctrl-C and by a kill in the middle, ends in the unbroken run's bundle."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import tomlkit
from training_fixtures import Workshop

from okavango.platform.catalog.store import Catalog
from okavango.training.monitor import Monitor
from okavango.training.spec import TrainSpec
from okavango.training.worker import run_job, submit

OKAVANGO = Path(sys.executable).with_name("okavango")
STEPS = 200


class Terminal:
    """okavango commands in processes of their own, at home in a workshop."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop
        self.environ = os.environ | {
            "OKAVANGO_HOME": str(workshop.settings.home),
            "OKAVANGO_CACHE": str(workshop.settings.cache),
            "OMP_NUM_THREADS": "1",
        }
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [OKAVANGO, *arguments],
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def checkpoint_after(self, process: subprocess.Popen[str], step: int) -> int:
        """Wait for a checkpoint later than `step`; its step."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            found = [int(p.name[5:]) for p in self.workshop.settings.jobs.glob("*/checkpoints/step-*")]
            if found and max(found) > step:
                return max(found)
            if process.poll() is not None:
                pytest.fail(f"it ended with {process.returncode}: {process.communicate()[0]}")
            time.sleep(0.01)
        pytest.fail("no checkpoint came about")


@pytest.fixture
def terminal(workshop: Workshop) -> Iterator[Terminal]:
    terminal = Terminal(workshop)
    yield terminal
    for process in terminal.started:
        if process.poll() is None:
            process.kill()
            process.wait()


def write_config(workshop: Workshop, spec: TrainSpec) -> Path:
    path = workshop.folder / "job.toml"
    values = {key: value for key, value in spec.to_json().items() if value is not None}
    path.write_text(tomlkit.dumps(dict(sorted(values.items(), key=lambda item: isinstance(item[1], dict)))))
    return path


def test_ctrl_c_and_a_kill_change_nothing(workshop: Workshop, terminal: Terminal) -> None:
    catalog = workshop.catalog
    spec = workshop.spec(steps=STEPS, save_every=10, name="broken", lora={"r": 4, "dropout": 0.2})
    job = submit(catalog, workshop.settings, spec.model_copy(update={"name": "whole"}))
    whole = run_job(catalog, workshop.store, workshop.settings, job.id, Monitor()).version

    first = terminal.start("train", "--config", str(write_config(workshop, spec)))
    terminal.checkpoint_after(first, 0)
    first.send_signal(signal.SIGINT)
    output = first.communicate(timeout=60)[0]
    assert first.returncode == 130, output
    command = re.search(r"okavango (train --resume (job-\w+))$", output, re.MULTILINE)
    assert command is not None, output
    job_id = command[2]
    assert catalog.get_job(job_id).state == "queued"

    second = terminal.start(*command[1].split())
    interrupted = max(int(p.name[5:]) for p in workshop.settings.jobs.glob("*/checkpoints/step-*"))
    killed = terminal.checkpoint_after(second, interrupted)
    second.kill()
    second.wait()
    assert killed < STEPS
    assert catalog.get_job(job_id).state == "running"
    expire_lease(workshop, job_id)

    third = terminal.start(*command[1].split())
    output = third.communicate(timeout=120)[0]
    assert third.returncode == 0, output
    assert re.search(r"Going on after step \d+\.", output)
    broken = catalog.resolve("broken@1")
    assert broken.digest == whole.digest
    assert broken.metrics == whole.metrics
    assert f"broken@1  {broken.digest}" in output


def expire_lease(workshop: Workshop, job_id: str) -> None:
    """As if so much time had passed: somebody takes the job over, and gives it back."""
    later = Catalog(workshop.settings.database, lambda: datetime.now(UTC) + timedelta(hours=1))
    assert later.claim_job("later", 60, job_id) is not None
    later.release_job(job_id, "later")
    later.close()
