"""`okavango serve`. Heavy imports stand inside functions (platform/cli.py says why)."""

from __future__ import annotations

import re
import socket
from typing import TYPE_CHECKING, Literal

import typer

from okavango.platform.errors import ConfigError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from okavango.web.services import Services

# What is left of connections once all calls are done: pages of the studio that listen for news.
CLOSING_SECONDS = 2
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def serve(
    base: str = typer.Option(..., help="The base: its name, or the folder that it lies in."),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; beyond this machine needs API keys."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port to listen on; 0 takes a free one."),
    dtype: str = typer.Option("auto", help="auto, bfloat16 or float32."),
    device: str = typer.Option("cpu", help="cpu, cuda or cuda:1."),
    slots: int = typer.Option(8, help="Adapters in one batch."),
    max_rank: int = typer.Option(64, help="The highest LoRA rank that is served."),
    max_sequences: int = typer.Option(32, help="Requests in one batch."),
    max_step_tokens: int = typer.Option(512, help="Tokens in one step; above --max-sequences."),
    max_waiting: int = typer.Option(256, help="Requests in the queue; one more is refused."),
    kv_memory: str = typer.Option("4GiB", help="Memory for keys and values."),
    kernels: Literal["native", "torch"] = typer.Option(
        "native", help="What computes steps on a CPU: kernels of ours, or torch alone."
    ),
    drain_seconds: float = typer.Option(30.0, min=0, help="Time for running requests when told to stop."),
    log_level: str = typer.Option("warning", help="debug, info, warning or error."),
) -> None:
    """Serve a base and its adapters over OpenAI's API, with the studio beside it."""
    from okavango.platform.config import load_settings
    from okavango.platform.telemetry import setup_logging
    from okavango.web.security import check_exposure

    setup_logging(log_level)
    settings = load_settings()
    check_exposure(host, settings.keys)
    # Before anything is loaded, which may take minutes.
    with bind(host, port) as listener:
        typer.echo(f"Loading base {base} …", err=True)
        from okavango.modalities.build import quiet_transformers
        from okavango.serving.engine import EngineOptions
        from okavango.web.app import build
        from okavango.web.services import ServeOptions

        engine = EngineOptions(
            dtype=dtype,
            device=device,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            max_waiting=max_waiting,
            kv_bytes=parse_bytes(kv_memory, "--kv-memory"),
            slots=slots,
            max_rank=max_rank,
            kernels=settings.cache / "kernels" if kernels == "native" else None,
        )
        options = ServeOptions(host, engine, drain_seconds=drain_seconds)
        # To the end: the verifier loads decoders of its own when versions come.
        with quiet_transformers():
            run(build(settings, base, options), listener)


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


def parse_bytes(text: str, where: str) -> int:
    """ "4GiB", "512M" or a number of bytes → bytes; units are powers of 1024.

    Raises:
        ConfigError: not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{text!r} is not a size", where=where, remedy="write 512MiB or 4GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])
