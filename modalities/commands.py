"""`okavango base`: build, add, list and show bases. Cheap to import: what loads torch is imported inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import typer

from okavango.platform.config import load_settings
from okavango.platform.errors import NotFoundError

if TYPE_CHECKING:
    from rich.progress import Progress

    from okavango.modalities.base import Base
    from okavango.modalities.report import Advance, Report

STARTER = "starter"
base = typer.Typer(help="Bases: a frozen decoder with its encoders and default heads.", no_args_is_help=True)


@base.command()
def build(
    name: str = typer.Argument(STARTER, help="Which base; there is one so far: starter."),
    force: bool = typer.Option(False, "--force", help="Build it again even if it is there."),
) -> None:
    """Download a base's packages, convert them, and write the base. Instant when it is there."""
    if name != STARTER:
        raise NotFoundError(
            f"no recipe is called {name!r}", remedy="okavango base build starter, or base add"
        )
    bases = load_settings().bases
    if (bases / name / "base.toml").is_file() and not force:
        typer.echo(f"{name} is built: {bases / name}")
        return
    from okavango.modalities.starter import build_starter

    with _progress() as report:
        built = build_starter(bases, load_settings().downloads, force=force, report=report)
    _say_built(built)


@base.command()
def add(
    name: str = typer.Argument(help="What the base will be called."),
    decoder: str = typer.Option(help="A Hugging Face directory or id, or a .gguf file."),
    image_encoder: str = typer.Option(None, help="An open_clip name, hf-hub:ID, or local-dir:PATH."),
    image_weights: str = typer.Option(None, help="A tag or file of weights, for an open_clip name."),
    image_tokens: int = typer.Option(None, help="Decoder tokens a picture; a square. At most 16 by default."),
    head_hidden: int = typer.Option(None, help="Hidden width of the projection head; 1024 by default."),
    copy: bool = typer.Option(False, "--copy", help="Copy the decoder instead of pointing to it."),
    force: bool = typer.Option(False, "--force", help="Replace a base of that name."),
) -> None:
    """Make a base of any decoder and, if wanted, any open_clip encoder."""
    from okavango.modalities.add import Recipe, add_base

    recipe = Recipe(decoder, image_encoder, image_weights, image_tokens, head_hidden, copy)
    with _progress() as report:
        added = add_base(load_settings().bases, name, recipe, force=force, report=report)
    _say_built(added)


@base.command("list")
def list_() -> None:
    """List the bases."""
    from rich.console import Console
    from rich.table import Table

    from okavango.modalities.base import list_bases, read_base
    from okavango.modalities.summary import decoder_summary

    bases = load_settings().bases
    names = list_bases(bases)
    if not names:
        typer.echo(f"no bases in {bases}; okavango base build starter makes one")
        return
    table = Table("name", "decoder", "parameters", "encoders", "digest")
    for name in names:
        found = read_base(bases / name)
        decoder = decoder_summary(found.decoder.path)
        table.add_row(name, *decoder, _encoders(found), found.digest[:12])
    Console(highlight=False).print(table)
    typer.echo(f"in {bases}")


@base.command()
def show(
    name: str = typer.Argument(help="A base's name, or the folder of one."),
    verify: bool = typer.Option(False, "--verify", help="Recompute every digest."),
) -> None:
    """Show all that a base is made of."""
    from okavango.modalities.base import find_base, verify_base
    from okavango.modalities.summary import base_fields

    found = find_base(name, load_settings().bases)
    for field, value in base_fields(found):
        typer.echo(f"{field:<26} {value}")
    if verify:
        verify_base(found)
        typer.echo("every component is as its digest says")


def _encoders(found: Base) -> str:
    parts = (f"{name} {spec.grid[0]} × {spec.grid[1]}" for name, spec in found.encoders.items())
    return ", ".join(parts) or "none"


def _say_built(built: Base) -> None:
    typer.echo(f"{built.name}: {built.folder}")
    typer.echo(f"digest {built.digest}")


@contextmanager
def _progress() -> Iterator[Report]:
    """A bar a stage on stderr: bytes where the size is known, a pulse and the time elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = [
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _reporter(progress)


def _reporter(progress: Progress) -> Callable[[str, int | None], AbstractContextManager[Advance]]:
    @contextmanager
    def report(stage: str, total: int | None) -> Iterator[Advance]:
        task = progress.add_task(stage, total=total, amount="")

        def advance(done: int) -> None:
            amount = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB" if total else f"{done / 1e6:.0f} MB"
            progress.update(task, completed=done, amount=amount)

        yield advance
        progress.update(task, total=total or 1, completed=total or 1)

    return report
