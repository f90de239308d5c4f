"""POST /v1/engine/profile: a trace of the engine's next steps."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from okavango.platform.errors import NotReadyError
from okavango.serving.profiling import chrome_trace
from okavango.web.api.sse import while_connected
from okavango.web.services import Services, get_services

router = APIRouter()

PATIENCE_SECONDS = 60.0
MOST_STEPS = 100
"""A step of a small decoder is some thousand operators, and a trace of a hundred steps tens of megabytes."""


@router.post("/v1/engine/profile")
async def profile_engine(
    request: Request,
    steps: int = Query(10, ge=1, le=MOST_STEPS),
    services: Services = Depends(get_services),
) -> Response:
    """Trace the next steps, which are slower for it, as JSON that chrome://tracing and Perfetto open.

    It shows times, operators and sizes, and nothing of what was asked or answered.
    """
    trace = await while_connected(request.receive, _trace(services, steps))
    name = {"Content-Disposition": 'attachment; filename="okavango-steps.json"'}
    return Response(trace, media_type="application/json", headers=name)


async def _trace(services: Services, steps: int) -> bytes:
    wanted = services.engine.profiler.request(steps)
    try:
        found = await asyncio.wait_for(asyncio.wrap_future(wanted), timeout=PATIENCE_SECONDS)
    except TimeoutError:
        raise NotReadyError(
            f"fewer than {steps} steps ran within {PATIENCE_SECONDS:g} s; send requests meanwhile"
        ) from None
    return await asyncio.to_thread(chrome_trace, found)
