"""`okavango serve`. Heavy imports stand inside functions (platform/cli.py says why)."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import typer

from okavango.platform.errors import ConfigError
from okavango.platform.sizes import parse_bytes

if TYPE_CHECKING:
    from fastapi import FastAPI

    from okavango.training.service import WorkerOptions
    from okavango.web.services import Services

# What is left of connections once all calls are done: pages of the studio that listen for news.
CLOSING_SECONDS = 2


def serve(
    base: str = typer.Option(..., help="The base: its name, or the folder that it lies in."),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; beyond this machine needs API keys."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port to listen on; 0 takes a free one."),
    dtype: str = typer.Option("auto", help="auto, bfloat16 or float32."),
    device: str = typer.Option("cpu", help="cpu, cuda or cuda:1."),
    kernels: Literal["native", "torch"] = typer.Option(
        "native", help="What computes steps: kernels of ours where they can, or torch alone."
    ),
    quantization: Literal["int8"] | None = typer.Option(
        None, help="int8: the decoder's weights in eight bits, on the native kernels: less memory, faster."
    ),
    threads: int | None = typer.Option(None, help="Threads that compute; one a core by default."),
    slots: int = typer.Option(8, help="Adapters in one batch."),
    pin: list[str] = typer.Option(
        [], metavar="ADAPTER", help="An adapter that always has a slot, as emoji@production. Repeatable."
    ),
    max_rank: int = typer.Option(64, help="The highest LoRA rank that is served."),
    max_sequences: int = typer.Option(32, help="Requests in one batch."),
    max_step_tokens: int = typer.Option(512, help="Tokens in one step; above --max-sequences."),
    max_prefill_tokens: int = typer.Option(256, help="Of these, prompts' while answers are being generated."),
    draft_rows: int = typer.Option(
        16, min=0, help="Fill a step of few rows with guessed tokens up to so many; 0 guesses none."
    ),
    draft_base: str | None = typer.Option(
        None, help="A smaller base of the same vocabulary that guesses, too: its name or folder."
    ),
    draft_kv_memory: str = typer.Option("1GiB", help="Memory for the draft base's keys and values."),
    max_waiting: int = typer.Option(256, help="Requests in the queue; one more is refused."),
    kv_memory: str = typer.Option("4GiB", help="Memory for keys and values."),
    parking_memory: str = typer.Option("0", help="Host memory for keys and values of preempted requests."),
    adapter_memory: str = typer.Option("2GiB", help="Host memory for adapters."),
    feature_memory: str = typer.Option("256MiB", help="Memory for what encoders made of media."),
    memory: str | None = typer.Option(
        None, help="For keys and values, adapters, encoders and features together; no limit if not set."
    ),
    preload: list[str] = typer.Option(
        [], metavar="MODALITY", help="Load the image or audio encoder at the start, and keep it. Repeatable."
    ),
    disable: list[str] = typer.Option([], metavar="MODALITY", help="Refuse such media. Repeatable."),
    encoder_idle_seconds: float | None = typer.Option(
        None, min=0, help="Unload an encoder that nobody needed for so long; kept if not set."
    ),
    weight: list[str] = typer.Option(
        [], metavar="CALLER=2.0", help="An API key's share; 1 else. Repeatable."
    ),
    share_prefixes: bool = typer.Option(
        False, "--share-prefixes", help="API keys share computed prompts, and can find out each other's."
    ),
    worker: bool = typer.Option(True, "--worker/--no-worker", help="Do queued training jobs, too."),
    worker_threads: int | None = typer.Option(
        None, min=1, help="Threads of a training job; half of the cores if not set."
    ),
    worker_memory: str | None = typer.Option(None, help="Most that a training job may take, as 8GiB."),
    jobs_per_caller: int = typer.Option(20, min=1, help="Training jobs of an API key that have not ended."),
    upload_size: str = typer.Option("2GiB", help="The largest file that is taken."),
    file_quota: str = typer.Option("20GiB", help="All files of an API key together."),
    drain_seconds: float = typer.Option(30.0, min=0, help="Time for running requests when told to stop."),
    log_level: str = typer.Option("warning", help="debug, info, warning or error."),
) -> None:
    """Serve a base and its adapters over OpenAI's API, with the studio beside it."""
    from okavango.platform.config import load_settings
    from okavango.platform.telemetry import setup_logging
    from okavango.web.security import Keys, check_exposure

    setup_logging(log_level)
    settings = load_settings()
    check_exposure(host, settings.keys)
    weights = parse_weights(weight, Keys(settings.keys).principals)
    # Before anything is loaded, which may take minutes.
    with bind(host, port) as listener:
        typer.echo(f"Loading base {base} …", err=True)
        from okavango.modalities.base import find_base
        from okavango.modalities.build import quiet_transformers
        from okavango.serving.engine import EngineOptions
        from okavango.web.app import build
        from okavango.web.services import ServeOptions

        engine = EngineOptions(
            dtype=dtype,
            device=device,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            max_prefill_tokens=max_prefill_tokens,
            draft_rows=draft_rows,
            draft=find_base(draft_base, settings.bases) if draft_base else None,
            draft_kv_bytes=parse_bytes(draft_kv_memory, "--draft-kv-memory"),
            share_prefixes=share_prefixes,
            weights=weights,
            max_waiting=max_waiting,
            kv_bytes=parse_bytes(kv_memory, "--kv-memory"),
            parking_bytes=parse_bytes(parking_memory, "--parking-memory"),
            slots=slots,
            max_rank=max_rank,
            host_cache_bytes=parse_bytes(adapter_memory, "--adapter-memory"),
            feature_cache_bytes=parse_bytes(feature_memory, "--feature-memory"),
            preload=tuple(preload),
            disabled=tuple(disable),
            encoder_idle_seconds=encoder_idle_seconds,
            memory_bytes=parse_bytes(memory, "--memory") if memory else None,
            kernels=settings.cache / "kernels" if kernels == "native" else None,
            quantization=quantization,
            threads=threads,
        )
        options = ServeOptions(
            host,
            engine,
            drain_seconds=drain_seconds,
            pins=tuple(pin),
            upload_bytes=parse_bytes(upload_size, "--upload-size"),
            file_quota_bytes=parse_bytes(file_quota, "--file-quota"),
            most_open_jobs=jobs_per_caller,
            worker=worker_options(worker_threads, worker_memory) if worker else None,
        )
        # To the end: the verifier loads decoders of its own when versions come.
        with quiet_transformers():
            run(build(settings, base, options), listener)


