"""GET /v1/models: every name that requests may use as `model` now."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends

from okavango.web.models import ListedModel, ModelNotFoundError
from okavango.web.services import Services, get_services

router = APIRouter()


@router.get("/v1/models")
def list_models(services: Services = Depends(get_services)) -> dict[str, Any]:
    """The base, and each adapter by name, version and alias, where they take requests."""
    return {"object": "list", "data": [_model(model, services) for model in services.models.listed()]}


@router.get("/v1/models/{name:path}")
def retrieve_model(name: str, services: Services = Depends(get_services)) -> dict[str, Any]:
    for model in services.models.listed():
        if model.id == name:
            return _model(model, services)
    raise ModelNotFoundError(
        f"the model {name!r} does not exist or takes no requests", where="model", remedy="GET /v1/models"
    )


def _model(model: ListedModel, services: Services) -> dict[str, Any]:
    version = model.version
    return {
        "id": model.id,
        "object": "model",
        "created": int(model.created.timestamp()),
        "owned_by": version.principal if version else "okavango",
        "okavango": {
            "base": services.base.name,
            "base_digest": services.base.digest,
            "adapter": version.ref if version else None,
            "adapter_digest": version.digest if version else None,
            "modalities": sorted(version.modalities if version else services.base.encoders),
            "state": version.state if version else "ready",
            "metrics": version.metrics if version else {},
        },
    }
