"""What load balancers and Prometheus see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from server_fixtures import RunningServer, Site, user
from tiny_fixtures import Bundles


def test_a_server_that_lives_and_is_ready(server: RunningServer) -> None:
    assert (server.get("/healthz").status_code, server.get("/healthz").json()) == (200, {"status": "ok"})
    assert (server.get("/readyz").status_code, server.get("/readyz").json()) == (200, {"status": "ready"})


def test_without_its_engine_it_is_dead(make_server: Callable[..., RunningServer]) -> None:
    server = make_server()
    server.services.engine.stop()
    assert server.get("/healthz").status_code == 503
    assert server.get("/readyz").json() == {"status": "the engine is not running"}


@pytest.fixture
def without_catalog(make_server: Callable[..., RunningServer], site: Site) -> RunningServer:
    server = make_server()
    server.services.verifier.stop()
    server.services.catalog.close()
    database = site.settings.home / "catalog.db"
    for path in site.settings.home.glob("catalog.db*"):
        path.unlink()
    database.mkdir()
    return server


def test_without_its_catalog_it_lives_and_is_not_ready(without_catalog: RunningServer) -> None:
    assert without_catalog.get("/healthz").status_code == 200
    assert without_catalog.get("/readyz").status_code == 503
    assert without_catalog.get("/readyz").json() == {"status": "the catalog does not answer"}


def test_without_its_catalog_it_serves_the_base_and_its_metrics(without_catalog: RunningServer) -> None:
    client = without_catalog.client()
    assert client.chat.completions.create(model="tiny", messages=user("hi"), max_tokens=1).choices
    assert without_catalog.metric("okavango_request_seconds_count") == 1
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="emoji", messages=user("hi"))
    assert (caught.value.status_code, caught.value.code) == (503, "not_ready")


def test_metrics_are_prometheus_text(server: RunningServer) -> None:
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert server.metric('okavango_adapters{state="ready"}') == 3
    assert server.metric('okavango_adapters{state="registered"}') == 0
    assert server.metric("okavango_kv_blocks_total") > 0


def test_adapters_are_counted_as_they_are_now(
    make_server: Callable[..., RunningServer], site: Site, tiny_bundles: Bundles, tmp_path: Path
) -> None:
    server = make_server()
    assert server.metric('okavango_adapters{state="refused"}') == 0
    site.publish("emoji", tiny_bundles.folders["r4"])
    server.services.catalog.set_version_state("emoji", 1, "refused", error="said the test")
    assert server.metric('okavango_adapters{state="refused"}') == 1


def test_the_description_of_the_api_is_there(server: RunningServer) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "messages"} <= set(body["properties"])
    assert {"/v1/models", "/v1/adapters", "/healthz", "/readyz", "/metrics"} <= set(paths)
