"""POST /v1/datasets/check: every fault of an uploaded file, before a job takes compute."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from okavango.training.check import Advance, check_dataset
from okavango.training.measure import measure_of
from okavango.training.spec import parse_spec
from okavango.training.uploads import Uploads
from okavango.web.api.body import parse_body, read_body
from okavango.web.services import Services, get_services

router = APIRouter()


class CheckRequest(BaseModel):
    """`file`: an uploaded file's id. `format`: of its rows, found out if not named. `max_faults`: so many
    faults, and so many warnings, are listed."""

    model_config = ConfigDict(extra="forbid")

    file: str
    format: str | None = None
    max_faults: int = Field(200, ge=0, le=10_000)


_BODY = {"content": {"application/json": {"schema": CheckRequest.model_json_schema()}}, "required": True}


@router.post("/v1/datasets/check", openapi_extra={"requestBody": _BODY})
async def check_file(request: Request, services: Services = Depends(get_services)) -> dict[str, Any]:
    """A report as `okavango data check --json` prints it, with tokens as the server's base counts them."""
    options = services.options
    asked = parse_body(CheckRequest, await read_body(request, options.body_bytes, options.body_seconds))
    return await asyncio.to_thread(check_upload, asked, request.state.principal, services)


def check_upload(
    asked: CheckRequest, principal: str, services: Services, progress: Advance = lambda done: None
) -> dict[str, Any]:
    """The report, its memory that of a job with the default settings on the server's own device.

    Args:
        progress: told how many bytes are done; what it raises ends the check.

    Raises:
        NotFoundError: no such file of this principal.
        ConfigError: there is no such format.
    """
    record = services.catalog.get_file(asked.file, principal=principal)
    place = Uploads(services.catalog, services.stored, principal).locate(Path(record.id))
    usual = parse_spec({"base": services.base.name, "data": record.id, "name": "checked"})
    report = check_dataset(
        place.path,
        form=asked.format,
        allow_files=place.allow_files,
        uploads=place.uploads,
        limits=services.options.media,
        measure=measure_of(services.base, usual, services.options.engine.device),
        keep=asked.max_faults,
        progress=progress,
    )
    found = report.to_json()
    for part in (found, *found["faults"], *found["warnings"]):
        part["file"] = record.name
    return {"object": "dataset.report", "id": record.id, **found}
