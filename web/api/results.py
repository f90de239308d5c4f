"""A finished job's figures as a file, as OpenAI's `result_files` are: a CSV with a line for each step.

It is made of the job's events when it is asked for, so it takes no room of anyone's quota and goes when its
job goes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from okavango.platform.catalog.records import JobEventRecord, JobRecord
from okavango.platform.catalog.store import Catalog
from okavango.platform.errors import NotFoundError

NAME = "step_metrics.csv"
_PREFIX = "file-metrics-"
_COLUMNS = ("step", "train_loss", "valid_loss", "tokens_per_second")
_PAGE = 1000


def result_files(job: JobRecord) -> list[str]:
    """Ids of the files that a job has led to."""
    return [f"{_PREFIX}{job.id}"] if job.state == "succeeded" else []


def is_result(file_id: str) -> bool:
    return file_id.startswith(_PREFIX)


def job_of(file_id: str, catalog: Catalog, principal: str) -> JobRecord:
    """Raises NotFoundError unless it is the result of one of the principal's jobs."""
    job = catalog.get_job(file_id.removeprefix(_PREFIX), principal=principal)
    if file_id not in result_files(job):
        raise NotFoundError(f"{job.id} is {job.state} and has no results", where=file_id)
    return job


def describe_result(job: JobRecord, catalog: Catalog) -> dict[str, Any]:
    ended = job.finished_at or job.created_at
    return {
        "id": result_files(job)[0],
        "object": "file",
        "bytes": len(as_csv(job, catalog)),
        "created_at": int(ended.timestamp()),
        "filename": NAME,
        "purpose": "fine-tune-results",
        "status": "processed",
    }


def as_csv(job: JobRecord, catalog: Catalog) -> bytes:
    """A line a step, in order; of a step that was taken again after a stop, what was last."""
    steps: dict[int, dict[str, Any]] = {}
    for event in _metrics(job.id, catalog):
        data = event.data or {}
        steps.setdefault(data["step"], {}).update(data)
    others = sorted({name for each in steps.values() for name in each} - set(_COLUMNS))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*_COLUMNS, *others], lineterminator="\n")
    writer.writeheader()
    writer.writerows(steps[step] for step in sorted(steps))
    return text.getvalue().encode()


def _metrics(job_id: str, catalog: Catalog) -> Iterator[JobEventRecord]:
    after = 0
    while found := catalog.list_events(job_id, kind="metrics", after=after, limit=_PAGE):
        yield from found
        after = found[-1].number
