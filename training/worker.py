"""Jobs under a lease: claimed, worked on, finished or given back; one way for command line and services."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
import uuid

from okavango.modalities.base import find_base
from okavango.platform.artifacts import ArtifactStore
from okavango.platform.catalog.records import JobRecord
from okavango.platform.catalog.store import Catalog
from okavango.platform.config import Settings
from okavango.platform.errors import (
    ConflictError,
    DataError,
    InputError,
    NotFoundError,
    NotReadyError,
    OkavangoError,
)
from okavango.training.dataset import open_dataset
from okavango.training.monitor import Monitor, Reason, Stopped
from okavango.training.run import Outcome, run
from okavango.training.spec import TrainSpec, check_spec

KIND = "train"
LEASE_SECONDS = 30.0
_BEATS_A_LEASE = 4
# A disk that is full or a store that is away is worth another try, but not forever.
_MOST_ATTEMPTS = 5
_MOST_FAULTS = 20


def submit(catalog: Catalog, settings: Settings, spec: TrainSpec, principal: str = "local") -> JobRecord:
    """Queue a job, if what can be told without reading the data speaks for it.

    Raises:
        NotFoundError: no such base.
        InputError, ConfigError, UnsupportedError: see check_spec; or the name is a base's.
        DataError: a data file does not exist or is empty.
        ConflictError: the adapter is one of another base.
    """
    base = find_base(spec.base, settings.bases)
    check_spec(spec, base)
    for path in (spec.data, spec.eval):
        if path is not None:
            open_dataset(path)
    catalog.put_base(base.name, base.digest, base.components, str(base.folder))
    _check_name(catalog, spec.name, base.name)
    paths = {"data": spec.data.absolute(), "eval": spec.eval.absolute() if spec.eval else None}
    return catalog.create_job(KIND, spec.name, spec.model_copy(update=paths).to_json(), principal=principal)


def run_job(
    catalog: Catalog,
    store: ArtifactStore,
    settings: Settings,
    job_id: str,
    monitor: Monitor,
    lease_seconds: float = LEASE_SECONDS,
) -> Outcome:
    """Claim a job, do it, and leave it in the state that it deserves.

    A job that was interrupted, or could not reach a disk or store, goes back to the queue with its last
    checkpoint. A job whose lease is lost is another worker's: nothing more is written for it.

    Raises:
        NotFoundError: no such job.
        ConflictError: it is finished, or somebody else works on it.
        Stopped: the monitor was told to stop.
        OkavangoError, Exception: what made the job fail.
    """
    worker = f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
    job = _claim(catalog, job_id, worker, monitor, lease_seconds)
    with _Lease(catalog, job_id, worker, lease_seconds, monitor) as lease:
        try:
            outcome = run(job, catalog, store, settings, monitor)
            catalog.finish_job(job_id, worker, "succeeded", result=_result(outcome))
        except BaseException as error:
            lease.stop()
            _conclude(catalog, job, worker, error)
            raise
    shutil.rmtree(settings.jobs / job_id, ignore_errors=True)
    return outcome


def _check_name(catalog: Catalog, name: str, base: str) -> None:
    if any(each.name == name for each in catalog.list_bases()):
        raise InputError("is the name of a base", where=f"adapter {name!r}", remedy="choose another")
    try:
        owner = catalog.get_adapter(name)
    except NotFoundError:
        return
    if owner.base != base:
        raise ConflictError(
            f"belongs to base {owner.base!r}, not {base!r}",
            where=f"adapter {name!r}",
            remedy="choose another name",
        )


def _claim(catalog: Catalog, job_id: str, worker: str, monitor: Monitor, lease: float) -> JobRecord:
    """The job, held. One whose worker died on this host is waited for until its lease is over."""
    told = False
    while (job := catalog.claim_job(worker, lease, job_id)) is None:
        found = catalog.get_job(job_id)
        if found.state not in ("running", "queued"):
            raise ConflictError(
                f"is {found.state}: there is nothing to go on with",
                where=job_id,
                remedy="start a new job",
            )
        if found.state == "running" and not _died_here(found.worker or ""):
            until = found.lease_until.strftime("%H:%M:%S UTC") if found.lease_until else "then"
            raise ConflictError(
                f"{found.worker} is working on it",
                where=job_id,
                remedy=f"stop it there; if it died, try again after {until}",
            )
        if not told:
            monitor.say("The job's worker died; waiting for its lease to run out.")
            told = True
        monitor.check()
        time.sleep(min(1.0, lease / 10))
    return job


def _died_here(worker: str) -> bool:
    """Whether a worker was a process of this host that is no more."""
    host, _, rest = worker.partition("/")
    process = rest.partition("/")[0]
    if host != socket.gethostname() or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _conclude(catalog: Catalog, job: JobRecord, worker: str, error: BaseException) -> None:
    """Leave the job in the state that fits what ended it."""
    try:
        match error:
            case Stopped(reason=Reason.LOST):
                pass
            case Stopped(reason=Reason.CANCEL):
                catalog.finish_job(job.id, worker, "cancelled")
            case Stopped() | KeyboardInterrupt() | SystemExit():
                catalog.release_job(job.id, worker)
            case NotReadyError() | OSError() if job.attempts < _MOST_ATTEMPTS:
                catalog.release_job(job.id, worker)
            case _:
                catalog.finish_job(job.id, worker, "failed", error=_explain(error))
    except OkavangoError as second:
        # the job is another's, or the catalog is away: the lease runs out by itself
        error.add_note(f"and the job could not be put into its state: {second}")


def _explain(error: BaseException) -> str:
    text = str(error) if isinstance(error, OkavangoError) else f"{type(error).__name__}: {error}"
    faults = error.faults if isinstance(error, DataError) else ()
    more = [f"… and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
    return "\n".join([text, *faults[:_MOST_FAULTS], *more])


def _result(outcome: Outcome) -> dict[str, object]:
    version = outcome.version
    return {"adapter": version.ref, "digest": version.digest, "metrics": version.metrics}


class _Lease:
    """Says while its block lasts that the worker lives, writes progress, and hears whether to stop."""

    def __init__(self, catalog: Catalog, job_id: str, worker: str, seconds: float, monitor: Monitor) -> None:
        self._catalog, self._job, self._worker = catalog, job_id, worker
        self._seconds = seconds
        self._monitor = monitor
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease of {job_id}", daemon=True)

    def __enter__(self) -> _Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """No more is said after this."""
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        heard = time.monotonic()
        while not self._over.wait(self._seconds / _BEATS_A_LEASE):
            try:
                job = self._catalog.heartbeat(
                    self._job, self._worker, self._seconds, self._monitor.progress or None
                )
                heard = time.monotonic()
                if job.cancel_requested:
                    self._monitor.stop(Reason.CANCEL)
            except NotReadyError:
                if time.monotonic() - heard > self._seconds:
                    self._monitor.stop(Reason.LOST)
            except OkavangoError:
                self._monitor.stop(Reason.LOST)
                return
