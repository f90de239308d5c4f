from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_fixtures import Workshop, picture_row, text_row, write_rows

from okavango.platform.bundle import verify
from okavango.platform.errors import (
    ConfigError,
    ConflictError,
    DataError,
    InputError,
    NotFoundError,
    NotReadyError,
    UnsupportedError,
)
from okavango.training import run as run_module
from okavango.training.monitor import Monitor, Reason, Stopped
from okavango.training.run import Outcome
from okavango.training.spec import TrainSpec
from okavango.training.worker import run_job, submit


class Watched(Monitor):
    """A monitor that calls `at_step` after every training step, and keeps what was said."""

    def __init__(self, at_step: Callable[[int], None] = lambda step: None) -> None:
        super().__init__()
        self.at_step = at_step
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "progress" and value.get("phase") == "training" and "loss" in value:
            self.at_step(value["done"])


def go(workshop: Workshop, spec: TrainSpec, monitor: Monitor | None = None, lease: float = 60) -> Outcome:
    job = submit(workshop.catalog, workshop.settings, spec)
    return resume(workshop, job.id, monitor, lease)


def resume(workshop: Workshop, job_id: str, monitor: Monitor | None = None, lease: float = 60) -> Outcome:
    return run_job(
        workshop.catalog, workshop.store, workshop.settings, job_id, monitor or Monitor(), lease_seconds=lease
    )


def only_job(workshop: Workshop) -> Any:
    (job,) = workshop.catalog.list_jobs()
    return job


def test_a_job_ends_in_a_version_that_serving_can_fetch(workshop: Workshop) -> None:
    spec = workshop.spec(eval=workshop.folder / "pictures.jsonl", samples=3, max_new_tokens=4)
    outcome = go(workshop, spec)
    job = only_job(workshop)
    assert job.state == "succeeded"
    assert job.result == {
        "adapter": "emoji@1",
        "digest": outcome.version.digest,
        "metrics": outcome.version.metrics,
        "steps": 4,
        "trained_tokens": outcome.version.lineage["tokens"],
    }
    assert outcome.version.lineage["tokens"] > 4 * 4 * 10
    scores = {"bleu4", "chrf", "exact_match"}
    own = {f"{score}{end}" for score in scores for end in ("", "_low", "_high")}
    assert outcome.version.metrics.keys() == {"train_loss", "loss", *own, *(f"base_{s}" for s in scores)}
    assert len(outcome.samples) == 3
    manifest = verify(workshop.store.fetch(outcome.version.digest), outcome.version.digest)
    assert manifest.lineage["job"] == job.id
    assert not (workshop.settings.jobs / job.id).exists()
    data = workshop.catalog.get_dataset(manifest.lineage["data"]["digest"])
    assert (data.name, data.rows) == ("pictures.jsonl", 8)


def test_text_alone_trains(workshop: Workshop) -> None:
    path = write_rows(workshop.folder / "text.jsonl", [text_row("a", "b"), text_row("c", "d", "e", "f")])
    monitor = Watched()
    outcome = go(workshop, workshop.spec(data=path), monitor)
    assert outcome.version.modalities == ()
    assert outcome.version.metrics.keys() == {"train_loss"}
    assert not workshop.settings.features.exists()


def test_without_a_head_the_bases_own_is_used(workshop: Workshop) -> None:
    outcome = go(workshop, workshop.spec(head={"train": False}))
    assert outcome.version.components == workshop.base.components


def test_heads_alone_learn_from_mixed_data_and_not_from_text(workshop: Workshop) -> None:
    rows = [picture_row("images/0.png", "a"), *(text_row("a", f"b{i}") for i in range(6))]
    mixed = write_rows(workshop.folder / "mixed.jsonl", rows)
    alone = {"lora": {"train": False}, "batch_size": 2}
    version = go(workshop, workshop.spec(data=mixed, eval=mixed, **alone)).version
    assert {"loss", "chrf"} <= version.metrics.keys()
    manifest = verify(workshop.store.fetch(version.digest))
    assert manifest.head_modalities == ("image",)
    assert not any(name.startswith("decoder/") for name in manifest.files)
    text = write_rows(workshop.folder / "text.jsonl", rows[1:])
    with pytest.raises(ConfigError, match="nothing else learns"):
        go(workshop, workshop.spec(data=text, **alone))


def test_a_second_job_makes_the_second_version(workshop: Workshop) -> None:
    assert go(workshop, workshop.spec()).version.ref == "emoji@1"
    assert go(workshop, workshop.spec(seed=5)).version.ref == "emoji@2"


