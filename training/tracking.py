"""A job's settings, losses, scores and result in MLflow, where the worker is told of a tracking server.

An experiment an adapter, a run a job: a job that goes on goes on with its run. A server that is slow or away
holds up no training, and fails no job; the job's events tell of it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from okavango.platform.catalog.events import Event
from okavango.platform.catalog.records import JobRecord, VersionRecord
from okavango.platform.config import Settings
from okavango.platform.errors import UnsupportedError
from okavango.training.monitor import Monitor, Reason, Stopped
from okavango.training.spec import TrainSpec

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_JOB = "okavango.job"
_MOST = 1000  # metrics a request
_WAIT_SECONDS = 0.5
_END_SECONDS = 30.0
_LONGEST_VALUE = 500
_PLACES = ("data", "eval")


def is_tracked(spec: TrainSpec, settings: Settings) -> bool:
    """Whether a job is to be logged.

    Raises:
        UnsupportedError: it is, but there is no server to log to, or no library to do it.
    """
    wanted = bool(settings.mlflow_url) if spec.mlflow is None else spec.mlflow
    if not wanted:
        return False
    if not settings.mlflow_url:
        raise UnsupportedError(
            "no tracking server is known here", where="mlflow", remedy="set OKAVANGO_MLFLOW_URL"
        )
    if find_spec("mlflow") is None:
        raise UnsupportedError("is not installed", where="mlflow", remedy="pip install 'okavango[mlflow]'")
    return True


@contextmanager
def tracked(
    monitor: Monitor, settings: Settings, job: JobRecord, spec: TrainSpec
) -> Iterator[dict[str, str]]:
    """Log what the block's run notes. What the block puts into the yielded mapping becomes tags."""
    tags: dict[str, str] = {}
    if not is_tracked(spec, settings):
        yield tags
        return
    log = _Log(settings.mlflow_url, job, spec, monitor)
    monitor.listeners.append(log.take)
    try:
        yield tags
        log.end("FINISHED", tags)
    except BaseException as error:
        log.end(_status(error), tags)
        raise
    finally:
        monitor.listeners.remove(log.take)


def tags_of(version: VersionRecord) -> dict[str, str]:
    return {"okavango.adapter": version.ref, "okavango.digest": version.digest}


def _status(error: BaseException) -> str | None:
    """MLflow's word for what ended a run; None where it is another worker's by now."""
    match error:
        case Stopped(reason=Reason.LOST):
            return None
        case Stopped(reason=Reason.CANCEL):
            return "KILLED"
        case Stopped() | KeyboardInterrupt() | SystemExit():
            return "SCHEDULED"
    return "FAILED"


class _Log:
    """One run. Its thread alone speaks to the server, and stops at the first fault."""

    def __init__(self, url: str, job: JobRecord, spec: TrainSpec, monitor: Monitor) -> None:
        self._url, self._job, self._spec, self._monitor = url, job, spec, monitor
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._over = threading.Event()
        self._end: tuple[str | None, Mapping[str, str]] = (None, {})
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def take(self, event: Event) -> None:
        if event.kind in ("metrics", "scores"):
            self._events.put(event)

    def end(self, status: str | None, tags: Mapping[str, str]) -> None:
        """Write what is left, if that can be done soon."""
        self._end = (status, tags)
        self._over.set()
        self._thread.join(_END_SECONDS)
        if self._thread.is_alive():
            self._monitor.say("MLflow: the server is slow; the run's end is not written there.")

    def _run(self) -> None:
        try:
            self._write()
        except Exception as error:  # whatever it is, training goes on
            self._monitor.say(f"MLflow: nothing more is written there: {type(error).__name__}: {error}")

    def _write(self) -> None:
        from mlflow import MlflowClient

        client = MlflowClient(self._url)
        run = _find_run(client, self._job, self._spec)
        while not (self._over.is_set() and self._events.empty()):
            metrics = self._metrics()
            if metrics:
                client.log_batch(run, metrics=metrics)
        status, tags = self._end
        for name, value in tags.items():
            client.set_tag(run, name, value)
        if status in ("FINISHED", "FAILED", "KILLED"):
            client.set_terminated(run, status)
        elif status is not None:
            client.update_run(run, status=status)

    def _metrics(self) -> list[Metric]:
        """Those that came, after a moment in which none did, or as many as go into one request."""
        found: list[Metric] = []
        while len(found) < _MOST - 100:
            try:
                found += _metrics_of(self._events.get(timeout=0 if self._over.is_set() else _WAIT_SECONDS))
            except Empty:
                break
        return found


def _metrics_of(event: Event) -> list[Metric]:
    from mlflow.entities import Metric

    data = dict(event.data or {})
    assert event.at is not None  # a monitor's events say when
    step, at = int(data.pop("step", 0)), int(event.at.timestamp() * 1000)
    values = {name: float(value) for name, value in data.items() if isinstance(value, int | float)}
    return [Metric(name, value, at, step) for name, value in values.items() if math.isfinite(value)]


def _find_run(client: MlflowClient, job: JobRecord, spec: TrainSpec) -> str:
    """The job's run, made if there is none."""
    experiment = client.get_experiment_by_name(spec.name)
    number = experiment.experiment_id if experiment is not None else client.create_experiment(spec.name)
    found = client.search_runs([number], f"tags.`{_JOB}` = '{job.id}'", max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return str(found[0].info.run_id)
    tags = {_JOB: job.id, "okavango.base": spec.base, **job.labels}
    run: str = client.create_run(number, run_name=job.id, tags=tags).info.run_id
    for name, value in _flat(spec.to_json()):
        client.log_param(run, name, value[:_LONGEST_VALUE])
    return run


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted names; of places, which are nobody else's business, the last part."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            shown = str(value).rpartition("/")[2] if not prefix and name in _PLACES else str(value)
            yield prefix + name, shown
