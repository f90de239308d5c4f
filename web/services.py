"""What routes and the studio stand on. Built by web.app and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastapi import Request

from okavango.modalities.base import Base
from okavango.modalities.content import Limits
from okavango.platform.artifacts import ArtifactStore
from okavango.platform.catalog.store import Catalog
from okavango.platform.config import Settings
from okavango.platform.errors import ConfigError
from okavango.platform.stored import Stored
from okavango.platform.telemetry import PrometheusMetrics
from okavango.serving.engine import Engine, EngineOptions
from okavango.training.service import Worker, WorkerOptions
from okavango.web.api.logprobs import TokenText
from okavango.web.draining import Gate
from okavango.web.models import Models
from okavango.web.pins import Pins
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
        pins: names of adapters that keep a slot; one slot at least is left for others.
        upload_bytes: the largest file that is taken; upload_seconds: the longest pause while it comes.
        file_quota_bytes: of all files of a caller.
        most_open_jobs: of a caller, that wait, run or are paused.
        worker: how the server's own worker does jobs; None leaves them to others.
    """

    host: str = "127.0.0.1"
    engine: EngineOptions = field(default_factory=EngineOptions)
    media: Limits = field(default_factory=Limits)
    body_bytes: int = 64 * MIB
    body_seconds: float = 60.0
    patience_seconds: float = 60.0
    drain_seconds: float = 30.0
    pins: tuple[str, ...] = ()
    upload_bytes: int = 2048 * MIB
    upload_seconds: float = 60.0
    file_quota_bytes: int = 20_480 * MIB
    most_open_jobs: int = 20
    worker: WorkerOptions | None = None

    def __post_init__(self) -> None:
        count, slots = len(set(self.pins)), self.engine.slots
        if count and count >= slots:
            raise ConfigError(
                f"{count} adapters leave none of {slots} slots for others",
                where="--pin",
                remedy=f"pin fewer, or give --slots {count + 1}",
            )


@dataclass(frozen=True)
class Services:
    """One running system. `models` resolves names, `pins` follows some of them, `gate` counts calls in
    progress, `tokens` spells them, `stored` keeps uploads, `worker` does the queue's jobs."""

    settings: Settings
    options: ServeOptions
    base: Base
    catalog: Catalog
    store: ArtifactStore
    stored: Stored
    worker: Worker | None
    engine: Engine
    verifier: Verifier
    models: Models
    pins: Pins
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
