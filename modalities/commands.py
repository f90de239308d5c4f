"""`okavango base`: build, add, list and show bases. Cheap to import: what loads torch is imported inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal

import typer

from okavango.modalities.packages import is_current
from okavango.platform.config import load_settings
from okavango.platform.errors import ConfigError, NotFoundError

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
    if is_current(bases / name) and not force:
        typer.echo(f"{name} is built: {bases / name}")
        return
    from okavango.modalities.starter import build_starter

    with _progress() as report:
        built = build_starter(bases, load_settings().downloads, force=force, report=report)
    _say_built(built)


@base.command()
def add(
    ctx: typer.Context,
    name: str = typer.Argument(help="What the base will be called."),
    decoder: str = typer.Option(None, help="A Hugging Face directory or id, or a .gguf file."),
    checkpoint: str = typer.Option(
        None, help="A pretrained vision-language model, a directory or id, in place of all parts."
    ),
    image_encoder: str = typer.Option(None, help="An open_clip name, hf-hub:ID, or local-dir:PATH."),
    image_weights: str = typer.Option(None, help="A tag or file of weights, for an open_clip name."),
    image_tokens: int = typer.Option(None, help="Decoder tokens a picture; a square. At most 16 by default."),
    image_tiles: int = typer.Option(None, help="Cut a large picture into up to so many tiles for detail."),
    image_layer: list[int] = typer.Option(
        [], help="A block of the tower to take features from, -1 the last; repeatable, and joined."
    ),
    audio_encoder: str = typer.Option(None, help="A Hugging Face directory or id of a Whisper-style model."),
    audio_stride: int = typer.Option(
        None, help="Positions of 20 ms that make a decoder token; 5 by default."
    ),
    head_kind: Literal["mlp", "linear", "resampler"] = typer.Option(
        None, help="Of the projection heads; mlp by default."
    ),
    head_pooling: Literal["mean", "stack"] = typer.Option(
        None, help="How positions become a token: the mean for pictures, stack for sounds by default."
    ),
    head_hidden: int = typer.Option(None, help="Hidden width of the projection heads; 1024 by default."),
    copy: bool = typer.Option(False, "--copy", help="Copy the decoder instead of pointing to it."),
    force: bool = typer.Option(False, "--force", help="Replace a base of that name."),
) -> None:
    """Make a base of any decoder and, if wanted, encoders of pictures and sounds; or of a checkpoint."""
    from okavango.modalities.add import Recipe, add_base

    bases = load_settings().bases
    if checkpoint is not None:
        from okavango.modalities.checkpoint import add_checkpoint

        _refuse_parts(ctx)
        with _progress() as report:
            _say_built(add_checkpoint(bases, name, checkpoint, force=force, report=report))
        return
    if decoder is None:
        raise ConfigError("a base needs a decoder", remedy="give --decoder, or --checkpoint")
    recipe = Recipe(
        decoder,
        image_encoder,
        image_weights,
        image_tokens,
        head_hidden,
        copy,
        image_tiles=image_tiles,
        image_layers=tuple(image_layer) or None,
        audio_encoder=audio_encoder,
        audio_stride=audio_stride,
        head_kind=head_kind,
        head_pooling=head_pooling,
    )
    with _progress() as report:
        added = add_base(bases, name, recipe, force=force, report=report)
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


def _refuse_parts(ctx: typer.Context) -> None:
    """Raises ConfigError where a part is named beside a checkpoint."""
    for name, value in ctx.params.items():
        if value and name not in ("name", "checkpoint", "force"):
            raise ConfigError(
                "a checkpoint brings all parts; leave it out", where=f"--{name.replace('_', '-')}"
            )


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
