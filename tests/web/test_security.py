"""Who may call, through the real server."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from server_fixtures import RunningServer, user

from okavango.platform.errors import ConfigError
from okavango.web.security import Keys, check_exposure, is_loopback

KEYS = "sesame,second-key-é"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "app.localhost"])
def test_these_mean_this_machine(host: str) -> None:
    assert is_loopback(host)
    check_exposure(host, ())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.com", "localhost.example.com"])
def test_beyond_this_machine_keys_are_needed(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="OKAVANGO_API_KEYS"):
        check_exposure(host, ())
    check_exposure(host, ("key",))


def test_a_principal_is_named_without_its_key() -> None:
    keys = Keys(("sesame", "other"))
    assert keys.principal(b"sesame") == "key-d0c04f4b"
    assert keys.principal(b"Sesame") is None
    assert keys.principal(b"") is None


class TestWithoutKeys:
    @pytest.mark.parametrize("host", ["evil.example:8000", "10.0.0.1", "localhost.evil.example", ""])
    @pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/"])
    def test_a_foreign_host_name_is_refused(self, server: RunningServer, host: str, path: str) -> None:
        answer = server.get(path, headers={"host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden_host")

    @pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:99", "[::1]:8000"])
    def test_names_of_this_machine_are_fine(self, server: RunningServer, host: str) -> None:
        assert server.get("/v1/models", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1"])
    def test_a_page_of_another_origin_is_refused(self, server: RunningServer, origin: str) -> None:
        body = {"model": "tiny", "messages": user("hi"), "max_tokens": 1}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"origin": origin})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden_origin")

    def test_a_page_of_our_own_is_fine(self, server: RunningServer) -> None:
        assert server.get("/v1/models", headers={"origin": server.url}).status_code == 200

    def test_probes_of_a_load_balancer_are_fine(self, server: RunningServer) -> None:
        assert server.get("/healthz", headers={"host": "10.0.0.1:8000"}).status_code == 200


class TestWithKeys:
    @pytest.fixture
    def locked(self, make_server: Callable[..., RunningServer]) -> RunningServer:
        return make_server(keys=KEYS)

    @pytest.mark.parametrize("key", ["sesame", "second-key-é"])
    def test_each_key_opens(self, locked: RunningServer, key: str) -> None:
        # A header is bytes; OpenAI's client sends ASCII only.
        bearer = {"authorization": b"Bearer " + key.encode()}
        assert httpx.get(f"{locked.url}/v1/models", headers=bearer).status_code == 200  # type: ignore[arg-type]

    def test_a_wrong_key_is_refused(self, locked: RunningServer) -> None:
        with pytest.raises(openai.AuthenticationError) as caught:
            locked.client(key="wrong").chat.completions.create(model="tiny", messages=user("hi"))
        assert caught.value.code == "invalid_api_key"
        assert caught.value.response.headers["www-authenticate"] == "Bearer"
        assert "wrong" not in caught.value.message

    @pytest.mark.parametrize(
        "path", ["/v1/models", "/v1/adapters", "/v1/nothing", "/metrics", "/openapi.json"]
    )
    def test_without_a_key_nothing_is_told(self, locked: RunningServer, path: str) -> None:
        assert locked.get(path).status_code == 401

    @pytest.mark.parametrize("path", ["/healthz", "/readyz"])
    def test_probes_need_none(self, locked: RunningServer, path: str) -> None:
        assert locked.get(path).status_code == 200

    def test_a_browser_signs_in_with_a_key_as_its_password(self, locked: RunningServer) -> None:
        asked = locked.get("/openapi.json")
        assert asked.headers["www-authenticate"].startswith("Basic ")
        assert locked.get("/openapi.json", auth=("anyone", "sesame")).status_code == 200
        assert locked.get("/openapi.json", auth=("sesame", "wrong")).status_code == 401

    def test_a_password_does_not_open_the_api(self, locked: RunningServer) -> None:
        assert locked.get("/v1/models", auth=("anyone", "sesame")).status_code == 401

    def test_a_page_of_another_origin_cannot_use_a_browsers_password(self, locked: RunningServer) -> None:
        headers = {"origin": "https://evil.example"}
        assert locked.get("/metrics", auth=("anyone", "sesame"), headers=headers).status_code == 403

    @pytest.mark.parametrize(
        "value",
        ["Basic", "Basic !", "Basic " + base64.b64encode(b"\xff:\xff").decode(), "Bearer", "x"],
    )
    def test_a_header_that_is_none_is_refused(self, locked: RunningServer, value: str) -> None:
        for path in ("/metrics", "/v1/models"):
            assert locked.get(path, headers={"authorization": value}).status_code == 401

    def test_any_host_name_is_fine(self, locked: RunningServer) -> None:
        headers = {"host": "models.example.com", "authorization": "Bearer sesame"}
        assert locked.get("/v1/models", headers=headers).status_code == 200

    def test_the_log_names_the_principal_and_never_the_key(self, locked: RunningServer, caplog: Any) -> None:
        caplog.set_level("DEBUG")
        locked.client(key="sesame").chat.completions.create(model="tiny", messages=user("hi"), max_tokens=1)
        text = "\n".join(
            record.getMessage() for record in caplog.records if record.name.startswith("okavango")
        )
        assert "key-d0c04f4b: tiny" in text
        assert "sesame" not in text
