"""The real server on a free port, over the tiny base, and OpenAI's own client."""

from __future__ import annotations

import base64
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import uvicorn

from okavango.modalities.base import Base
from okavango.platform.artifacts import ArtifactStore
from okavango.platform.bundle import read_manifest
from okavango.platform.catalog.records import VersionRecord
from okavango.platform.catalog.store import open_catalog
from okavango.platform.config import Settings
from okavango.serving.engine import EngineOptions
from okavango.web.app import build
from okavango.web.commands import address_of, bind
from okavango.web.draining import DrainingServer
from okavango.web.services import ServeOptions, Services

if TYPE_CHECKING:
    from tiny_fixtures import Bundles

ENGINE = EngineOptions(dtype="float32", kv_bytes=1 << 23, max_step_tokens=64, max_sequences=16, slots=4)


@dataclass
class Site:
    """Where a server finds its base, its catalog and its bundles."""

    settings: Settings
    base: Base

    def publish(self, name: str, folder: Path, **changes: Any) -> VersionRecord:
        """Store a sealed bundle and register it as the adapter's next version, as training does."""
        manifest = read_manifest(folder)
        digest = ArtifactStore(self.settings.artifacts, self.settings.cache / "artifacts").put(folder)
        facts: dict[str, Any] = {
            "base": self.base.name,
            "components": manifest.components,
            "modalities": manifest.modalities,
            "lineage": {},
            "metrics": {"chrf": 31.4},
        }
        catalog = open_catalog(self.settings)
        catalog.put_base(self.base.name, self.base.digest, self.base.components, str(self.base.folder))
        version = catalog.register_version(name, digest, **(facts | changes))
        catalog.close()
        return version


class RunningServer:
    """A server in a thread, as `okavango serve` runs it."""

    def __init__(self, site: Site, options: ServeOptions, *, studio: bool = False) -> None:
        self.site = site
        self.listener = bind(options.host, 0)
        self.app = build(site.settings, site.base.name, options, studio=studio)
        self.services: Services = self.app.state.services
        config = uvicorn.Config(
            self.app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=2
        )
        self.server = DrainingServer(
            config,
            self.services.gate,
            is_idle=self.services.is_idle,
            cut=self.services.engine.stop,
            drain_seconds=options.drain_seconds,
        )
        self.url = address_of(self.listener)
        self._thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)
        self._thread.start()
        wait_until(lambda: self.server.started)

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, **options})

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def metric(self, sample: str) -> float:
        """A sample's value, by its name with labels as Prometheus prints it; 0 where there is none."""
        lines = self.get("/metrics").text.splitlines()
        return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{sample} ")), 0.0)

    def is_ended(self) -> bool:
        return not self._thread.is_alive()

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(timeout=20)
        assert self.is_ended()


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def user(text: str, *pictures: bytes) -> list[dict[str, Any]]:
    """A conversation of one turn, as OpenAI's API takes it."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(each)}} for each in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]


def make_site(folder: Path, base: Base) -> Site:
    """A home of its own, with the base and no adapter."""
    settings = Settings(home=folder / "home", cache=folder / "cache")
    shutil.copytree(base.folder, settings.bases / base.name)
    return Site(settings, base)


@pytest.fixture
def site(tmp_path: Path, tiny_base: Base) -> Site:
    return make_site(tmp_path, tiny_base)


@pytest.fixture
def make_server(site: Site) -> Iterator[Callable[..., RunningServer]]:
    """make_server(drain_seconds=1, engine={"slots": 2}, keys="a,b"): options by keyword."""
    made: list[RunningServer] = []

    def make(
        *, engine: dict[str, Any] | None = None, keys: str = "", studio: bool = False, **options: Any
    ) -> RunningServer:
        own = replace(site, settings=replace(site.settings, api_keys=keys))
        wanted = ServeOptions(engine=replace(ENGINE, **(engine or {})), **options)
        made.append(RunningServer(own, wanted, studio=studio))
        return made[-1]

    yield make
    for server in made:
        server.stop()


@pytest.fixture(scope="session")
def server(
    tiny_base: Base, tiny_bundles: Bundles, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """One server for all tests that leave it as it is: the adapters r4, r8 and r16 are verified and ready."""
    site = make_site(tmp_path_factory.mktemp("site"), tiny_base)
    for name, folder in tiny_bundles.folders.items():
        site.publish(name, folder)
    running = RunningServer(site, ServeOptions(engine=ENGINE))
    wait_until(lambda: not running.services.catalog.versions("registered"))
    yield running
    running.stop()


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return server.client()
