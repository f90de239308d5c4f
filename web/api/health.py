"""/healthz: does it live? /readyz: may it have traffic? /metrics: what has it done?"""

from __future__ import annotations

import logging
from collections import Counter

from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse, Response

from okavango.platform.catalog.states import VERSION_STATES
from okavango.web.services import Services, get_services

log = logging.getLogger(__name__)
router = APIRouter()


@router.get("/healthz")
async def healthz(services: Services = Depends(get_services)) -> Response:
    """503 once the engine's thread is gone: nothing but a restart helps then."""
    alive = services.engine.is_running
    return JSONResponse({"status": "ok" if alive else "the engine is not running"}, 200 if alive else 503)


@router.get("/readyz")
def readyz(services: Services = Depends(get_services)) -> Response:
    reason = _why_not_ready(services)
    return JSONResponse({"status": reason or "ready"}, 503 if reason else 200)


@router.get("/metrics")
def metrics(services: Services = Depends(get_services)) -> Response:
    """Prometheus' text format."""
    try:
        _count_adapters(services)
    except Exception as error:  # a catalog that is away must not take the other metrics with it
        log.warning("adapter versions cannot be counted: %s", error)
    return Response(services.metrics.render(), media_type=services.metrics.content_type)


def _why_not_ready(services: Services) -> str | None:
    if services.gate.draining:
        return "shutting down"
    if not services.engine.is_running:
        return "the engine is not running"
    try:
        services.catalog.list_bases()
    except Exception as error:
        log.warning("the catalog does not answer: %s", error)
        return "the catalog does not answer"
    return None


def _count_adapters(services: Services) -> None:
    counts = Counter(version.state for version in services.catalog.versions())
    for state in VERSION_STATES:
        services.metrics.gauge("okavango_adapters", counts[state], state=state)
