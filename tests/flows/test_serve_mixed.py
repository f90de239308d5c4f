"""Many callers at once, on several adapters and the base: as if each were alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from server_fixtures import RunningServer, Site, user, wait_until
from tiny_fixtures import Bundles

from okavango.modalities.tiny_bundle import picture_bytes

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
QUESTIONS: list[tuple[str, list[dict[str, Any]]]] = [
    ("tiny", user("hello")),
    ("r4", user("hello")),
    ("r8", user("what is this?", picture_bytes(1))),
    ("r16", user("what is this?", picture_bytes(1))),
    ("tiny", user("what is this?", picture_bytes(2))),
    ("r4@1", user("compare", picture_bytes(1), picture_bytes(2))),
    ("r8", user("a rather longer question, that takes several chunks of the prompt to compute " * 2)),
    ("r16", user("a")),
]


def test_eight_at_once_answer_as_one_by_one(client: openai.OpenAI, server: RunningServer) -> None:
    def ask(question: tuple[str, list[dict[str, Any]]]) -> str | None:
        model, messages = question
        answer = client.chat.completions.create(model=model, messages=messages, **GREEDY)
        return answer.choices[0].message.content

    alone = [ask(question) for question in QUESTIONS]
    assert len(set(alone)) == len(alone)
    before = {
        size: server.metric(f'okavango_batch_sequences_bucket{{le="{size}"}}') for size in ("4.0", "+Inf")
    }
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        together = list(pool.map(ask, QUESTIONS))
    assert together == alone
    after = {size: server.metric(f'okavango_batch_sequences_bucket{{le="{size}"}}') for size in before}
    steps = after["+Inf"] - before["+Inf"]
    assert after["4.0"] - before["4.0"] < steps, "no step had more than four sequences: nothing was mixed"


def test_half_of_them_streamed(client: openai.OpenAI) -> None:
    def ask(i: int) -> str:
        model, messages = QUESTIONS[i]
        asked: dict[str, Any] = {"model": model, "messages": messages, **GREEDY}
        if i % 2:
            return client.chat.completions.create(**asked).choices[0].message.content or ""
        chunks = client.chat.completions.create(**asked, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    alone = [ask(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone


def test_more_adapters_than_slots_take_turns(
    make_server: Callable[..., RunningServer], site: Site, tiny_bundles: Bundles, client: openai.OpenAI
) -> None:
    """With one slot, every change of adapter evicts one; the answers are those of the server with room."""
    for name, folder in tiny_bundles.folders.items():
        site.publish(name, folder)
    crowded = make_server(engine={"slots": 1}).client()

    def ask(client: openai.OpenAI, i: int) -> str | None:
        model, messages = QUESTIONS[i]
        return (
            client.chat.completions.create(model=model, messages=messages, **GREEDY)
            .choices[0]
            .message.content
        )

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: ask(crowded, i), range(8)))
    assert found == [ask(client, i) for i in range(8)]


def test_text_alone_loads_no_encoder(
    make_server: Callable[..., RunningServer], site: Site, tiny_bundles: Bundles
) -> None:
    site.publish("r4", tiny_bundles.folders["r4"])
    server = make_server()
    client = server.client()
    wait_until(lambda: not server.services.catalog.versions("registered"))
    loaded, runs = (
        'okavango_encoder_loaded{modality="image"}',
        'okavango_encoder_runs_total{modality="image"}',
    )
    for model in ("tiny", "r4"):
        client.chat.completions.create(model=model, messages=user("hello"), max_tokens=2)
    assert (server.metric(loaded), server.metric(runs)) == (0, 0)
    assert server.services.engine.stats().encoders_loaded == ()
    client.chat.completions.create(model="r4", messages=user("this?", picture_bytes(5)), max_tokens=2)
    client.chat.completions.create(model="tiny", messages=user("this?", picture_bytes(5)), max_tokens=2)
    assert (server.metric(loaded), server.metric(runs)) == (1, 1)
