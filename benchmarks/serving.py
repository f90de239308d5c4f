"""Load any OpenAI-compatible server, and measure it from outside.

    python benchmarks/serving.py --url http://127.0.0.1:8000 --model starter
    python benchmarks/serving.py --url … --model a --model b --requests 64 --rate 4
    python benchmarks/serving.py --url … --model starter --concurrency 1     the rate of a single stream
    python benchmarks/serving.py --url … --model 'base {"lora": [{"id": 0, "scale": 1}]}'

Requests are spread over the models. Either so many are under way at any time (--concurrency), or they arrive
at random, so many a second (--rate). Ends with 1 if a request failed,
or --check found a model that answers as another. docs/benchmarks.md tells more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from asking import Form, Model, closed, opened, parse_object
from client import Client, Reply, ReplyError
from machine import describe
from mixing import Mixing
from rich.console import Console
from rich.table import Table
from timing import Figures, Spread, Trace, by_model
from workload import Prompts, poisson, spread

CHECK_LENGTH = 16
EXTRAS_HELP = "send ignore_eos and min_tokens, so that answers are as long as asked for"


def main() -> int:
    options = parse_options()
    # Drawn unless given: a server that keeps prefixes knows the prompts of the seed before.
    options.seed = options.seed or secrets.token_hex(4)
    try:
        replies, mixing = asyncio.run(load(options))
    except ReplyError as error:
        print(error, file=sys.stderr)
        return 1
    traces = [reply.trace() for reply in replies]
    report(options, traces, mixing)
    failed = any(trace.error is not None for trace in traces)
    return 1 if failed or (mixing is not None and mixing.mistaken) else 0


async def load(options: argparse.Namespace) -> tuple[list[Reply], Mixing | None]:
    """The measured requests, after the warming ones and, if asked for, the check."""
    form, models = form_of(options), [Model.parse(each) for each in dict.fromkeys(options.model)]
    prompts = Prompts(options.seed, options.prompt, options.shared)
    warming = Prompts(f"{options.seed}/warming", options.prompt)
    asked = spread(options.seed, options.requests, models, options.skew)
    calls = [form.call(model, prompts, number) for number, model in enumerate(asked)]
    async with Client(options.url, options.key, options.timeout) as client:
        first = [form.call(each, warming, i) for i, each in enumerate(models * options.warming)]
        await closed(client, first, 1)
        mixing = await check(client, form, models, options.seed) if options.check else None
        if options.rate is None:
            return await closed(client, calls, options.concurrency), mixing
        return await opened(client, calls, poisson(options.seed, len(calls), options.rate)), mixing


async def check(client: Client, form: Form, models: Sequence[Model], seed: str) -> Mixing:
    """Ask every model the same, one by one and then all at once.

    Raises:
        ReplyError: one of them did not answer.
    """
    calls = [form.call(model, Prompts(f"{seed}/check", CHECK_LENGTH), 0) for model in models]
    alone = await closed(client, calls, 1)
    mixed = await closed(client, calls, len(calls))
    return Mixing.of(*({reply.call.model: reply.text for reply in replies} for replies in (alone, mixed)))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--url", required=True, help="the server; /v1 is added where it names no path")
    add("--model", required=True, action="append", help='NAME or NAME {"key": …}; repeat to spread requests')
    add(
        "--skew",
        type=float,
        help="ask at random, the k-th model with weight k^-SKEW (default: in turn)",
    )
    add("--requests", type=at_least(1), default=64)
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--concurrency", type=at_least(1), default=16, help="requests under way (default: 16)")
    pace.add_argument("--rate", type=float, help="requests a second, arriving at random (Poisson)")
    add("--prompt", type=at_least(1), default=128, help="tokens or words of a prompt (default: 128)")
    add("--shared", type=at_least(0), default=0, help="of which so many are the same in all prompts")
    add("--answer", type=at_least(1), default=64, help="tokens of an answer (default: 64)")
    add("--endpoint", choices=("completions", "chat"), default="completions")
    add("--tokens", choices=("ids", "text"), help="form of a prompt (default: ids; text for chat)")
    add("--vocabulary", type=at_least(1), default=32000, help="ids are below (default: 32000)")
    add("--stream", action=argparse.BooleanOptionalAction, default=True)
    add("--usage", action=argparse.BooleanOptionalAction, default=True, help="ask streams for token counts")
    add("--extras", action=argparse.BooleanOptionalAction, default=True, help=EXTRAS_HELP)
    add("--body", type=parse_object, default={}, help="JSON object: more keys for every request")
    add("--check", action="store_true", help="first see that models answer among others as they do alone")
    add("--warming", type=at_least(0), default=1, help="unmeasured requests to each model first (default: 1)")
    add("--seed", help="of prompts, arrivals and spread; drawn and reported by default")
    add("--key", help="API key")
    add("--timeout", type=float, default=600.0, help="seconds without a byte (default: 600)")
    add("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    if options.endpoint == "chat" and options.tokens == "ids":
        parser.error("--endpoint chat takes text: drop --tokens ids")
    if options.rate is not None and options.rate <= 0:
        parser.error("--rate must be above 0")
    return options


def at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return int(text)

    return parse


def form_of(options: argparse.Namespace) -> Form:
    body: dict[str, Any] = {"ignore_eos": True, "min_tokens": options.answer} if options.extras else {}
    if options.stream and options.usage:
        body["stream_options"] = {"include_usage": True}
    return Form(
        endpoint=options.endpoint,
        tokens=options.tokens or ("text" if options.endpoint == "chat" else "ids"),
        answer=options.answer,
        stream=options.stream,
        vocabulary=options.vocabulary,
        body=body | options.body,
    )


def report(options: argparse.Namespace, traces: Sequence[Trace], mixing: Mixing | None) -> None:
    figures = Figures.of(traces)
    table = table_of(options, figures)
    if mixing is not None:
        add_mixing(table, mixing)
    Console().print(table)
    if options.out is not None:
        asked = {name: value for name, value in vars(options).items() if name not in {"out", "key"}}
        models = {model: asdict(each) for model, each in by_model(traces).items()}
        checked = asdict(mixing) if mixing is not None else None
        found = {"options": asked, "figures": asdict(figures), "models": models, "check": checked}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**describe(["httpx"]), **found}, indent=2) + "\n")


def table_of(options: argparse.Namespace, figures: Figures) -> Table:
    pace = f"{options.rate:g} a second" if options.rate else f"{options.concurrency} at once"
    title = (
        f"{figures.requests} requests, {pace}, {options.prompt} in, {options.answer} out, seed {options.seed}"
    )
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("output tokens/s", f"{figures.output_rate:.1f}")
    table.add_row("answers/s", f"{figures.request_rate:.2f}")
    table.add_row("tokens in, out", f"{figures.prompt_tokens}, {figures.output_tokens}")
    table.add_row("time to first token, ms (p50, p95, p99)", milliseconds(figures.first))
    table.add_row("between tokens, ms (p50, p95, p99)", milliseconds(figures.gap))
    table.add_row("whole answer, ms (p50, p95, p99)", milliseconds(figures.whole))
    if figures.decode_rate is not None:
        table.add_row("tokens/s of one stream after its first (median)", f"{figures.decode_rate:.1f}")
    if figures.short:
        table.add_row("[yellow]answers shorter than asked for", f"[yellow]{figures.short}")
    for message, count in figures.errors.items():
        table.add_row(f"[red]{message}", f"[red]{count} failed")
    return table


def add_mixing(table: Table, mixing: Mixing) -> None:
    alike = mixing.alike.values()
    table.add_row("alone and among others alike (mean, least)", f"{mean(alike):.0%}, {min(alike):.0%}")
    for model, other in mixing.mistaken.items():
        table.add_row(f"[red]among others {model} answers as", f"[red]{other}")
    for model, other in mixing.twins.items():
        table.add_row(f"[yellow]alone {model} answers as", f"[yellow]{other}")


def milliseconds(spread_: Spread | None) -> str:
    if spread_ is None:
        return "–"
    return ", ".join(f"{seconds * 1000:.1f}" for seconds in (spread_.p50, spread_.p95, spread_.p99))


if __name__ == "__main__":
    sys.exit(main())
