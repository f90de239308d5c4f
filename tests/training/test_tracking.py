from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from training_fixtures import Workshop

from okavango.platform.config import Settings
from okavango.platform.errors import DataError, UnsupportedError
from okavango.training import tracking
from okavango.training.monitor import Monitor, Reason, Stopped
from okavango.training.spec import parse_spec
from okavango.training.worker import run_job, submit


@pytest.fixture
def settings(workshop: Workshop) -> Settings:
    """With a real store of MLflow's in a file."""
    return replace(workshop.settings, mlflow_url=f"sqlite:///{workshop.folder}/mlflow.db")


def run_of(settings: Settings, name: str = "emoji") -> Run:
    client = MlflowClient(settings.mlflow_url)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    return found


def history(settings: Settings, metric: str) -> list[int]:
    run = run_of(settings).info.run_id
    return [each.step for each in MlflowClient(settings.mlflow_url).get_metric_history(run, metric)]


class Stopping(Monitor):
    """Stops after a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def note(self, kind: str, message: str, **data: Any) -> None:
        super().note(kind, message, **data)
        if kind == "metrics" and data.get("step") == self._step:
            self.stop(Reason.INTERRUPT)


def test_a_job_that_goes_on_is_one_run_with_all_that_it_came_to(
    workshop: Workshop, settings: Settings
) -> None:
    held_out = workshop.folder / "pictures.jsonl"
    job = submit(workshop.catalog, settings, workshop.spec(eval=held_out, eval_every=2))
    with pytest.raises(Stopped):
        run_job(workshop.catalog, workshop.store, settings, job.id, Stopping(3))
    assert run_of(settings).info.status == "SCHEDULED"
    outcome = run_job(workshop.catalog, workshop.store, settings, job.id, Monitor())
    run = run_of(settings)
    assert (run.info.status, run.info.run_name) == ("FINISHED", job.id)
    assert run.data.tags["okavango.adapter"] == outcome.version.ref
    assert run.data.tags["okavango.digest"] == outcome.version.digest
    assert run.data.params["lora.r"] == "4"
    assert run.data.params["data"] == "pictures.jsonl"
    assert history(settings, "train_loss") == [1, 2, 3, 4]
    assert run.data.metrics["chrf"] == pytest.approx(outcome.version.metrics["chrf"])


def test_a_job_that_fails_is_a_run_that_failed(workshop: Workshop, settings: Settings) -> None:
    job = submit(workshop.catalog, settings, workshop.spec())
    (workshop.folder / "pictures.jsonl").write_text("{}\n")
    with pytest.raises(DataError):
        run_job(workshop.catalog, workshop.store, settings, job.id, Monitor())
    assert run_of(settings).info.status == "FAILED"


def test_a_store_that_is_away_fails_no_job(workshop: Workshop) -> None:
    (workshop.folder / "spoiled.db").write_text("no database\n" * 100)
    settings = replace(workshop.settings, mlflow_url=f"sqlite:///{workshop.folder}/spoiled.db")
    job = submit(workshop.catalog, settings, workshop.spec())
    run_job(workshop.catalog, workshop.store, settings, job.id, Monitor())
    messages = [event.message for event in workshop.catalog.list_events(job.id)]
    assert [each for each in messages if each.startswith("MLflow: nothing more is written there:")]


def asked(mlflow: bool | None) -> Any:
    return parse_spec({"base": "b", "data": "d", "name": "n", "mlflow": mlflow})


def test_it_is_asked_for_by_the_worker_or_by_the_job(tmp_path: Path) -> None:
    without, known = Settings(home=tmp_path), Settings(home=tmp_path, mlflow_url="sqlite://")
    assert [tracking.is_tracked(asked(value), known) for value in (None, True, False)] == [True, True, False]
    assert [tracking.is_tracked(asked(value), without) for value in (None, False)] == [False, False]
    with pytest.raises(UnsupportedError, match=r"mlflow: no tracking server .*OKAVANGO_MLFLOW_URL"):
        tracking.is_tracked(asked(True), without)


def test_what_is_not_installed_is_told_when_a_job_is_submitted(
    workshop: Workshop, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"mlflow: is not installed \(pip install"):
        submit(workshop.catalog, settings, workshop.spec())
    assert not workshop.catalog.list_jobs()
