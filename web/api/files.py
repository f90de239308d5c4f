"""/v1/files: what is uploaded to be trained on. Bodies go to the disk as they come."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import FileResponse, Response

from okavango.platform.catalog.records import FileRecord
from okavango.platform.catalog.states import FINISHED
from okavango.platform.errors import ConflictError, InputError
from okavango.platform.stored import new_file_id
from okavango.web.api.paging import page
from okavango.web.api.results import NAME, as_csv, describe_result, is_result, job_of
from okavango.web.problems import HttpError
from okavango.web.services import Services, get_services

router = APIRouter()

PURPOSES = ("fine-tune", "user_data", "vision")
"""fine-tune: data to learn from; the others: media that such data name by their id."""
_CHUNK = 1 << 20
_MOST_NAME = 255
_FORM = {
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "purpose": {"type": "string", "enum": list(PURPOSES)},
                },
            }
        }
    },
    "required": True,
}


@router.post("/v1/files", openapi_extra={"requestBody": _FORM})
async def upload_file(request: Request, services: Services = Depends(get_services)) -> dict[str, Any]:
    """Keep a file, up to the server's limit for one and the caller's quota for all."""
    form = await _read_form(request, services)
    try:
        upload, purpose = form.get("file"), form.get("purpose")
        if not isinstance(upload, UploadFile):
            raise InputError("is missing, or is not a file", where="file")
        if purpose not in PURPOSES:
            known = ", ".join(PURPOSES)
            raise InputError(f"is {purpose!r}, and may be {known}", where="purpose")
        name = Path(upload.filename or "").name[:_MOST_NAME] or "file"
        principal: str = request.state.principal
        record = await asyncio.to_thread(_keep, upload, name, str(purpose), principal, services)
    finally:
        await form.close()
    return describe(record)


@router.get("/v1/files")
def list_files(
    request: Request,
    services: Services = Depends(get_services),
    purpose: str | None = None,
    after: str | None = None,
    limit: int = Query(10_000, ge=1, le=10_000),
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The caller's files."""
    found = services.catalog.list_files(
        principal=request.state.principal,
        purpose=purpose,
        after=after,
        newest_first=order == "desc",
        limit=limit + 1,
    )
    return page(found, limit, describe)


@router.get("/v1/files/{file_id}")
def retrieve_file(
    file_id: str, request: Request, services: Services = Depends(get_services)
) -> dict[str, Any]:
    principal: str = request.state.principal
    if is_result(file_id):
        return describe_result(job_of(file_id, services.catalog, principal), services.catalog)
    return describe(services.catalog.get_file(file_id, principal=principal))


@router.get("/v1/files/{file_id}/content")
def file_content(file_id: str, request: Request, services: Services = Depends(get_services)) -> Response:
    """The very bytes that were uploaded, or what a job's steps came to."""
    principal: str = request.state.principal
    if is_result(file_id):
        job = job_of(file_id, services.catalog, principal)
        disposition = {"content-disposition": f'attachment; filename="{NAME}"'}
        return Response(as_csv(job, services.catalog), media_type="text/csv", headers=disposition)
    record = services.catalog.get_file(file_id, principal=principal)
    path = services.stored.fetch_file(record.id, record.digest)
    return FileResponse(path, media_type="application/octet-stream", filename=record.name)


@router.delete("/v1/files/{file_id}")
def delete_file(file_id: str, request: Request, services: Services = Depends(get_services)) -> dict[str, Any]:
    """Forget a file, unless a job that has not ended learns from it."""
    principal: str = request.state.principal
    if is_result(file_id):
        job = job_of(file_id, services.catalog, principal)
        raise ConflictError(f"it is {job.id}'s, and not kept apart from it", where=file_id)
    services.catalog.get_file(file_id, principal=principal)
    for job in services.catalog.list_jobs(principal=principal):
        if job.state not in FINISHED and file_id in (job.spec.get("data"), job.spec.get("eval")):
            raise ConflictError(f"{job.id} needs it", where=file_id, remedy="cancel the job first")
    services.catalog.delete_file(file_id, principal=principal)
    services.stored.remove_file(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def describe(record: FileRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": int(record.created_at.timestamp()),
        "filename": record.name,
        "purpose": record.purpose,
        "status": "processed",
        "okavango": {"sha256": record.digest},
    }


async def _read_form(request: Request, services: Services) -> FormData:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        message = f"the content type is {kind or 'missing'}, and multipart/form-data is expected"
        raise HttpError(415, "unsupported_media_type", message)
    options = services.options
    used = await asyncio.to_thread(services.catalog.file_bytes, request.state.principal)
    if used >= options.file_quota_bytes:
        raise ConflictError(
            f"the quota of {options.file_quota_bytes:,} bytes is used up",
            where="file",
            remedy="delete files that are no longer needed",
        )
    stream = _bounded(request, options.upload_bytes, options.upload_seconds)
    try:
        return await MultiPartParser(request.headers, stream, max_files=1, max_fields=4).parse()
    except MultiPartException as error:
        raise InputError(f"the form cannot be read: {error.message}") from error


async def _bounded(request: Request, limit: int, seconds: float) -> AsyncGenerator[bytes, None]:
    """The body as it comes, up to a size, and no pause in it longer than `seconds`."""
    size, chunks = 0, aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(seconds):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise HttpError(408, "request_timeout", f"nothing came for {seconds:g} seconds") from None
        size += len(chunk)
        if size > limit:
            raise HttpError(413, "request_too_large", f"the upload is over the limit of {limit:,} bytes")
        yield chunk


def _keep(upload: UploadFile, name: str, purpose: str, principal: str, services: Services) -> FileRecord:
    """Into the store first, then into the catalog: what the catalog knows is there."""
    file_id, digest, size = new_file_id(), hashlib.sha256(), 0
    with services.stored.incoming() as path:
        with path.open("wb") as file:
            while chunk := upload.file.read(_CHUNK):
                digest.update(chunk)
                size += file.write(chunk)
        if size == 0:
            raise InputError("is empty", where="file")
        services.stored.put_file(file_id, path)
    try:
        return services.catalog.put_file(
            file_id,
            name,
            purpose,
            size,
            digest.hexdigest(),
            principal=principal,
            quota_bytes=services.options.file_quota_bytes,
        )
    except BaseException:
        services.stored.remove_file(file_id)
        raise
