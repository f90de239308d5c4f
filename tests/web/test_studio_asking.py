"""One question in progress, on the real server's services."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from server_fixtures import RunningServer

from okavango.modalities.tiny_bundle import picture_bytes
from okavango.serving.types import SamplingParams
from okavango.web.studio.asking import Asking
from okavango.web.studio.conversation import Turn

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def ask(server: RunningServer, model: str, turn: Turn, params: SamplingParams = GREEDY) -> list[Turn]:
    """All that a page would see."""

    async def collect() -> list[Turn]:
        async with aclosing(Asking(server.services, model, (turn,), params, "somebody").looks()) as looks:
            return [look async for look in looks]

    return asyncio.run(collect())


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    path.write_bytes(picture_bytes(21))
    return str(path)


def test_an_answer_says_what_made_it(server: RunningServer, picture: str) -> None:
    turn = ask(server, "r8", Turn("What is this?", (picture,)))[-1]
    made, version = turn.made_by, server.services.catalog.resolve("r8@1")
    assert made is not None
    assert turn.fault is None
    assert (made.model, made.digest) == (version.ref, version.digest)
    assert (made.completion_tokens, made.ending, made.notes) == (12, "length", ())
    assert (made.media, made.cached) == (1, 0)
    assert made.prompt_tokens is not None
    assert made.prompt_tokens > 12
    assert made.tokens_per_second is not None
    assert made.tokens_per_second > 0
    again = ask(server, "r16@1", Turn("What is this?", (picture,)))[-1].made_by
    assert again is not None
    assert again.cached == 1


def test_the_bare_base_is_blind_until_its_head_is_trained(server: RunningServer, picture: str) -> None:
    def notes(*pictures: str) -> Any:
        made = ask(server, "tiny", Turn("What is this?", pictures))[-1].made_by
        assert made is not None
        return made.notes

    assert "untrained" in notes(picture)[0]
    assert notes() == ()


@pytest.mark.parametrize(
    ("model", "turn", "said"),
    [
        ("r88", Turn("hello"), "The model 'r88' does not exist. Did you mean r8?"),
        ("", Turn("hello"), "names no adapter version"),
        ("r8", Turn("word " * 200), "Start a new conversation, or lower Max tokens."),
        ("r8", Turn("hello", ("/nowhere.png",)), "The file is no longer on the server"),
    ],
)
def test_what_cannot_be_answered_says_why(server: RunningServer, model: str, turn: Turn, said: str) -> None:
    last = ask(server, model, turn)[-1]
    assert said in (last.fault or "")
    assert (last.answer, last.made_by) == ("", None)


def test_what_nobody_foresaw_is_logged_and_told_without_details(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server.services.engine, "submit", lambda *_: 1 / 0)
    fault = ask(server, "r8", Turn("hello"))[-1].fault or ""
    assert "The server failed; its log tells why" in fault
    assert "ZeroDivisionError" in caplog.text
    assert "Zero" not in fault


def test_stopped_before_the_answer_began(server: RunningServer) -> None:
    async def stop_at_once() -> Turn:
        asking = Asking(server.services, "r8", (Turn("hello"),), GREEDY, "somebody")
        asking.stop()
        return [look async for look in asking.looks()][-1]

    turn = asyncio.run(stop_at_once())
    assert turn.fault == "Stopped before the answer began."
    assert turn.made_by is None


def test_who_looks_away_stops_the_answer(server: RunningServer) -> None:
    engine = server.services.engine
    long = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)

    async def look_once() -> None:
        async with aclosing(Asking(server.services, "r8", (Turn("go"),), long, "somebody").looks()) as looks:
            first = await anext(looks)
            assert first.answer
            assert engine.stats().running == 1
        # In this loop: its end would cancel whatever is left.
        async with asyncio.timeout(5):
            while engine.stats().kv_blocks_used:
                await asyncio.sleep(0.01)

    asyncio.run(look_once())
