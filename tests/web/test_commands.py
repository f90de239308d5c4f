"""`okavango serve`: its options and what it says when it cannot start."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
import torch
from server_fixtures import RunningServer, Site
from tiny_fixtures import Bundles
from typer.testing import CliRunner, Result

from okavango.modalities.base import find_base
from okavango.platform.cli import app
from okavango.platform.errors import ConfigError
from okavango.serving.engine import EngineOptions
from okavango.web import commands
from okavango.web.commands import address_of, banner, bind, parse_bytes, parse_weights
from okavango.web.security import Keys

Run = Callable[..., Result]


@pytest.fixture
def run(site, monkeypatch: pytest.MonkeyPatch) -> Run:  # type: ignore[no-untyped-def]
    """run("--port", "1"): the command over a home with the tiny base."""
    monkeypatch.setenv("OKAVANGO_HOME", str(site.settings.home))
    monkeypatch.setenv("OKAVANGO_CACHE", str(site.settings.cache))
    return lambda *arguments: CliRunner().invoke(app, ["serve", *arguments])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1024", 1024),
        ("512M", 512 << 20),
        ("4GiB", 4 << 30),
        ("1.5 gib", 3 << 29),
        ("2TB", 2 << 40),
    ],
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert parse_bytes(text, "--kv-memory") == size


@pytest.mark.parametrize("text", ["", "four", "-1", "4 XB", "GiB", "4GiB!"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--kv-memory: .* is not a size"):
        parse_bytes(text, "--kv-memory")


def test_a_port_that_is_taken(run: Run) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        result = run("--base", "tiny", "--port", port)
    assert result.exit_code == 1
    assert f"error: 127.0.0.1:{port}: cannot listen there" in result.stderr
    assert "choose another --port" in result.stderr


def test_a_host_that_is_none(run: Run) -> None:
    result = run("--base", "tiny", "--host", "nowhere.invalid")
    assert result.exit_code == 1
    assert "OKAVANGO_API_KEYS" in result.stderr
    with pytest.raises(ConfigError, match=r"--host nowhere\.invalid: is no address"):
        bind("nowhere.invalid", 0)


def test_beyond_this_machine_only_with_keys(run: Run) -> None:
    result = run("--base", "tiny", "--host", "0.0.0.0")
    assert result.exit_code == 1
    assert "without API keys the server listens on this machine only, not on 0.0.0.0" in result.stderr


def test_a_base_that_is_not_there(run: Run) -> None:
    result = run("--base", "tinny", "--port", "0")
    assert result.exit_code == 1
    assert "no base is called 'tinny'; known: tiny" in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--dtype", "float8", "is not one of auto"),
        ("--kv-memory", "lots", "is not a size"),
        ("--parking-memory", "much", "--parking-memory: 'much' is not a size"),
        ("--adapter-memory", "more", "--adapter-memory: 'more' is not a size"),
        ("--draft-base", "tinny", "no base is called 'tinny'; known: tiny"),
        ("--draft-kv-memory", "some", "--draft-kv-memory: 'some' is not a size"),
        ("--max-prefill-tokens", "0", "max_prefill_tokens: must be at least 1"),
        ("--threads", "0", "threads: must be at least 1"),
        ("--weight", "local=2", "--weight local: no API key has that name (set OKAVANGO_API_KEYS)"),
        ("--slots", "0", "slots: must be at least 1"),
        ("--log-level", "loud", "no such log level"),
        ("--device", "gpu", "is not one of cpu, cuda"),
        ("--pin", "nobody", "--pin nobody: the model 'nobody' does not exist"),
        ("--device", "cuda:99", "device cuda:99: "),
        ("--max-step-tokens", "32", "must be above max_sequences"),
    ],
)
def test_an_option_that_is_wrong(run: Run, option: str, value: str, said: str) -> None:
    result = run("--base", "tiny", "--port", "0", option, value)
    assert result.exit_code == 1
    assert said in result.stderr


def test_options_reach_the_engine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[EngineOptions] = []
    monkeypatch.setenv("OKAVANGO_API_KEYS", "sesame")
    monkeypatch.setattr(commands, "run", lambda app, _: made.append(app.state.services.options.engine))
    options = "--port 0 --kv-memory 8MiB --max-prefill-tokens 48 --parking-memory 1MiB --adapter-memory 3MiB"
    few = f"{options} --weight key-d0c04f4b=2 --share-prefixes --threads {torch.get_num_threads()}"
    result = run("--base", "tiny", *few.split())
    assert result.exit_code == 0, result.stderr
    [engine] = made
    assert (engine.kv_bytes, engine.max_prefill_tokens) == (8 << 20, 48)
    assert (engine.parking_bytes, engine.host_cache_bytes) == (1 << 20, 3 << 20)
    assert (engine.weights, engine.share_prefixes) == ((("key-d0c04f4b", 2.0),), True)
    assert engine.threads == torch.get_num_threads()


def test_a_draft_base_is_found_by_its_name(run: Run, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[EngineOptions] = []
    monkeypatch.setattr(commands, "run", lambda app, _: made.append(app.state.services.options.engine))
    options = "--port 0 --kv-memory 8MiB --draft-base tiny --draft-kv-memory 2MiB"
    result = run("--base", "tiny", *options.split())
    assert result.exit_code == 0, result.stderr
    [engine] = made
    assert (engine.draft, engine.draft_kv_bytes) == (find_base("tiny", site.settings.bases), 2 << 20)


def test_options_begin_as_the_engines_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[EngineOptions] = []
    monkeypatch.setattr(commands, "run", lambda app, _: made.append(app.state.services.options.engine))
    assert run("--base", "tiny", "--port", "0", "--kernels", "torch").exit_code == 0
    assert made == [EngineOptions()]


def test_weights_go_by_the_names_of_keys() -> None:
    callers = Keys(["sesame", "poppy"]).principals
    assert parse_weights([], callers) == ()
    assert parse_weights(["key-d0c04f4b=2", f"{callers[1]}=.5"], callers) == (
        ("key-d0c04f4b", 2.0),
        (callers[1], 0.5),
    )


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["key-d0c04f4b"], "'key-d0c04f4b' is no caller with a weight"),
        (["key-d0c04f4b=many"], "write key-8ed3f6ad=2"),
        (["sesame=2"], "no API key has that name .known are key-d0c04f4b"),
        (["key-d0c04f4b=2", "key-d0c04f4b=3"], "--weight key-d0c04f4b: is given twice"),
    ],
)
def test_what_is_no_weight(texts: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_weights(texts, Keys(["sesame"]).principals)


def test_an_address_of_the_newer_kind_has_brackets() -> None:
    try:
        listener = bind("::1", 0)
    except ConfigError:
        assert not socket.has_dualstack_ipv6()
        return
    with listener:
        assert address_of(listener) == f"http://[::1]:{listener.getsockname()[1]}"


def test_the_banner_says_where_and_what(server: RunningServer) -> None:
    lines = banner(server.services, "http://localhost:8000").splitlines()
    assert lines[0].startswith("Okavango serves tiny (")
    assert lines[1:] == [
        "  API       http://localhost:8000/v1",
        "  Studio    http://localhost:8000/studio",
        "  Adapters  r16, r4, r8",
    ]


def test_the_banner_says_how_many_versions_are_being_checked(
    make_server: Callable[..., RunningServer], site: Site, tiny_bundles: Bundles
) -> None:
    server = make_server()
    server.services.verifier.stop()
    assert banner(server.services, "").endswith("none yet: okavango train makes one")
    site.publish("emoji", tiny_bundles.folders["r4"])
    assert banner(server.services, "").endswith("  Adapters  1 version being checked")
    site.publish("words", tiny_bundles.folders["r8"])
    assert banner(server.services, "").endswith("  Adapters  2 versions being checked")
