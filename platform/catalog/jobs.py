"""The queue of jobs: leased, so that a worker that dies loses its job to the next one and not to nobody."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session

from okavango.platform.catalog.names import near
from okavango.platform.catalog.records import JobRecord
from okavango.platform.catalog.schema import JobRow
from okavango.platform.catalog.states import FINISHED, check_job_move
from okavango.platform.catalog.transactions import Transactions, as_json, lookup
from okavango.platform.errors import ConflictError, NotFoundError


class Jobs(Transactions):
    """A worker's name must be its own: another process under the same name would pass for it."""

    def create_job(
        self, kind: str, name: str, spec: Mapping[str, Any], *, principal: str = "local"
    ) -> JobRecord:
        """Queue a job. Raises InputError where the spec is not JSON."""
        now = self._now()
        row = JobRow(
            id=f"job-{uuid.uuid4().hex[:12]}",
            kind=kind,
            name=name,
            spec=as_json(spec, "spec"),
            state="queued",
            principal=principal,
            attempts=0,
            cancel_requested=False,
            created_at=now,
            updated_at=now,
        )
        with self._writing() as session:
            session.add(row)
            return _job(row)

    def claim_job(self, worker: str, lease_seconds: float, job_id: str | None = None) -> JobRecord | None:
        """Take the oldest job that is queued or whose worker was not heard of in time; or that one job.

        None when there is nothing to take. No job is ever handed to two workers at a time.

        Raises:
            NotFoundError: no such job.
        """
        now = self._now()
        query = select(JobRow).where(_is_free(now)).order_by(JobRow.created_at, JobRow.id).limit(1)
        # In a queue, a row that another worker is just taking is passed over. A named job is waited for.
        query = query.with_for_update(skip_locked=job_id is None)
        with self._writing() as session:
            _cancel_abandoned(session, now)
            if job_id is not None:
                _find_job(session, job_id)
                query = query.where(JobRow.id == job_id)
            row = session.scalar(query)
            return None if row is None else _job(_lease(row, worker, now, lease_seconds))

    def heartbeat(
        self,
        job_id: str,
        worker: str,
        lease_seconds: float,
        progress: Mapping[str, Any] | None = None,
    ) -> JobRecord:
        """Extend the lease and record progress. The record tells the worker whether it is asked to stop.

        A lease that ran out is renewed as long as no other worker took the job.

        Raises:
            NotFoundError: no such job.
            ConflictError: the lease is lost: stop, and write nothing more for this job.
        """
        kept = None if progress is None else as_json(progress, "progress")
        with self._writing() as session:
            row = _held_job(session, job_id, worker)
            row.lease_until = self._now() + timedelta(seconds=lease_seconds)
            row.progress = row.progress if kept is None else kept
            row.updated_at = self._now()
            return _job(row)

    def finish_job(
        self,
        job_id: str,
        worker: str,
        state: str,
        *,
        result: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> JobRecord:
        """End a job that this worker holds: succeeded, failed or cancelled.

        Raises:
            NotFoundError: no such job.
            ConflictError: the lease is lost.
        """
        assert state in FINISHED, f"{state} does not end a job"
        kept = None if result is None else as_json(result, "result")
        with self._writing() as session:
            row = _held_job(session, job_id, worker)
            row.result, row.error = kept, error
            return _job(_move(row, state, self._now()))

    def release_job(self, job_id: str, worker: str) -> JobRecord:
        """Give a job back unfinished, to be resumed by its next worker; or end it, if that was asked for.

        Raises:
            NotFoundError: no such job.
            ConflictError: the lease is lost.
        """
        with self._writing() as session:
            row = _held_job(session, job_id, worker)
            return _job(_move(row, "cancelled" if row.cancel_requested else "queued", self._now()))

    def request_cancel(self, job_id: str) -> JobRecord:
        """Cancel a job at once if nobody works on it; else ask its worker to stop at its next heartbeat.

        Raises:
            NotFoundError: no such job.
            ConflictError: the job has ended.
        """
        now = self._now()
        with self._writing() as session:
            row = _find_job(session, job_id, lock=True)
            if row.lease_until is not None and row.lease_until > now:
                row.cancel_requested, row.updated_at = True, now
                return _job(row)
            return _job(_move(row, "cancelled", now))

    def get_job(self, job_id: str) -> JobRecord:
        """Raises NotFoundError, with the nearest job named."""
        with self._reading() as session:
            return _job(_find_job(session, job_id))

    def list_jobs(self, state: str | None = None) -> tuple[JobRecord, ...]:
        """Jobs, newest first; those in one state if that is given."""
        query = select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id)
        with self._reading() as session:
            return tuple(map(_job, session.scalars(query if state is None else query.filter_by(state=state))))


def _is_expired(now: datetime) -> ColumnElement[bool]:
    return and_(JobRow.state == "running", JobRow.lease_until <= now)


def _is_free(now: datetime) -> ColumnElement[bool]:
    return or_(JobRow.state == "queued", _is_expired(now))


def _cancel_abandoned(session: Session, now: datetime) -> None:
    """A job whose worker died before it could obey is not worth another worker's time."""
    session.execute(
        update(JobRow)
        .where(_is_expired(now), JobRow.cancel_requested)
        .values(state="cancelled", lease_until=None, finished_at=now, updated_at=now)
    )


def _lease(row: JobRow, worker: str, now: datetime, seconds: float) -> JobRow:
    row.state, row.worker = "running", worker
    row.lease_until = now + timedelta(seconds=seconds)
    row.attempts += 1
    row.started_at = row.started_at or now
    row.updated_at = now
    return row


def _move(row: JobRow, state: str, now: datetime) -> JobRow:
    check_job_move(row.state, state, row.id)
    row.state, row.lease_until, row.updated_at = state, None, now
    if state in FINISHED:
        row.finished_at = now
    return row


def _find_job(session: Session, job_id: str, *, lock: bool = False) -> JobRow:
    row = lookup(session, JobRow, job_id, lock=lock)
    if row is None:
        remedy = near(job_id, session.scalars(select(JobRow.id)), "there is no job yet")
        raise NotFoundError("no such job", where=job_id, remedy=remedy)
    return row


def _held_job(session: Session, job_id: str, worker: str) -> JobRow:
    row = _find_job(session, job_id, lock=True)
    if row.state != "running":
        raise ConflictError(f"is {row.state}, and no longer held by {worker}", where=job_id)
    if row.worker != worker:
        raise ConflictError(
            f"was taken over by {row.worker} after the lease of {worker} ran out", where=job_id
        )
    return row


def _job(row: JobRow) -> JobRecord:
    return JobRecord(
        id=row.id,
        kind=row.kind,
        name=row.name,
        spec=dict(row.spec),
        state=row.state,
        principal=row.principal,
        worker=row.worker,
        lease_until=row.lease_until,
        attempts=row.attempts,
        cancel_requested=row.cancel_requested,
        progress=row.progress,
        result=row.result,
        error=row.error,
        created_at=row.created_at,
        updated_at=row.updated_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )
