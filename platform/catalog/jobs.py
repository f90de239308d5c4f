"""The queue of jobs: leased, so that a worker that dies loses its job to the next one and not to nobody.

Whatever changes a job's state writes an event beside it, in the same transaction.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session, aliased

from okavango.platform.catalog.events import Event, append_events
from okavango.platform.catalog.names import near
from okavango.platform.catalog.records import JobRecord
from okavango.platform.catalog.schema import JobRow
from okavango.platform.catalog.states import FINISHED, check_job_move
from okavango.platform.catalog.transactions import Transactions, as_json, lookup
from okavango.platform.errors import BusyError, ConflictError, NotFoundError

MOST_LOSSES = 5
"""A job that took so many workers with it is not given to another."""
_RETRY_SECONDS = 60.0


class Jobs(Transactions):
    """A worker's name must be its own: another process under the same name would pass for it."""

    def create_job(
        self,
        kind: str,
        name: str,
        spec: Mapping[str, Any],
        *,
        principal: str = "local",
        priority: int = 0,
        labels: Mapping[str, str] | None = None,
        most_open: int | None = None,
    ) -> JobRecord:
        """Queue a job.

        Args:
            priority: the higher ones go first.
            labels: of the submitter's own; they mean nothing here.
            most_open: how many jobs that have not ended the principal may have, this one included.

        Raises:
            InputError: the spec is not JSON.
            BusyError: the principal has that many already.
        """
        now = self._now()
        row = JobRow(
            id=f"job-{uuid.uuid4().hex[:12]}",
            kind=kind,
            name=name,
            spec=as_json(spec, "spec"),
            labels=as_json(labels, "labels") if labels else None,
            state="queued",
            principal=principal,
            attempts=0,
            losses=0,
            priority=priority,
            cancel_requested=False,
            pause_requested=False,
            created_at=now,
            updated_at=now,
        )
        with self._writing() as session:
            if most_open is not None:
                self._lock(session, f"jobs of {principal}")
                _check_open(session, principal, most_open)
            session.add(row)
            session.flush()
            _note(session, row, now)
            return _job(row)

    def claim_job(
        self,
        worker: str,
        lease_seconds: float,
        job_id: str | None = None,
        *,
        most_running: int | None = None,
    ) -> JobRecord | None:
        """Take the next job that is queued or whose worker was not heard of in time; or that one job.

        Next is the one of highest priority; of these, that of the principal with fewest running; of these,
        the oldest. None when there is nothing to take. No job is ever handed to two workers at a time.

        Args:
            most_running: of one principal, at a time.

        Raises:
            NotFoundError: no such job.
        """
        now = self._now()
        running = _running_of_its_principal(now)
        query = select(JobRow).where(_is_free(now)).limit(1)
        query = query.order_by(JobRow.priority.desc(), running, JobRow.created_at, JobRow.id)
        # In a queue, a row that another worker is just taking is passed over. A named job is waited for.
        query = query.with_for_update(skip_locked=job_id is None, of=JobRow)
        with self._writing() as session:
            _settle_abandoned(session, now)
            if job_id is not None:
                _find_job(session, job_id)
                query = query.where(JobRow.id == job_id)
            if most_running is not None:
                self._lock(session, "claims")
                query = query.where(running < most_running)
            row = session.scalar(query)
            return None if row is None else _job(_lease(session, row, worker, now, lease_seconds))

    def heartbeat(
        self,
        job_id: str,
        worker: str,
        lease_seconds: float,
        progress: Mapping[str, Any] | None = None,
        events: Sequence[Event] = (),
    ) -> JobRecord:
        """Extend the lease, record progress and events. The record tells the worker whether it is to stop.

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
            append_events(session, job_id, events, row.updated_at)
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
            return _job(_move(session, row, state, self._now()))

    def release_job(self, job_id: str, worker: str) -> JobRecord:
        """Give a job back unfinished, to be resumed by its next worker; or paused or ended, if that was
        asked for.

        Raises:
            NotFoundError: no such job.
            ConflictError: the lease is lost.
        """
        with self._writing() as session:
            row = _held_job(session, job_id, worker)
            return _job(_move(session, row, _given_back(row), self._now()))

    def lose_job(self, job_id: str, worker: str, how: str) -> JobRecord:
        """Give a job back whose worker died over it. One that did so too often has failed.

        Raises:
            NotFoundError: no such job.
            ConflictError: the lease is lost.
        """
        with self._writing() as session:
            return _job(_lose(session, _held_job(session, job_id, worker), how, self._now()))

    def request_cancel(self, job_id: str) -> JobRecord:
        """Cancel a job at once if nobody works on it; else ask its worker to stop at its next heartbeat.

        Raises:
            NotFoundError: no such job.
            ConflictError: the job has ended.
        """
        return self._ask(job_id, "cancel_requested", "cancelled")

    def request_pause(self, job_id: str) -> JobRecord:
        """Set a job aside, with its last checkpoint: at once if nobody works on it, else as request_cancel.

        Raises:
            NotFoundError: no such job.
            ConflictError: the job has ended.
        """
        return self._ask(job_id, "pause_requested", "paused")

    def resume_job(self, job_id: str) -> JobRecord:
        """Queue a paused job again; take back a pause that its worker has not obeyed yet.

        Raises:
            NotFoundError: no such job.
            ConflictError: the job is not paused.
        """
        now = self._now()
        with self._writing() as session:
            row = _find_job(session, job_id, lock=True)
            if row.state == "running" and row.pause_requested:
                row.pause_requested, row.updated_at = False, now
                return _job(row)
            if row.state != "paused":
                raise ConflictError(f"is {row.state}, and not paused", where=job_id)
            return _job(_move(session, row, "queued", now))

    def _ask(self, job_id: str, flag: str, state: str) -> JobRecord:
        now = self._now()
        with self._writing() as session:
            row = _find_job(session, job_id, lock=True)
            if row.state == state and state not in FINISHED:
                return _job(row)
            if row.lease_until is not None and row.lease_until > now:
                setattr(row, flag, True)
                row.updated_at = now
                return _job(row)
            return _job(_move(session, row, state, now))

    def get_job(self, job_id: str, *, principal: str | None = None) -> JobRecord:
        """Raises NotFoundError, with the nearest job named; also where it is another principal's."""
        with self._reading() as session:
            return _job(_find_job(session, job_id, principal=principal))

    def list_jobs(
        self,
        state: str | None = None,
        *,
        principal: str | None = None,
        after: str | None = None,
        limit: int | None = None,
    ) -> tuple[JobRecord, ...]:
        """Jobs, newest first; those in one state, of one principal, older than another, if that is given.

        Raises:
            NotFoundError: no such job as `after`.
        """
        query = select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id).limit(limit)
        for column, value in ((JobRow.state, state), (JobRow.principal, principal)):
            query = query if value is None else query.where(column == value)
        with self._reading() as session:
            if after is not None:
                last = _find_job(session, after, principal=principal)
                same = and_(JobRow.created_at == last.created_at, JobRow.id > last.id)
                query = query.where(or_(JobRow.created_at < last.created_at, same))
            return tuple(map(_job, session.scalars(query)))


