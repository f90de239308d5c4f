"""Names → what answers, as the catalog's states and aliases have it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from server_fixtures import RunningServer, Site, user
from tiny_fixtures import Bundles

from okavango.platform.bundle import Manifest, read_manifest, seal
from okavango.platform.catalog.store import Catalog, open_catalog

GREEDY: dict[str, Any] = {"messages": user("hello"), "temperature": 0, "max_tokens": 4}


@pytest.fixture
def catalog(site: Site) -> Catalog:
    return open_catalog(site.settings)


def answered_by(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(model=model, **GREEDY)
    return str(answer.okavango["adapter"])  # type: ignore[attr-defined]


def test_a_name_follows_its_versions_and_aliases(
    make_server: Callable[..., RunningServer], site: Site, tiny_bundles: Bundles
) -> None:
    client = make_server().client()
    site.publish("emoji", tiny_bundles.folders["r4"])
    assert answered_by(client, "emoji") == "emoji@1"
    site.publish("emoji", tiny_bundles.folders["r8"])
    assert answered_by(client, "emoji@2") == "emoji@2"
    assert answered_by(client, "emoji") == "emoji@2"
    client.post("/adapters/emoji/aliases", body={"version": 1}, cast_to=object)
    assert answered_by(client, "emoji") == "emoji@1"
    assert answered_by(client, "emoji@prod") == "emoji@1"
    assert answered_by(client, "emoji@2") == "emoji@2"


def test_a_version_that_nobody_tried_yet_is_tried_for_the_request(
    make_server: Callable[..., RunningServer], site: Site, tiny_bundles: Bundles, catalog: Catalog
) -> None:
    client = make_server().client()
    for name in ("one", "two", "three"):
        site.publish(name, tiny_bundles.folders["r4"])
    assert answered_by(client, "three") == "three@1"
    assert catalog.resolve("three@1").state == "ready"


def test_a_version_that_is_not_tried_in_time_says_so(
    make_server: Callable[..., RunningServer], site: Site, tiny_bundles: Bundles
) -> None:
    client = make_server(patience_seconds=0.0).client()
    site.publish("emoji", tiny_bundles.folders["r4"])
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="emoji", **GREEDY)
    assert (caught.value.status_code, caught.value.code) == (503, "not_ready")
    assert "is still being verified" in caught.value.message
    assert "retry-after" in caught.value.response.headers


@pytest.mark.parametrize("state", ["refused", "retired"])
def test_a_version_that_takes_no_requests_says_why(
    make_server: Callable[..., RunningServer],
    site: Site,
    tiny_bundles: Bundles,
    catalog: Catalog,
    state: str,
) -> None:
    site.publish("emoji", tiny_bundles.folders["r4"])
    if state == "retired":
        catalog.set_version_state("emoji", 1, "bound")
    catalog.set_version_state("emoji", 1, state, error="its probes differ")
    server = make_server()
    with pytest.raises(openai.ConflictError) as caught:
        server.client(max_retries=2).chat.completions.create(model="emoji@1", **GREEDY)
    assert (caught.value.code, caught.value.param) == ("conflict", "model")
    assert f"emoji@1 is {state} and takes no requests: its probes differ" in caught.value.message
    # Nothing changes by asking again, and the client was told so.
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert [model.id for model in server.client().models.list()] == ["tiny"]


def test_an_adapter_without_a_version_of_use_says_so(
    make_server: Callable[..., RunningServer], site: Site, tiny_bundles: Bundles, catalog: Catalog
) -> None:
    site.publish("emoji", tiny_bundles.folders["r4"])
    catalog.set_version_state("emoji", 1, "refused", error="its probes differ")
    with pytest.raises(openai.NotFoundError) as caught:
        make_server().client().chat.completions.create(model="emoji", **GREEDY)
    assert caught.value.code == "model_not_found"
    assert "every version was refused or is retired: adapter 'emoji'" in caught.value.message


def test_a_bundle_that_vanished_is_the_servers_fault(
    make_server: Callable[..., RunningServer], site: Site, tiny_bundles: Bundles, catalog: Catalog
) -> None:
    version = site.publish("emoji", tiny_bundles.folders["r4"])
    catalog.set_version_state("emoji", 1, "ready")
    server = make_server()
    weights = Path(site.settings.artifacts) / version.digest / "decoder" / "adapter_model.safetensors"
    weights.unlink()
    with pytest.raises(openai.InternalServerError) as caught:
        server.client().chat.completions.create(model="emoji", **GREEDY)
    assert caught.value.code == "integrity"
    assert str(site.settings.home) not in caught.value.response.text
    assert server.client().chat.completions.create(model="tiny", **GREEDY).choices


def test_a_bundles_system_prompt_is_used_unless_the_request_has_its_own(
    make_server: Callable[..., RunningServer], site: Site, tiny_bundles: Bundles, tmp_path: Path
) -> None:
    plain = tiny_bundles.folders["r4"]
    folder = tmp_path / "bundle"
    folder.mkdir()
    for path in plain.rglob("*.*"):
        target = folder / path.relative_to(plain)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name not in ("manifest.json", "probes.safetensors"):
            target.write_bytes(path.read_bytes())
    (folder / "prompt.json").write_text(json.dumps({"system": "Be brief."}))
    manifest = read_manifest(plain)
    seal(folder, Manifest(manifest.components, manifest.modalities))
    site.publish("plain", plain)
    site.publish("brief", folder)
    client = make_server().client()

    def text(model: str, *messages: dict[str, str]) -> str | None:
        asked: dict[str, Any] = {**GREEDY, "messages": list(messages), "max_tokens": 16}
        return client.chat.completions.create(model=model, **asked).choices[0].message.content

    question, brief = {"role": "user", "content": "hello"}, {"role": "system", "content": "Be brief."}
    other = {"role": "system", "content": "Be long and winding."}
    assert text("brief", question) == text("plain", brief, question)
    assert text("brief", question) != text("plain", question)
    assert text("brief", other, question) == text("plain", other, question)


def test_a_bundle_that_the_store_has_lost_is_the_servers_fault(
    make_server: Callable[..., RunningServer], site: Site, tiny_bundles: Bundles
) -> None:
    server = make_server()
    version = site.publish("emoji", tiny_bundles.folders["r4"])
    assert answered_by(server.client(), "emoji") == "emoji@1"
    shutil.rmtree(server.services.store.fetch(version.digest))
    with pytest.raises(openai.InternalServerError, match="missing from the artifact store") as caught:
        server.client().chat.completions.create(model="emoji", **GREEDY)
    assert (caught.value.status_code, caught.value.code) == (503, "not_ready")
    server.client().chat.completions.create(model="tiny", **GREEDY)
