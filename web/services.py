"""What routes and the studio stand on. Built by web.app and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastapi import Request

from okavango.modalities.base import Base
from okavango.modalities.content import Limits
from okavango.platform.artifacts import ArtifactStore
from okavango.platform.catalog.store import Catalog
from okavango.platform.config import Settings
from okavango.platform.telemetry import PrometheusMetrics
from okavango.serving.engine import Engine, EngineOptions
from okavango.web.api.logprobs import TokenText
from okavango.web.draining import Gate
from okavango.web.models import Models
from okavango.web.verifier import Verifier

MIB = 1 << 20


@dataclass(frozen=True)
class ServeOptions:
    """How one server runs.

    Attributes:
        host: the address that it listens on; beyond this machine only with API keys.
        engine: how its engine runs.
        media: what is accepted of pictures and sounds.
        body_bytes: the largest request body.
        body_seconds: how long a body may take to arrive.
        patience_seconds: how long a request waits for an adapter version that is not verified yet.
        drain_seconds: how long requests in progress may take once the server is told to stop.
    """

    host: str = "127.0.0.1"
    engine: EngineOptions = field(default_factory=EngineOptions)
    media: Limits = field(default_factory=Limits)
    body_bytes: int = 64 * MIB
    body_seconds: float = 60.0
    patience_seconds: float = 60.0
    drain_seconds: float = 30.0


@dataclass(frozen=True)
class Services:
    """One running system. `models` resolves names, `gate` counts calls in progress, `tokens` spells them."""

    settings: Settings
    options: ServeOptions
    base: Base
    catalog: Catalog
    store: ArtifactStore
    engine: Engine
    verifier: Verifier
    models: Models
    metrics: PrometheusMetrics
    gate: Gate
    tokens: TokenText

    def is_idle(self) -> bool:
        """Whether neither a call nor a request of the studio is in progress."""
        stats = self.engine.stats()
        return self.gate.active + stats.preparing + stats.running + stats.waiting == 0


def get_services(request: Request) -> Services:
    """The dependency of every route."""
    services: Services = request.app.state.services
    return services
