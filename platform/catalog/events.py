"""What happens to a job, in order: its states, what its run says, its losses and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from okavango.platform.catalog.records import JobEventRecord
from okavango.platform.catalog.schema import JobEventRow
from okavango.platform.catalog.transactions import Transactions, as_json


@dataclass(frozen=True)
class Event:
    """An event on its way into the catalog.

    Attributes:
        kind: state, message, metrics, scores, sample or checkpoint.
        level: info, warn or error.
        at: when it happened; None means when it is written.
    """

    kind: str
    message: str
    level: str = "info"
    data: Mapping[str, Any] | None = None
    at: datetime | None = None


class Events(Transactions):
    """Events are only ever added. Heartbeats bring those of a run, changes of state bring their own."""

    def list_events(
        self,
        job_id: str,
        *,
        after: int = 0,
        before: int | None = None,
        kind: str | None = None,
        newest_first: bool = False,
        limit: int = 100,
    ) -> tuple[JobEventRecord, ...]:
        """A job's events with numbers above `after` and below `before`; none of a job that does not exist."""
        query = select(JobEventRow).where(JobEventRow.job_id == job_id, JobEventRow.number > after)
        if before is not None:
            query = query.where(JobEventRow.number < before)
        if kind is not None:
            query = query.where(JobEventRow.kind == kind)
        order = JobEventRow.number.desc() if newest_first else JobEventRow.number
        with self._reading() as session:
            return tuple(map(_record, session.scalars(query.order_by(order).limit(limit))))


def append_events(session: Session, job_id: str, events: Sequence[Event], now: datetime) -> None:
    """Number events and add them. The caller holds the job's row, so that nobody else numbers meanwhile."""
    if not events:
        return
    last = session.scalar(select(func.max(JobEventRow.number)).where(JobEventRow.job_id == job_id)) or 0
    for number, event in enumerate(events, last + 1):
        session.add(
            JobEventRow(
                job_id=job_id,
                number=number,
                kind=event.kind,
                level=event.level,
                message=event.message,
                data=None if event.data is None else as_json(event.data, "event"),
                created_at=event.at or now,
            )
        )
    session.flush()


def _record(row: JobEventRow) -> JobEventRecord:
    return JobEventRecord(
        job_id=row.job_id,
        number=row.number,
        kind=row.kind,
        level=row.level,
        message=row.message,
        data=row.data,
        created_at=row.created_at,
    )
