"""What the training page fetches beside Gradio: uploads on their way in, media of held-out rows out."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import Response

from okavango.web.api.files import upload_file
from okavango.web.services import Services
from okavango.web.studio.job_media import JobMedia

UPLOADS = "/uploads"
MEDIA = "/media"


def add_routes(app: FastAPI, services: Services, media: JobMedia, path: str) -> None:
    """Below the studio's path, where the browser's own sign-in counts; before Gradio takes all of it.

    Uploads are /v1/files' own: streamed to the disk, within its limits and the caller's quota.
    """
    router = APIRouter(include_in_schema=False)
    router.add_api_route(path + UPLOADS, upload_file, methods=["POST"])

    @router.get(path + MEDIA + "/{job_id}/{line}/{digest}")
    def medium(job_id: str, line: int, digest: str, request: Request) -> Response:
        job = services.catalog.get_job(job_id, principal=request.state.principal)
        data, kind = media.shown(job, line, digest)
        # A digest's medium never changes; whoever may not see it must not find it in a shared cache.
        headers = {"cache-control": "private, max-age=86400, immutable", "x-content-type-options": "nosniff"}
        return Response(data, media_type=kind, headers=headers)

    app.include_router(router)