def worker_options(threads: int | None, memory: str | None) -> WorkerOptions:
    """Of the server's own worker: after all others where cores are short, on half of them at most."""
    from okavango.training.service import WorkerOptions

    return WorkerOptions(
        threads=threads or max(1, (os.cpu_count() or 1) // 2),
        memory_bytes=parse_bytes(memory, "--worker-memory") if memory else None,
        niceness=19,
    )


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve until told to stop; see web.draining."""
    import uvicorn

    from okavango.web.draining import DrainingServer

    services: Services = app.state.services
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    DrainingServer(
        config,
        services.gate,
        is_idle=services.is_idle,
        cut=services.engine.stop,
        drain_seconds=services.options.drain_seconds,
        started=lambda: typer.echo(banner(services, address_of(listener))),
    ).run(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to that address; nobody is answered yet.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"is no address: {error.strerror or error}", where=f"--host {host}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen there: {error.strerror or error}",
            where=f"{host}:{port}",
            remedy="choose another --port (0 takes a free one), or stop what listens there",
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL that a socket answers at."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def banner(services: Services, address: str) -> str:
    """What a person wants to know at once."""
    return "\n".join(
        [
            f"Okavango serves {services.base.name} ({services.base.digest[:12]})",
            f"  API       {address}/v1",
            f"  Studio    {address}/studio",
            f"  Adapters  {_adapters(services)}",
        ]
    )


def _adapters(services: Services) -> str:
    names = [model.id for model in services.models.listed() if model.version and "@" not in model.id]
    said = [", ".join(names[:5]) + (f", … ({len(names)} in all)" if len(names) > 5 else "")] if names else []
    checked = services.verifier.num_untried()
    if checked:
        said.append(f"{checked} version{'s' if checked > 1 else ''} being checked")
    return "; ".join(said) or "none yet: okavango train makes one"


def parse_weights(texts: Sequence[str], callers: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """["key-8ed3f6ad=2"] → (("key-8ed3f6ad", 2.0),); whether a number is a weight, the engine knows.

    Raises:
        ConfigError: not of that form, a caller who has no key here, or one twice.
    """
    weights: dict[str, float] = {}
    for text in texts:
        caller, weight = _parse_weight(text)
        if caller not in callers:
            known = f"known are {', '.join(callers)}" if callers else "set OKAVANGO_API_KEYS"
            raise ConfigError("no API key has that name", where=f"--weight {caller}", remedy=known)
        if caller in weights:
            raise ConfigError("is given twice", where=f"--weight {caller}")
        weights[caller] = weight
    return tuple(weights.items())


def _parse_weight(text: str) -> tuple[str, float]:
    caller, _, number = text.partition("=")
    try:
        return caller, float(number)
    except ValueError:
        raise ConfigError(
            f"{text!r} is no caller with a weight", where="--weight", remedy="write key-8ed3f6ad=2"
        ) from None
