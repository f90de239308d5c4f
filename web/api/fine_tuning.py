"""/v1/fine_tuning/jobs: training jobs in OpenAI's form."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import JSONResponse, Response

from okavango.platform.catalog.records import JobEventRecord, JobRecord
from okavango.platform.catalog.states import FINISHED
from okavango.platform.errors import InputError
from okavango.training.worker import submit
from okavango.web.api.body import read_body
from okavango.web.api.fine_tuning_request import JobRequest, parse_job
from okavango.web.api.job_events import describe_event, follow, number_of
from okavango.web.api.paging import page
from okavango.web.api.results import result_files
from okavango.web.api.sse import EventStream
from okavango.web.services import Services, get_services

router = APIRouter()

_BODY = {"content": {"application/json": {"schema": JobRequest.model_json_schema()}}, "required": True}
_LIMIT = Query(20, ge=1, le=1000)


@router.post("/v1/fine_tuning/jobs", openapi_extra={"requestBody": _BODY})
async def create_job(request: Request, services: Services = Depends(get_services)) -> dict[str, Any]:
    """Queue a job, if all that can be told without reading the data speaks for it."""
    options = services.options
    raw = await read_body(request, options.body_bytes, options.body_seconds)
    return describe(await asyncio.to_thread(queue_job, raw, request.state.principal, services))


def queue_job(raw: bytes, principal: str, services: Services) -> JobRecord:
    """A request's body → the job that it asks for, queued.

    Raises:
        OkavangoError: as parse_job and training.worker.submit.
    """
    asked = parse_job(raw, services.base.name)
    return submit(
        services.catalog,
        services.settings,
        asked.spec,
        principal,
        priority=asked.priority,
        labels=asked.labels,
        most_open=services.options.most_open_jobs,
    )


@router.get("/v1/fine_tuning/jobs")
def list_jobs(
    request: Request,
    services: Services = Depends(get_services),
    after: str | None = None,
    limit: int = _LIMIT,
) -> dict[str, Any]:
    """The caller's jobs, newest first."""
    found = services.catalog.list_jobs(principal=request.state.principal, after=after, limit=limit + 1)
    return page(found, limit, describe)


@router.get("/v1/fine_tuning/jobs/{job_id}")
def retrieve_job(job_id: str, request: Request, services: Services = Depends(get_services)) -> dict[str, Any]:
    return describe(_own(job_id, request, services))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
def cancel_job(job_id: str, request: Request, services: Services = Depends(get_services)) -> dict[str, Any]:
    """End a job; nothing of it is kept. Its worker obeys within seconds."""
    _own(job_id, request, services)
    return describe(services.catalog.request_cancel(job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/pause")
def pause_job(job_id: str, request: Request, services: Services = Depends(get_services)) -> dict[str, Any]:
    """Set a job aside with a checkpoint."""
    _own(job_id, request, services)
    return describe(services.catalog.request_pause(job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/resume")
def resume_job(job_id: str, request: Request, services: Services = Depends(get_services)) -> dict[str, Any]:
    """Queue a paused job again."""
    _own(job_id, request, services)
    return describe(services.catalog.resume_job(job_id))


@router.get("/v1/fine_tuning/jobs/{job_id}/events")
async def list_events(
    job_id: str,
    request: Request,
    services: Services = Depends(get_services),
    after: str | None = None,
    limit: int = _LIMIT,
    stream: bool = False,
) -> Response:
    """What happened, newest first; or, streamed, from the first on, and as it happens until the job ends.

    A stream goes on after the event that the header Last-Event-ID names.
    """
    await asyncio.to_thread(_own, job_id, request, services)
    if stream or "text/event-stream" in request.headers.get("accept", ""):
        last = request.headers.get("last-event-id") or after
        return EventStream(follow(services.catalog, job_id, number_of(last, job_id)), {})
    before = number_of(after, job_id) if after is not None else None
    found = await asyncio.to_thread(
        services.catalog.list_events, job_id, before=before, newest_first=True, limit=limit + 1
    )
    return JSONResponse(page(found, limit, describe_event))


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str,
    request: Request,
    services: Services = Depends(get_services),
    after: str | None = None,
    limit: int = _LIMIT,
) -> dict[str, Any]:
    """Where the job could go on, newest first. Only the end of a job is an adapter that can be asked."""
    job = _own(job_id, request, services)
    before = number_of(after, job_id) if after is not None else None
    found = services.catalog.list_events(
        job_id, before=before, kind="checkpoint", newest_first=True, limit=limit + 1
    )
    return page(found, limit, lambda event: _checkpoint(event, job))


def _own(job_id: str, request: Request, services: Services) -> JobRecord:
    return services.catalog.get_job(job_id, principal=request.state.principal)


def describe(job: JobRecord) -> dict[str, Any]:
    """A job as OpenAI's clients know it, with what else is known under `okavango`."""
    spec = job.spec
    tuned = {"n_epochs": spec["epochs"] or "auto", "batch_size": spec["batch_size"]}
    result = job.result or {}
    error = {"code": "job_failed", "message": job.error, "param": None} if job.error else None
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at.timestamp()),
        "finished_at": int(job.finished_at.timestamp()) if job.finished_at else None,
        "model": spec["base"],
        "fine_tuned_model": result.get("adapter"),
        "organization_id": job.principal,
        "status": _status(job),
        "training_file": spec["data"],
        "validation_file": spec["eval"],
        "result_files": result_files(job),
        "hyperparameters": tuned,
        "method": {"type": "supervised", "supervised": {"hyperparameters": tuned}},
        "seed": spec["seed"],
        "trained_tokens": result.get("trained_tokens"),
        "estimated_finish": None,
        "error": error,
        "metadata": job.labels,
        "integrations": [],
        "okavango": {
            "name": job.name,
            "spec": spec,
            "priority": job.priority,
            "attempts": job.attempts,
            "progress": job.progress,
            "metrics": result.get("metrics"),
            "digest": result.get("digest"),
            "privacy": result.get("privacy"),
            "pausing": job.pause_requested,
            "cancelling": job.cancel_requested and job.state not in FINISHED,
        },
    }


def _status(job: JobRecord) -> str:
    return "validating_files" if job.state == "running" and job.progress is None else job.state


def _checkpoint(event: JobEventRecord, job: JobRecord) -> dict[str, Any]:
    data = event.data or {}
    if "step" not in data:
        raise InputError("is no checkpoint", where=f"{event.job_id}/{event.number}")
    is_last = (job.result or {}).get("steps") == data["step"]
    return {
        "id": f"{event.job_id}/{event.number}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(event.created_at.timestamp()),
        "fine_tuning_job_id": event.job_id,
        "fine_tuned_model_checkpoint": (job.result or {}).get("adapter", "") if is_last else "",
        "step_number": data["step"],
        "metrics": {"step": data["step"], "train_loss": data.get("train_loss")},
    }