def _is_expired(now: datetime) -> ColumnElement[bool]:
    return and_(JobRow.state == "running", JobRow.lease_until <= now)


def _is_free(now: datetime) -> ColumnElement[bool]:
    return or_(JobRow.state == "queued", _is_expired(now))


def _running_of_its_principal(now: datetime) -> ColumnElement[int]:
    """How many jobs of a job's principal are being worked on."""
    other = aliased(JobRow)
    count = select(func.count()).select_from(other)
    count = count.where(other.principal == JobRow.principal, other.lease_until > now)
    return count.correlate(JobRow).scalar_subquery()


def _check_open(session: Session, principal: str, most: int) -> None:
    ended = JobRow.state.in_(FINISHED)
    count = session.scalar(select(func.count()).where(JobRow.principal == principal, ~ended)) or 0
    if count >= most:
        raise BusyError(
            f"{count} jobs of yours wait or run already, and {most} are allowed",
            retry_after=_RETRY_SECONDS,
            remedy="wait for one to end, or cancel one",
        )


def _settle_abandoned(session: Session, now: datetime) -> None:
    """Jobs whose worker died before it could obey, or that were the death of many, get no other worker."""
    hopeless = JobRow.losses + 1 >= MOST_LOSSES
    asked = or_(JobRow.cancel_requested, JobRow.pause_requested, hopeless)
    query = select(JobRow).where(_is_expired(now), asked).with_for_update(skip_locked=True)
    for row in session.scalars(query):
        _lose(session, row, "its worker was not heard of", now)


def _lose(session: Session, row: JobRow, how: str, now: datetime) -> JobRow:
    """Give back a job whose worker is no more; end it, if it was not the first."""
    row.losses += 1
    state = _given_back(row)
    if state == "queued" and row.losses >= MOST_LOSSES:
        state, row.error = "failed", f"{how}, and {row.losses} workers were lost with it: see their logs"
    return _move(session, row, state, now)


def _given_back(row: JobRow) -> str:
    """The state of a job that nobody works on any more, unfinished."""
    return "cancelled" if row.cancel_requested else "paused" if row.pause_requested else "queued"


def _lease(session: Session, row: JobRow, worker: str, now: datetime, seconds: float) -> JobRow:
    row.losses += row.state == "running"
    row.state, row.worker = "running", worker
    row.lease_until = now + timedelta(seconds=seconds)
    row.attempts += 1
    row.started_at = row.started_at or now
    row.updated_at = now
    _note(session, row, now, worker=worker, attempt=row.attempts)
    return row


def _move(session: Session, row: JobRow, state: str, now: datetime) -> JobRow:
    check_job_move(row.state, state, row.id)
    row.state, row.lease_until, row.updated_at = state, None, now
    row.pause_requested = False
    if state in FINISHED:
        row.finished_at = now
    _note(session, row, now, **({"error": row.error} if row.error else {}))
    return row


def _note(session: Session, row: JobRow, now: datetime, **data: Any) -> None:
    """An event that says what has become of a job."""
    level = "error" if row.state == "failed" else "info"
    append_events(session, row.id, [Event("state", row.state, level, data or None)], now)


def _find_job(session: Session, job_id: str, *, lock: bool = False, principal: str | None = None) -> JobRow:
    row = lookup(session, JobRow, job_id, lock=lock)
    if row is None or principal not in (None, row.principal):
        known = select(JobRow.id) if principal is None else select(JobRow.id).filter_by(principal=principal)
        remedy = near(job_id, session.scalars(known), "there is no job yet")
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
        labels=dict(row.labels or {}),
        state=row.state,
        principal=row.principal,
        worker=row.worker,
        lease_until=row.lease_until,
        attempts=row.attempts,
        losses=row.losses,
        priority=row.priority,
        cancel_requested=row.cancel_requested,
        pause_requested=row.pause_requested,
        progress=row.progress,
        result=row.result,
        error=row.error,
        created_at=row.created_at,
        updated_at=row.updated_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )
