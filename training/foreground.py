"""What `okavango train` does: one job, submitted and worked on in the foreground."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from okavango.platform.artifacts import ArtifactStore
from okavango.platform.catalog.store import Catalog, open_catalog
from okavango.platform.cli import INTERRUPTED
from okavango.platform.config import Settings
from okavango.platform.errors import ConfigError
from okavango.training.evaluate import sample_table
from okavango.training.monitor import Monitor, Reason, Stopped
from okavango.training.run import Outcome
from okavango.training.spec import parse_spec, read_toml
from okavango.training.worker import run_job, submit

_SCORES = {
    "loss": "loss",
    "bleu4": "BLEU-4",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "exact_match": "exact match",
    "wer": "word error rate",
    "retrieval_r1_text": "R@1 of texts",
    "retrieval_r1_media": "R@1 of media",
}


def start(settings: Settings, config: Path | None, flags: Mapping[str, Any], resume: str | None) -> int:
    """Submit a job, or take up an earlier one, do it, and show what comes of it; the exit code.

    Args:
        config: a specification file.
        flags: what overrides it: values by dotted name (lora.r); those that are None were not given.
        resume: an earlier job, which keeps its own specification.

    Raises:
        OkavangoError: as submit and run_job.
    """
    console = Console()
    catalog = open_catalog(settings)
    try:
        if resume is None:
            resume = _submit(catalog, settings, config, flags)
            console.print(f"Job {resume}", highlight=False)
        else:
            _refuse_settings(config, flags)
        return _work(catalog, settings, console, resume)
    finally:
        catalog.close()


def enqueue(
    settings: Settings, config: Path | None, flags: Mapping[str, Any], resume: str | None, priority: int
) -> int:
    """Queue a job, or a paused one again, for whichever worker comes; the exit code.

    Raises:
        OkavangoError: as submit and Catalog.resume_job.
    """
    catalog = open_catalog(settings)
    try:
        if resume is None:
            resume = _submit(catalog, settings, config, flags, priority)
        else:
            _refuse_settings(config, flags)
            catalog.resume_job(resume)
    finally:
        catalog.close()
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"Queued {resume}")
    console.print(f"Work on it with: okavango worker   Look at it with: okavango jobs show {resume}")
    return 0


def _submit(
    catalog: Catalog, settings: Settings, config: Path | None, flags: Mapping[str, Any], priority: int = 0
) -> str:
    raw = read_toml(config) if config is not None else {}
    spec = parse_spec(merge(raw, flags), where=str(config) if config is not None else None)
    return submit(catalog, settings, spec, priority=priority).id


def _refuse_settings(config: Path | None, flags: Mapping[str, Any]) -> None:
    given = [name for name, value in flags.items() if value is not None] + ["config"] * (config is not None)
    if given:
        raise ConfigError(
            f"a job keeps the settings that it was started with, but {', '.join(given)} is given",
            where="--resume",
            remedy="leave that out, or start a new job",
        )


def _work(catalog: Catalog, settings: Settings, console: Console, job_id: str) -> int:
    store = ArtifactStore(settings.artifacts, settings.cache / "artifacts")
    monitor = Monitor(console)
    try:
        with _stopping_on_signals(monitor):
            outcome = run_job(catalog, store, settings, job_id, monitor)
    except (Stopped, KeyboardInterrupt) as stop:
        reason = stop.reason if isinstance(stop, Stopped) else Reason.INTERRUPT
        console.print(f"Job {job_id}: {reason.value}.", highlight=False)
        if reason is not Reason.INTERRUPT:
            return 1
        console.print(f"Go on with: okavango train --resume {job_id}", highlight=False, soft_wrap=True)
        return INTERRUPTED
    _show(console, outcome)
    return 0


def merge(raw: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """A file's values with flags in their places."""
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
    # a flag for one of the two lengths replaces whichever the file has
    if flags.get("steps") is not None or flags.get("epochs") is not None:
        merged.pop("steps", None)
        merged.pop("epochs", None)
    for name, value in flags.items():
        if value is None:
            continue
        *path, last = name.split(".")
        section = merged
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return merged


@contextmanager
def _stopping_on_signals(monitor: Monitor) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks the run to stop; a second SIGINT ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, _: FrameType | None) -> None:
        if monitor.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        monitor.stop(Reason.INTERRUPT)
        monitor.say("Finishing the step, then stopping. Once more Ctrl-C stops at once.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(console: Console, outcome: Outcome) -> None:
    version = outcome.version
    if outcome.samples:
        console.print(sample_table(outcome.samples))
    scores = [
        _score(label, name, version.metrics) for name, label in _SCORES.items() if name in version.metrics
    ]
    if scores:
        console.print("Held-out: " + ", ".join(scores), highlight=False)
    console.print(f"{version.ref}  {version.digest}", highlight=False, soft_wrap=True)
    console.print(f"Serve it with: okavango serve --base {version.base}", highlight=False)


def _score(label: str, name: str, metrics: Mapping[str, Any]) -> str:
    """A score with what is known of it: chrF 26.7 (24.9 to 28.5; base 8.3)."""
    known = []
    if f"{name}_low" in metrics:
        known.append(f"{metrics[f'{name}_low']:.3g} to {metrics[f'{name}_high']:.3g}")
    if f"base_{name}" in metrics:
        known.append(f"base {metrics[f'base_{name}']:.3g}")
    return f"{label} {metrics[name]:.3g}" + (f" ({'; '.join(known)})" if known else "")
