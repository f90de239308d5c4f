"""The composition root: the one place that knows how everything is put together.

catalog ─┐
store ───┼─▶ verifier ─▶ models ─┐
base ────┤                       ├─▶ routes and studio
         └─▶ engine ─────────────┘
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.responses import RedirectResponse

from okavango.modalities.base import Base, find_base
from okavango.modalities.precision import check_device, resolve_dtype
from okavango.platform.artifacts import ArtifactStore
from okavango.platform.catalog.store import open_catalog
from okavango.platform.config import Settings
from okavango.platform.telemetry import PrometheusMetrics
from okavango.serving.adapters.gate import ParityGate
from okavango.serving.engine import Engine
from okavango.training.mirror import stored_of
from okavango.training.service import Worker
from okavango.web import problems
from okavango.web.api import (
    adapters,
    chat,
    completions,
    datasets,
    embeddings,
    files,
    fine_tuning,
    health,
    models,
    profile,
)
from okavango.web.api.logprobs import TokenText
from okavango.web.bundles import Bundles
from okavango.web.draining import Gate
from okavango.web.edge import Edge
from okavango.web.models import Models
from okavango.web.pins import Pins
from okavango.web.security import Guard, Keys, check_exposure
from okavango.web.services import ServeOptions, Services
from okavango.web.verifier import Verifier

STUDIO = "/studio"
_PARTS = (
    chat,
    completions,
    embeddings,
    models,
    adapters,
    files,
    fine_tuning,
    datasets,
    profile,
    health,
)


def build(
    settings: Settings, base_name: str, options: ServeOptions | None = None, *, studio: bool = True
) -> FastAPI:
    """The whole server for one base, its decoder loaded. Its services are at app.state.services.

    Raises:
        ConfigError: it would listen beyond this machine without keys, a setting is wrong, the device is not
            there, or an adapter that is to be pinned cannot be served.
        NotFoundError: no base of that name.
        UnsupportedError: the base's decoder cannot be served.
    """
    options = options or ServeOptions()
    check_exposure(options.host, settings.keys)
    check_device(options.engine.device)
    services = build_services(settings, find_base(base_name, settings.bases), options)
    services.pins.begin()
    app = FastAPI(
        title="Okavango", version=version("okavango"), lifespan=_lifespan, docs_url=None, redoc_url=None
    )
    app.state.services = services
    for part in _PARTS:
        app.include_router(part.router)
    problems.install(app)
    # The last one added is the outermost.
    app.add_middleware(Guard, keys=Keys(settings.keys))
    app.add_middleware(Edge, gate=services.gate, metrics=services.metrics)
    if studio:
        _mount_studio(app, services)
    return app


def build_services(settings: Settings, base: Base, options: ServeOptions) -> Services:
    """Everything that routes stand on, nothing of it started."""
    catalog = open_catalog(settings)
    catalog.put_base(base.name, base.digest, base.components, str(base.folder))
    store = ArtifactStore(settings.artifacts, settings.cache / "artifacts")
    metrics = PrometheusMetrics()
    bundles = Bundles(store)
    engine = Engine(base, bundles, options.engine, metrics)
    verifier = Verifier(base, catalog, bundles, _gate(base, options))
    models = Models(base, catalog, bundles, verifier, patience_seconds=options.patience_seconds)
    return Services(
        settings=settings,
        options=options,
        base=base,
        catalog=catalog,
        store=store,
        stored=stored_of(settings),
        worker=Worker(settings, options.worker) if options.worker is not None else None,
        engine=engine,
        verifier=verifier,
        models=models,
        pins=Pins(options.pins, models, engine),
        metrics=metrics,
        gate=Gate(options.engine.max_sequences + options.engine.max_waiting),
        tokens=TokenText(engine.tokenizer),
    )


def _gate(base: Base, options: ServeOptions) -> ParityGate:
    engine = options.engine
    return ParityGate(base, resolve_dtype(engine.dtype, engine.device), engine.kernels)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    services.engine.start()
    services.verifier.start()
    services.pins.start()
    if services.worker is not None:
        services.worker.start()
    try:
        yield
    finally:
        services.gate.close()
        if services.worker is not None:
            services.worker.ask_to_stop()
        await asyncio.to_thread(services.pins.stop)
        # Each waits for its thread; the engine's has last events for tasks of this loop.
        await asyncio.to_thread(services.engine.stop)
        await asyncio.to_thread(services.verifier.stop)
        if services.worker is not None:
            await asyncio.to_thread(services.worker.stop)
        services.catalog.close()


def _mount_studio(app: FastAPI, services: Services) -> None:
    from okavango.web.studio.app import mount_studio

    @app.get("/", include_in_schema=False)
    def home() -> RedirectResponse:
        return RedirectResponse(STUDIO)

    mount_studio(app, services, STUDIO)