def test_faults_in_the_data_fail_the_job_with_all_of_them(workshop: Workshop) -> None:
    rows = [picture_row("images/0.png", "a"), picture_row("images/gone.png", "b"), {"messages": []}]
    path = write_rows(workshop.folder / "bad.jsonl", rows)
    with pytest.raises(DataError) as raised:
        go(workshop, workshop.spec(data=path))
    assert len(raised.value.faults) == 2
    job = only_job(workshop)
    assert job.state == "failed"
    assert f"{path}:2" in job.error
    assert f"{path}:3" in job.error


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"base": "nine"}, NotFoundError, "no base is called 'nine'"),
        ({"data": Path("/nowhere.jsonl")}, DataError, "no such file"),
        ({"eval": Path("/nowhere.jsonl")}, DataError, "no such file"),
        ({"lora": {"targets": ["lm_head"]}}, UnsupportedError, "cannot be adapted"),
        ({"name": "Bad Name"}, InputError, "is not a name"),
        ({"name": "tiny"}, InputError, "is the name of a base"),
    ],
)
def test_what_can_be_told_at_once_is_refused_before_a_job_exists(
    workshop: Workshop, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        submit(workshop.catalog, workshop.settings, workshop.spec(**values))
    assert workshop.catalog.list_jobs() == ()


def test_an_adapter_of_another_base_is_refused_at_once(workshop: Workshop) -> None:
    workshop.catalog.put_base("other", "d" * 64, {}, "/elsewhere")
    facts: dict[str, Any] = {"components": {}, "modalities": [], "lineage": {}, "metrics": {}}
    workshop.catalog.register_version("emoji", "f" * 64, base="other", **facts)
    with pytest.raises(ConflictError, match="belongs to base 'other', not 'tiny'"):
        submit(workshop.catalog, workshop.settings, workshop.spec())


def test_an_interrupted_job_goes_back_to_the_queue_and_on_to_the_same_bundle(workshop: Workshop) -> None:
    spec = workshop.spec(steps=7, lora={"r": 4, "dropout": 0.3}, eval=workshop.folder / "pictures.jsonl")
    unbroken = go(workshop, spec)
    monitor = Watched(lambda step: monitor.stop(Reason.INTERRUPT) if step == 4 else None)
    with pytest.raises(Stopped, match="interrupted"):
        go(workshop, spec, monitor)
    job = workshop.catalog.list_jobs(state="queued")[0]
    assert job.attempts == 1
    second = Watched()
    resumed = resume(workshop, job.id, second)
    assert "Going on after step 4." in second.said
    assert resumed.version.digest == unbroken.version.digest
    assert resumed.version.metrics == unbroken.version.metrics
    assert workshop.catalog.get_job(job.id).state == "succeeded"


def test_a_cancelled_job_ends_cancelled(workshop: Workshop) -> None:
    job = submit(workshop.catalog, workshop.settings, workshop.spec(steps=10_000))
    asked = threading.Event()

    def ask(step: int) -> None:
        if step == 2:
            workshop.catalog.request_cancel(job.id)
            asked.set()

    with pytest.raises(Stopped, match="cancelled"):
        resume(workshop, job.id, Watched(ask), lease=0.4)
    assert asked.is_set()
    found = workshop.catalog.get_job(job.id)
    assert found.state == "cancelled"
    assert found.progress is not None
    assert found.progress["phase"] == "training"
    assert found.progress.keys() >= {"done", "total", "loss", "tokens_per_second"}
    with pytest.raises(ConflictError, match="is cancelled"):
        resume(workshop, job.id)


def test_a_worker_that_lost_its_lease_stops_and_writes_nothing_more(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(workshop.catalog, workshop.settings, workshop.spec(steps=10_000, save_every=10_000))
    holder = workshop.catalog.heartbeat

    def lose(*arguments: Any, **options: Any) -> Any:
        raise ConflictError("was taken over", where=job.id)

    def steal(step: int) -> None:
        if step == 2:
            monkeypatch.setattr(workshop.catalog, "heartbeat", lose)

    with pytest.raises(Stopped, match="lease lost"):
        resume(workshop, job.id, Watched(steal), lease=0.4)
    assert holder is not None
    # as its new holder would see it: still running, and no checkpoint of the old one
    assert workshop.catalog.get_job(job.id).state == "running"
    assert not list((workshop.settings.jobs / job.id).rglob("step-*"))


def test_the_lease_outlasts_the_work_by_heartbeats(workshop: Workshop) -> None:
    """A job that takes many leases' time is never up for anybody else."""
    others: list[object] = []
    monitor = Watched(lambda step: others.append(workshop.catalog.claim_job("other", 60)))
    go(workshop, workshop.spec(steps=40), monitor, lease=0.5)
    assert len(others) == 40
    assert not any(others)


def test_a_job_whose_worker_died_on_this_host_is_waited_for(workshop: Workshop) -> None:
    job = submit(workshop.catalog, workshop.settings, workshop.spec())
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    workshop.catalog.claim_job(f"{socket.gethostname()}/{dead.pid}/x", 0.5, job.id)
    monitor = Watched()
    assert resume(workshop, job.id, monitor).version.ref == "emoji@1"
    assert monitor.said[0].startswith("The job's worker died")


@pytest.mark.parametrize("holder", [f"{socket.gethostname()}/{os.getpid()}/x", "elsewhere/1/x"])
def test_a_job_that_somebody_else_works_on_is_left_alone(workshop: Workshop, holder: str) -> None:
    job = submit(workshop.catalog, workshop.settings, workshop.spec())
    workshop.catalog.claim_job(holder, 60, job.id)
    with pytest.raises(ConflictError, match=f"{holder} is working on it .*try again after"):
        resume(workshop, job.id)
    assert workshop.catalog.get_job(job.id).worker == holder


def test_a_store_that_is_away_costs_no_work(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    put = workshop.store.put

    def refuse(folder: Path) -> str:
        raise NotReadyError("the disk is full")

    monkeypatch.setattr(workshop.store, "put", refuse)
    with pytest.raises(NotReadyError, match="the disk is full"):
        go(workshop, workshop.spec())
    job = only_job(workshop)
    assert job.state == "queued"
    monkeypatch.setattr(workshop.store, "put", put)
    # the bundle is there already: nothing is trained again
    monkeypatch.setattr(run_module, "build_trainee", None)
    assert resume(workshop, job.id).version.ref == "emoji@1"


def test_a_store_that_stays_away_fails_the_job_in_the_end(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> str:
        raise NotReadyError("the disk is full")

    monkeypatch.setattr(workshop.store, "put", refuse)
    job = submit(workshop.catalog, workshop.settings, workshop.spec())
    for attempt in range(1, 6):
        with pytest.raises(NotReadyError):
            resume(workshop, job.id)
        assert workshop.catalog.get_job(job.id).state == ("queued" if attempt < 5 else "failed")


def test_what_nobody_expected_fails_the_job_and_is_told(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("all of a sudden")

    monkeypatch.setattr(run_module, "build_trainee", burst)
    with pytest.raises(ZeroDivisionError):
        go(workshop, workshop.spec())
    job = only_job(workshop)
    assert job.state == "failed"
    assert job.error == "ZeroDivisionError: all of a sudden"


def test_data_that_changed_under_a_checkpoint_are_noticed(workshop: Workshop) -> None:
    monitor = Watched(lambda step: monitor.stop(Reason.INTERRUPT) if step == 2 else None)
    with pytest.raises(Stopped):
        go(workshop, workshop.spec(steps=6), monitor)
    job = only_job(workshop)
    write_rows(workshop.folder / "pictures.jsonl", [picture_row("images/0.png", "other words")])
    with pytest.raises(ConflictError, match="the data, the base or the specification changed"):
        resume(workshop, job.id)
    assert workshop.catalog.get_job(job.id).state == "failed"


def test_scores_are_chosen_and_the_base_is_asked_once(workshop: Workshop) -> None:
    held_out = workshop.folder / "pictures.jsonl"
    chosen = {"scores": ["rouge_l", "cider"], "eval": held_out, "max_new_tokens": 3, "eval_every": 2}
    job = submit(workshop.catalog, workshop.settings, workshop.spec(**chosen, steps=6, samples=2))
    monitor = Watched()
    monitor.at_step = lambda step: monitor.stop(Reason.INTERRUPT) if step == 3 else None
    with pytest.raises(Stopped):
        resume(workshop, job.id, monitor)
    before = workshop.settings.jobs / job.id / "before.json"
    assert len(json.loads(before.read_text())) == len(held_out.read_text().splitlines())
    before.write_text(json.dumps([json.loads(line)["messages"][-1]["content"] for line in held_out.open()]))
    metrics = resume(workshop, job.id).version.metrics
    own = {f"{score}{end}" for score in ("rouge_l", "cider") for end in ("", "_low", "_high")}
    assert metrics.keys() == {"train_loss", "loss", *own, "base_rouge_l", "base_cider"}
    assert metrics["base_rouge_l"] == 100  # what was kept, and not asked again
    events = workshop.catalog.list_events(job.id, limit=1000)
    looks = [event.data for event in events if event.kind == "sample"]
    folder = workshop.settings.home / "tensorboard" / "emoji" / job.id
    curves = EventAccumulator(str(folder)).Reload()
    assert [point.step for point in curves.Scalars("metrics/train_loss")][-6:] == [1, 2, 3, 4, 5, 6]
    assert curves.Scalars("scores/rouge_l")[-1].value == pytest.approx(metrics["rouge_l"])
    assert curves.Tags()["tensors"]  # the samples
    assert [look["step"] for look in looks] == [2, 2, 4, 4, 6, 6, 6, 6]
    assert looks[0].keys() == {"step", "line", "media", "expected", "answer"}
    assert (looks[0]["line"], len(looks[0]["media"])) == (1, 1)
    assert [e.data for e in events if e.kind == "scores"] == [
        {k: v for k, v in metrics.items() if k != "train_loss"}
    ]


def test_the_base_is_not_asked_where_nobody_wants_it(workshop: Workshop) -> None:
    held_out = workshop.folder / "pictures.jsonl"
    spec = workshop.spec(eval=held_out, compare=False, scores=["chrf"], max_new_tokens=2)
    assert go(workshop, spec).version.metrics.keys() == {
        "train_loss",
        "loss",
        "chrf",
        "chrf_low",
        "chrf_high",
    }
