"""`okavango worker` on real databases: what is queued gets done, whoever is killed meanwhile."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from training_fixtures import Workshop

from okavango.platform.catalog import migrate
from okavango.platform.catalog.records import JobRecord
from okavango.platform.catalog.store import open_catalog
from okavango.platform.config import environment_of
from okavango.training.monitor import Monitor
from okavango.training.worker import run_job, submit

OKAVANGO = Path(sys.executable).with_name("okavango")
STEPS = 120
# Python runs a file of this name at its start. From outside it would be too late: events come once a second.
SITECUSTOMIZE = """
import os, signal, sys
from pathlib import Path

if "okavango.training.process" in sys.orig_argv:
    from okavango.training.monitor import Monitor

    note, mark = Monitor.note, Path(__file__).with_name("killed")

    def note_and_die(monitor, kind, message, **data):
        note(monitor, kind, message, **data)
        if not mark.exists() and (message == {moment!r} or data.get("step") == {moment!r}):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    Monitor.note = note_and_die
"""


class Workers:
    """Processes of `okavango worker` on a workshop's catalog."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [OKAVANGO, "worker", "--threads", "1", *arguments],
            env={**environment_of(self.workshop.settings), **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self.processes.append(process)
        return process

    def job(self, job_id: str) -> JobRecord:
        return self.workshop.catalog.get_job(job_id)

    def wait_for(self, what: Callable[[], Any], seconds: float = 120) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = what()
            if found:
                return found
            time.sleep(0.05)
        states = [(job.id, job.state, job.error) for job in self.workshop.catalog.list_jobs()]
        pytest.fail(f"waited in vain: {states}")

    def messages(self, job_id: str) -> list[str]:
        return [event.message for event in self.workshop.catalog.list_events(job_id, limit=10_000)]

    def steps(self, job_id: str) -> list[int]:
        events = self.workshop.catalog.list_events(job_id, kind="metrics", limit=10_000)
        return [event.data["step"] for event in events if event.data and "train_loss" in event.data]


@pytest.fixture
def workers(workshop: Workshop) -> Iterator[Workers]:
    found = Workers(workshop)
    yield found
    for process in found.processes:
        process.kill()
        process.communicate()


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """Processes of the jobs that a worker does."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def long_spec(workshop: Workshop, **values: Any) -> Any:
    return workshop.spec(**{"steps": STEPS, "save_every": 20, "eval": None, **values})


def weights(workshop: Workshop, job: JobRecord) -> dict[str, Any]:
    assert job.result is not None
    folder = workshop.store.fetch(job.result["digest"])
    return load_file(folder / "decoder" / "adapter_model.safetensors")


def test_what_is_queued_is_done_and_told(workers: Workers) -> None:
    workshop = workers.workshop
    spoiled = workshop.folder / "spoiled.jsonl"
    spoiled.write_text((workshop.folder / "pictures.jsonl").read_text())
    good = submit(workshop.catalog, workshop.settings, long_spec(workshop, steps=6))
    bad = submit(workshop.catalog, workshop.settings, long_spec(workshop, data=spoiled, name="other"))
    spoiled.write_text('{"messages": []}\n')
    assert workers.start("--until-idle").wait(120) == 0
    assert workers.job(good.id).state == "succeeded"
    assert workers.steps(good.id) == [1, 2, 3, 4, 5, 6]
    events = workshop.catalog.list_events(good.id, limit=1000)
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert [event.message for event in events if event.kind == "state"] == ["queued", "running", "succeeded"]
    failed = workers.job(bad.id)
    assert failed.state == "failed"
    assert "spoiled.jsonl:1" in (failed.error or "")
    assert workers.messages(bad.id)[-1] == "failed"
    assert not list(workshop.settings.jobs.glob("*"))
    assert (workshop.settings.home / "logs" / f"{bad.id}.log").read_text()


def test_pause_resume_and_cancel(workers: Workers) -> None:
    workshop, catalog = workers.workshop, workers.workshop.catalog
    job = submit(catalog, workshop.settings, long_spec(workshop, steps=100_000))
    workers.start()
    workers.wait_for(lambda: len(workers.steps(job.id)) > 5)
    catalog.request_pause(job.id)
    workers.wait_for(lambda: workers.job(job.id).state == "paused")
    reached = workers.steps(job.id)[-1]
    assert list((workshop.settings.jobs / job.id).glob(f"checkpoints/step-{reached:06d}"))
    catalog.resume_job(job.id)
    after = workers.wait_for(lambda: workers.steps(job.id)[reached:])
    assert after[0] == reached + 1
    catalog.request_cancel(job.id)
    workers.wait_for(lambda: workers.job(job.id).state == "cancelled")
    workers.wait_for(lambda: not (workshop.settings.jobs / job.id).exists())


@pytest.mark.parametrize("moment", [31, "Writing the bundle and its probes."])
def test_a_killed_process_gives_its_job_back(workers: Workers, moment: int | str, tmp_path: Path) -> None:
    """Killed when it notes a step or says something, once."""
    workshop = workers.workshop
    unbroken = submit(workshop.catalog, workshop.settings, long_spec(workshop, name="unbroken"))
    run_job(workshop.catalog, workshop.store, workshop.settings, unbroken.id, Monitor())
    job = submit(workshop.catalog, workshop.settings, long_spec(workshop))
    killer = tmp_path / "killer" / "sitecustomize.py"
    killer.parent.mkdir()
    killer.write_text(SITECUSTOMIZE.format(moment=moment))
    assert workers.start("--until-idle", PYTHONPATH=str(killer.parent)).wait(120) == 0
    assert killer.with_name("killed").exists()
    done = workers.job(job.id)
    assert (done.state, done.attempts) == ("succeeded", 2)
    expected, found = weights(workshop, workers.job(unbroken.id)), weights(workshop, done)
    assert all((found[name] == value).all() for name, value in expected.items())


def test_a_killed_worker_s_jobs_stop_and_go_to_another(workers: Workers) -> None:
    workshop, catalog = workers.workshop, workers.workshop.catalog
    job = submit(catalog, workshop.settings, long_spec(workshop, steps=100_000))
    first = workers.start()
    workers.wait_for(lambda: len(workers.steps(job.id)) > 5)
    first.send_signal(signal.SIGKILL)
    workers.wait_for(lambda: workers.job(job.id).state == "queued", seconds=20)  # and not after a lease
    reached = workers.steps(job.id)[-1]
    workers.start()
    after = workers.wait_for(lambda: workers.steps(job.id)[reached:])
    assert (after[0], workers.job(job.id).attempts) == (reached + 1, 2)
    catalog.request_cancel(job.id)
    workers.wait_for(lambda: workers.job(job.id).state == "cancelled")


def test_two_workers_on_postgresql_whoever_is_killed(workshop: Workshop, postgres_url: str) -> None:
    migrate.upgrade(postgres_url)
    settings = replace(workshop.settings, database_url=postgres_url)
    shared = replace(workshop, settings=settings, catalog=open_catalog(settings))
    workers = Workers(shared)
    chance = random.Random(5)
    try:
        jobs = [submit(shared.catalog, settings, long_spec(shared, name=f"a{i}")) for i in range(4)]
        started = [workers.start("--until-idle") for _ in range(2)]
        for _ in range(3):
            time.sleep(chance.uniform(4, 9))
            victims = [child for worker in started for child in children(worker)]
            if victims:
                os.kill(chance.choice(victims), signal.SIGKILL)
        for worker in started:
            assert worker.wait(240) == 0
        found = [workers.job(job.id) for job in jobs]
        assert [job.state for job in found] == ["succeeded"] * 4, [job.error for job in found]
        for job in found:
            assert job.result is not None
            (version,) = shared.catalog.get_adapter(job.name).versions
            assert (version.digest, version.job_id) == (job.result["digest"], job.id)
        first, *others = [weights(shared, job) for job in found]
        for other in others:
            assert all((other[name] == value).all() for name, value in first.items())
    finally:
        for process in workers.processes:
            process.kill()
            process.communicate()
        shared.catalog.close()
