"""`okavango serve` as a process: it starts, says where, answers, and ends in good order."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from server_fixtures import Site, user
from tiny_fixtures import Bundles

LONG: dict[str, Any] = {"temperature": 0, "max_tokens": 450, "extra_body": {"ignore_eos": True}}


class Process:
    def __init__(self, site: Site, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "okavango.platform.cli", "serve", "--base", "tiny", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--dtype", "float32", "--kv-memory", "8MiB", *arguments],
            env={
                **os.environ,
                "OKAVANGO_HOME": str(site.settings.home),
                "OKAVANGO_CACHE": str(site.settings.cache),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.errors: list[str] = []
        threading.Thread(target=self._read_errors, daemon=True).start()
        self.banner = [self._line() for _ in range(4)]
        match = re.search(r"API +(http://\S+)/v1$", self.banner[1])
        assert match is not None, self.banner
        self.url = match[1]

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def end(self, signals: int = signal.SIGTERM) -> int:
        self.process.send_signal(signals)
        return self.process.wait(timeout=30)

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "".join(self.errors)
        return line.rstrip()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
        each.process.wait()


def test_it_answers_and_finishes_what_it_began(
    site: Site, tiny_bundles: Bundles, processes: list[Process]
) -> None:
    site.publish("emoji", tiny_bundles.folders["r4"])
    served = Process(site, "--log-level", "info")
    processes.append(served)
    assert served.banner[2].endswith("/studio")
    answer = served.client().chat.completions.create(model="emoji", messages=user("hi"), **LONG)
    assert answer.okavango["adapter"] == "emoji@1"  # type: ignore[attr-defined]
    assert httpx.get(f"{served.url}/readyz").json() == {"status": "ready"}
    home = httpx.get(served.url)
    assert (home.status_code, home.headers["location"]) == (307, "/studio")
    assert httpx.get(f"{served.url}/studio", follow_redirects=True).status_code == 200
    stream = served.client().chat.completions.create(model="emoji", messages=user("hi"), stream=True, **LONG)
    chunks = [next(stream)]
    served.process.send_signal(signal.SIGTERM)
    chunks += list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content
    assert served.process.wait(timeout=30) == 0
    log = "".join(served.errors)
    assert "Traceback" not in log
    assert "emoji@1 is ready" in log
    assert re.search(r"req_\w{32} POST /v1/chat/completions → 200 ", log)


def test_an_interrupt_is_as_good_a_way_to_end(site: Site, processes: list[Process]) -> None:
    served = Process(site)
    processes.append(served)
    assert served.end(signal.SIGINT) == 0
    assert "Traceback" not in "".join(served.errors)


def test_with_keys_it_may_be_reached_from_elsewhere(site: Site, processes: list[Process]) -> None:
    served = Process(site, "--host", "0.0.0.0", OKAVANGO_API_KEYS="sesame")
    processes.append(served)
    served.url = served.url.replace("0.0.0.0", "127.0.0.1")
    with pytest.raises(openai.AuthenticationError):
        served.client().models.list()
    assert [model.id for model in served.client("sesame").models.list()] == ["tiny"]
    for path in ("/studio", "/studio/config", "/"):
        assert httpx.get(served.url + path).status_code == 401
    signed_in = httpx.get(f"{served.url}/studio/", auth=("", "sesame"))
    assert signed_in.status_code == 200
    assert served.end() == 0
