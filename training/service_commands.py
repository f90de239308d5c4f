"""`okavango worker` and `okavango jobs`. Heavy imports stand inside functions (platform/cli.py says why)."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from okavango.platform.config import load_settings

if TYPE_CHECKING:
    from okavango.platform.catalog.records import JobEventRecord, JobRecord
    from okavango.platform.catalog.store import Catalog

jobs = typer.Typer(no_args_is_help=True, help="Training jobs: list, look at, pause, resume, cancel.")
_AS_JSON = typer.Option(False, "--json", help="Print JSON, for programs.")
_JOB = typer.Argument(help="A job's id, as `okavango jobs list` shows it.")


def worker(
    jobs: int = typer.Option(1, min=1, help="Jobs at a time."),
    threads: int | None = typer.Option(None, min=1, help="Of each job; the cores are shared if not set."),
    job_memory: str | None = typer.Option(None, help="Most that a job may take, as 8GiB; no limit else."),
    per_caller: int | None = typer.Option(
        None, min=1, help="Jobs of one API key at a time, over all workers; no limit if not set."
    ),
    nice: int = typer.Option(0, min=0, max=19, help="Leave cores to others: 19 is after everybody else."),
    until_idle: bool = typer.Option(False, "--until-idle", help="End when the queue is empty."),
    log_level: str = typer.Option("info", help="debug, info, warning or error."),
) -> None:
    """Work on queued jobs. Any number of workers, on any hosts, may share one catalog and artifact store."""
    from okavango.platform.sizes import parse_bytes
    from okavango.platform.telemetry import setup_logging
    from okavango.training.service import Worker, WorkerOptions

    setup_logging(log_level)
    options = WorkerOptions(
        jobs=jobs,
        threads=threads,
        memory_bytes=parse_bytes(job_memory, "--job-memory") if job_memory else None,
        most_running=per_caller,
        niceness=nice,
    )
    working = Worker(load_settings(), options)

    def stop(_: int, __: FrameType | None) -> None:
        typer.echo("Stopping: jobs write a checkpoint, and go back to the queue.", err=True)
        working.ask_to_stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    working.run(until_idle=until_idle)


@jobs.command("list")
def list_jobs(
    state: str | None = typer.Option(
        None, help="Only queued, running, paused, succeeded, failed or cancelled."
    ),
    limit: int = typer.Option(50, min=1, help="The newest so many."),
    as_json: bool = _AS_JSON,
) -> None:
    """Jobs, newest first."""
    found = _catalog().list_jobs(state, limit=limit)
    if as_json:
        _print_json([asdict(job) for job in found])
    elif not found:
        typer.echo("There is no such job: `okavango train` makes one.")
    for job in () if as_json else found:
        typer.echo(_line(job))


@jobs.command()
def show(
    job_id: str = _JOB,
    events: int = typer.Option(20, min=0, help="The newest so many events."),
    as_json: bool = _AS_JSON,
) -> None:
    """One job, and what happened to it."""
    catalog = _catalog()
    job = catalog.get_job(job_id)
    found = catalog.list_events(job_id, newest_first=True, limit=events)[::-1] if events else ()
    if as_json:
        _print_json({**asdict(job), "events": [asdict(event) for event in found]})
        return
    typer.echo(_line(job))
    if job.error:
        typer.echo(job.error)
    for event in found:
        typer.echo(_event_line(event))


@jobs.command()
def cancel(job_id: str = _JOB) -> None:
    """End a job; nothing of it is kept."""
    typer.echo(_line(_catalog().request_cancel(job_id)))


@jobs.command()
def pause(job_id: str = _JOB) -> None:
    """Set a job aside with a checkpoint."""
    typer.echo(_line(_catalog().request_pause(job_id)))


@jobs.command()
def resume(job_id: str = _JOB) -> None:
    """Queue a paused job again, to go on from its checkpoint."""
    typer.echo(_line(_catalog().resume_job(job_id)))


def _catalog() -> Catalog:
    from okavango.platform.catalog.store import open_catalog

    return open_catalog(load_settings())


def _line(job: JobRecord) -> str:
    asked = "cancelling" if job.cancel_requested else "pausing" if job.pause_requested else None
    state = asked if asked and job.state == "running" else job.state
    parts = [job.id, f"{state:<10}", job.name]
    if job.state == "running" and job.progress:
        parts.append("{phase} {done}/{total}".format_map(job.progress))
    if job.result:
        parts.append(f"→ {job.result['adapter']}")
    return "  ".join([*parts, f"({job.created_at:%Y-%m-%d %H:%M} UTC)"])


def _event_line(event: JobEventRecord) -> str:
    data = event.data or {}
    shown = "  ".join(f"{name} {value:.4g}" for name, value in data.items() if isinstance(value, float))
    return f"{event.created_at:%H:%M:%S}  {event.message}  {shown}".rstrip()


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=_time))


def _time(value: Any) -> str:
    assert isinstance(value, datetime)
    return value.isoformat()
