"""Jobs under a lease: claimed, worked on, finished or given back; one way for command line and services."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

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
from okavango.platform.stored import is_file_id
from okavango.training.dataset import open_dataset
from okavango.training.lease import LEASE_SECONDS, Lease, new_worker
from okavango.training.mirror import discard
from okavango.training.monitor import Monitor, Reason, Stopped
from okavango.training.run import Outcome, run
from okavango.training.sources.source import is_hub
from okavango.training.spec import TrainSpec, check_spec
from okavango.training.tracking import is_tracked

KIND = "train"
_MOST_FAULTS = 20
_MOST_ATTEMPTS = 5


def submit(
    catalog: Catalog,
    settings: Settings,
    spec: TrainSpec,
    principal: str = "local",
    *,
    priority: int = 0,
    labels: Mapping[str, str] | None = None,
    most_open: int | None = None,
) -> JobRecord:
    """Queue a job, if what can be told without reading the data speaks for it.

    Args:
        priority, labels, most_open: see Catalog.create_job.

    Raises:
        NotFoundError: no such base, or no such uploaded file of this principal.
        InputError, ConfigError, UnsupportedError: see check_spec and is_tracked; or the name is a base's.
        DataError: a data file does not exist or is empty.
        ConflictError: the adapter is one of another base.
    """
    base = find_base(spec.base, settings.bases)
    check_spec(spec, base)
    is_tracked(spec, settings)
    for path in (spec.data, spec.eval):
        if path is None:
            continue
        if is_file_id(str(path)):
            catalog.get_file(str(path), principal=principal)
        else:
            open_dataset(path, form=spec.format, cache=settings.data)
    catalog.put_base(base.name, base.digest, base.components, str(base.folder))
    _check_name(catalog, spec.name, base.name)
    paths = {"data": _absolute(spec.data), "eval": _absolute(spec.eval) if spec.eval else None}
    return catalog.create_job(
        KIND,
        spec.name,
        spec.model_copy(update=paths).to_json(),
        principal=principal,
        priority=priority,
        labels=labels,
        most_open=most_open,
    )


def run_job(
    catalog: Catalog,
    store: ArtifactStore,
    settings: Settings,
    job_id: str,
    monitor: Monitor,
    lease_seconds: float = LEASE_SECONDS,
) -> Outcome:
    """Claim a job, do it, and leave it in the state that it deserves.

    Errors and states: see work_on.

    Raises:
        NotFoundError: no such job.
        ConflictError: it is finished, or somebody else works on it.
    """
    worker = new_worker()
    job = _claim(catalog, job_id, worker, monitor, lease_seconds)
    with Lease(catalog, job_id, worker, lease_seconds, monitor) as lease:
        return work_on(catalog, store, settings, job, monitor, lease)


def work_on(
    catalog: Catalog,
    store: ArtifactStore,
    settings: Settings,
    job: JobRecord,
    monitor: Monitor,
    lease: Lease,
) -> Outcome:
    """Do a job that is held, and leave it in the state that it deserves; the lease is stopped.

    A job that was interrupted, or could not reach a disk or store, goes back to the queue with its last
    checkpoint. A job whose lease is lost is another worker's: nothing more is written for it.

    Raises:
        Stopped: the monitor was told to stop.
        OkavangoError, Exception: what made the job fail.
    """
    try:
        outcome = run(job, catalog, store, settings, monitor)
        lease.stop()
        catalog.finish_job(job.id, lease.worker, "succeeded", result=_result(outcome))
    except BaseException as error:
        lease.stop()
        _conclude(catalog, settings, job, lease.worker, error)
        raise
    discard(settings, job.id)
    return outcome


def _absolute(path: Path) -> Path:
    return path if is_file_id(str(path)) or is_hub(path) else path.absolute()


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
        if found.state == "paused":
            catalog.resume_job(job_id)
            continue
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


def _conclude(
    catalog: Catalog, settings: Settings, job: JobRecord, worker: str, error: BaseException
) -> None:
    """Leave the job in the state that fits what ended it."""
    try:
        match error:
            case Stopped(reason=Reason.LOST):
                pass
            case Stopped(reason=Reason.CANCEL):
                catalog.finish_job(job.id, worker, "cancelled")
                discard(settings, job.id)
            case Stopped() | KeyboardInterrupt() | SystemExit():
                catalog.release_job(job.id, worker)
            # A disk that is full or a store that is away is worth another try, but not forever.
            case NotReadyError() | OSError() if job.attempts < _MOST_ATTEMPTS:
                catalog.release_job(job.id, worker)
            case _:
                catalog.finish_job(job.id, worker, "failed", error=_explain(error))
                discard(settings, job.id)
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
    return {
        "adapter": version.ref,
        "digest": version.digest,
        "metrics": version.metrics,
        "steps": version.lineage["steps"],
        "trained_tokens": version.lineage["tokens"],
        **({"privacy": version.lineage["privacy"]} if "privacy" in version.lineage else {}),
    }
