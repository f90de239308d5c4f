"""/v1/models and /v1/adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from server_fixtures import RunningServer, Site
from tiny_fixtures import Bundles

from okavango.platform.catalog.store import open_catalog


def test_the_list_names_all_that_requests_may_name(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "r16", "r16@1", "r4", "r4@1", "r8", "r8@1"]


def test_a_model_says_what_it_is(client: openai.OpenAI, server: RunningServer, tiny_bundles: Bundles) -> None:
    model = client.models.retrieve("r8@1")
    assert (model.id, model.object, model.owned_by) == ("r8@1", "model", "local")
    assert model.created > 1_700_000_000
    assert model.okavango == {  # type: ignore[attr-defined]
        "base": "tiny",
        "base_digest": server.services.base.digest,
        "adapter": "r8@1",
        "adapter_digest": tiny_bundles.digests["r8"],
        "modalities": ["image"],
        "state": "ready",
        "metrics": {"chrf": 31.4},
    }


def test_the_base_is_a_model(client: openai.OpenAI) -> None:
    model = client.models.retrieve("tiny")
    assert model.owned_by == "okavango"
    assert model.okavango["adapter"] is None  # type: ignore[attr-defined]


def test_a_name_that_takes_no_requests_is_not_there(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("r99")
    assert caught.value.code == "model_not_found"


def test_aliases_and_only_servable_versions_are_listed(
    make_server: Callable[..., RunningServer], site: Site, tiny_bundles: Bundles
) -> None:
    for rank in ("r4", "r8", "r16"):
        site.publish("emoji", tiny_bundles.folders[rank])
    catalog = open_catalog(site.settings)
    catalog.set_version_state("emoji", 1, "ready")
    catalog.set_version_state("emoji", 2, "bound")
    catalog.set_version_state("emoji", 3, "refused", error="probes")
    catalog.promote("emoji", 1, "canary")
    client = make_server().client()
    assert [model.id for model in client.models.list()] == [
        "tiny",
        "emoji",
        "emoji@1",
        "emoji@2",
        "emoji@canary",
    ]
    assert client.models.retrieve("emoji").okavango["adapter"] == "emoji@2"  # type: ignore[attr-defined]
    assert client.models.retrieve("emoji@canary").okavango["adapter"] == "emoji@1"  # type: ignore[attr-defined]


def test_adapters_show_versions_states_and_scores(server: RunningServer) -> None:
    listed = server.get("/v1/adapters").json()
    assert [adapter["name"] for adapter in listed["data"]] == ["r16", "r4", "r8"]
    adapter = server.get("/v1/adapters/r4").json()
    assert adapter == listed["data"][1]
    assert (adapter["object"], adapter["base"], adapter["aliases"]) == ("adapter", "tiny", [])
    (version,) = adapter["versions"]
    assert (version["version"], version["state"], version["metrics"]) == (1, "ready", {"chrf": 31.4})
    assert version["verification"]["probes"] == 2


class TestMovingAnAlias:
    @pytest.fixture
    def url(self, make_server: Callable[..., RunningServer], site: Site, tiny_bundles: Bundles) -> str:
        for rank in ("r4", "r8", "r16"):
            site.publish("emoji", tiny_bundles.folders[rank])
        catalog = open_catalog(site.settings)
        for number, state in enumerate(("ready", "ready", "refused"), start=1):
            catalog.set_version_state("emoji", number, state)
        return f"{make_server().url}/v1/adapters"

    def test_it_moves_and_remembers_where_from(self, url: str) -> None:
        for number in (1, 2):
            moved = httpx.post(f"{url}/emoji/aliases", json={"version": number, "alias": "canary"})
            assert moved.status_code == 200
        assert {key: moved.json()[key] for key in ("adapter", "name", "version", "previous")} == {
            "adapter": "emoji",
            "name": "canary",
            "version": 2,
            "previous": 1,
        }
        assert httpx.get(f"{url}/emoji").json()["aliases"] == [moved.json()]

    @pytest.mark.parametrize(
        ("adapter", "body", "status", "code"),
        [
            ("emoji", {"version": 3}, 409, "conflict"),
            ("emoji", {"version": 9}, 404, "not_found"),
            ("nobody", {"version": 1}, 404, "not_found"),
            ("emoji", {"version": 1, "alias": "7"}, 400, "invalid_request"),
            ("emoji", {"version": "1"}, 400, "invalid_request"),
            ("emoji", {"version": 0}, 400, "invalid_request"),
            ("emoji", {"verison": 1}, 400, "invalid_request"),
        ],
    )
    def test_or_says_why_not(
        self, url: str, adapter: str, body: dict[str, Any], status: int, code: str
    ) -> None:
        answer = httpx.post(f"{url}/{adapter}/aliases", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
