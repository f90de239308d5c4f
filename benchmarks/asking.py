"""Whom to ask what, and when: requests that are alike, one after the other or as they come."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from client import Call, Client, Reply
from workload import Prompts


@dataclass(frozen=True)
class Model:
    """Whom to ask.

    Attributes:
        label: as the caller gave it.
        body: keys that its requests carry, for servers that choose adapters otherwise.
    """

    label: str
    name: str
    body: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Model:
        """NAME, or NAME {JSON}."""
        name, _, body = text.partition(" ")
        return cls(text, name, parse_object(body) if body.strip() else {})


@dataclass(frozen=True)
class Form:
    """What is the same in all requests."""

    endpoint: str
    tokens: str
    answer: int
    stream: bool
    vocabulary: int
    body: dict[str, Any]

    def call(self, model: Model, prompts: Prompts, number: int) -> Call:
        prompt: Any = prompts.text(number)
        if self.tokens == "ids":
            prompt = prompts.ids(number, self.vocabulary)
        chat = self.endpoint == "chat"
        question = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        body = {"model": model.name, **question, "max_tokens": self.answer, "temperature": 0, **self.body}
        body |= {"stream": True} if self.stream else {}
        path = "chat/completions" if chat else "completions"
        return Call(model.label, path, json.dumps(body | model.body).encode(), self.answer)


async def closed(client: Client, calls: Iterable[Call], concurrency: int) -> list[Reply]:
    """So many requests are under way at any time."""
    queue = iter(calls)

    async def work() -> list[Reply]:
        return [await client.ask(call) for call in queue]

    found = await asyncio.gather(*(work() for _ in range(concurrency)))
    return [reply for replies in found for reply in replies]


async def opened(client: Client, calls: Iterable[Call], arrivals: Iterable[float]) -> list[Reply]:
    """Requests come when they come, however many are under way."""
    began = time.perf_counter()

    async def ask(call: Call, arrival: float) -> Reply:
        await asyncio.sleep(max(0.0, began + arrival - time.perf_counter()))
        return await client.ask(call)

    return await asyncio.gather(*(ask(*each) for each in zip(calls, arrivals, strict=True)))


def parse_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {text}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text}")
    return found
