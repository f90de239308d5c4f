"""A job's events, in OpenAI's form, one page or as they happen."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from okavango.platform.catalog.records import JobEventRecord
from okavango.platform.catalog.states import FINISHED
from okavango.platform.catalog.store import Catalog
from okavango.platform.errors import InputError
from okavango.web.api.sse import DONE

_POLL_SECONDS = 0.5
_KEEP_ALIVE_SECONDS = 15.0
_PAGE = 500


def describe_event(event: JobEventRecord) -> dict[str, Any]:
    """`type` is message or metrics, as OpenAI has it; `okavango.kind` says more."""
    return {
        "id": f"{event.job_id}/{event.number}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at.timestamp()),
        "level": event.level,
        "message": event.message,
        "type": "metrics" if event.kind in ("metrics", "scores") else "message",
        "data": event.data or {},
        "okavango": {"kind": event.kind, "number": event.number},
    }


def number_of(event_id: str | None, job_id: str) -> int:
    """The number in an event's id, or a number alone; 0 of none.

    Raises:
        InputError: it is no event of this job.
    """
    if event_id is None:
        return 0
    number = event_id.removeprefix(f"{job_id}/")
    if not (number.isascii() and number.isdecimal() and len(number) < 10):
        raise InputError(f"{event_id!r} is no event of {job_id}", where="after")
    return int(number)


async def follow(catalog: Catalog, job_id: str, after: int) -> AsyncGenerator[bytes, None]:
    """Server-sent events, each with its number as id, until the job has ended or is set aside."""
    quiet = 0.0
    while True:
        # The state is read first: what ended a job is written with its last event.
        job = await asyncio.to_thread(catalog.get_job, job_id)
        found = await asyncio.to_thread(catalog.list_events, job_id, after=after, limit=_PAGE)
        for event in found:
            after = event.number
            yield f"id: {after}\ndata: {json.dumps(describe_event(event), ensure_ascii=False)}\n\n".encode()
        if len(found) == _PAGE:
            continue
        if job.state in FINISHED:
            yield DONE
            return
        quiet = 0.0 if found else quiet + _POLL_SECONDS
        if quiet >= _KEEP_ALIVE_SECONDS:
            quiet = 0.0
            yield b": still here\n\n"
        await asyncio.sleep(_POLL_SECONDS)
