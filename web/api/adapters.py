"""/v1/adapters: the catalog's adapters with their versions, aliases and scores; and moving an alias."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from okavango.platform.catalog.names import DEFAULT_ALIAS
from okavango.platform.catalog.records import AdapterRecord, AliasRecord, VersionRecord
from okavango.web.api.body import parse_body, read_body
from okavango.web.services import Services, get_services

router = APIRouter()


class AliasMove(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int = Field(ge=1)
    alias: str = DEFAULT_ALIAS


@router.get("/v1/adapters")
def list_adapters(services: Services = Depends(get_services)) -> dict[str, Any]:
    """All adapters of the catalog, those of other bases included."""
    return {"object": "list", "data": [_adapter(each) for each in services.catalog.list_adapters()]}


@router.get("/v1/adapters/{name}")
def retrieve_adapter(name: str, services: Services = Depends(get_services)) -> dict[str, Any]:
    return _adapter(services.catalog.get_adapter(name))


_BODY = {"content": {"application/json": {"schema": AliasMove.model_json_schema()}}, "required": True}


@router.post("/v1/adapters/{name}/aliases", openapi_extra={"requestBody": _BODY})
async def move_alias(
    name: str, request: Request, services: Services = Depends(get_services)
) -> dict[str, Any]:
    """Make an alias name another version. Requests in progress keep the one that they have."""
    options = services.options
    move = parse_body(AliasMove, await read_body(request, options.body_bytes, options.body_seconds))
    return _alias(await asyncio.to_thread(services.catalog.promote, name, move.version, move.alias))


def _adapter(adapter: AdapterRecord) -> dict[str, Any]:
    return {
        "object": "adapter",
        "name": adapter.name,
        "base": adapter.base,
        "created_at": int(adapter.created_at.timestamp()),
        "versions": [_version(version) for version in adapter.versions],
        "aliases": [_alias(alias) for alias in adapter.aliases],
    }


def _version(version: VersionRecord) -> dict[str, Any]:
    times = {name: int(getattr(version, name).timestamp()) for name in ("created_at", "updated_at")}
    return {"object": "adapter.version", **asdict(version), **times}


def _alias(alias: AliasRecord) -> dict[str, Any]:
    moved = int(alias.updated_at.timestamp())
    return {"object": "adapter.alias", **asdict(alias), "updated_at": moved}
