"""`okavango train`, `okavango adapters import` and `to-base`, which the catalog's own commands cannot know:
what they need lies above them. Heavy imports stand inside functions (platform/cli.py says why).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from okavango.platform.catalog.commands import adapters as adapters
from okavango.platform.config import load_settings
from okavango.training.data_commands import data as data

if TYPE_CHECKING:
    from okavango.modalities.aligned import AlignedHeads
    from okavango.training.importing import Imported


def train(
    base: str | None = typer.Option(None, help="The base to train over: a name, or a base's folder."),
    data: Path | None = typer.Option(None, help="What to learn from; `okavango data check` looks at it."),
    held_out: Path | None = typer.Option(None, "--eval", help="Rows to score answers on, never learned."),
    hold_out: float | None = typer.Option(None, help="In place of --eval: so much of the data, as 0.1."),
    form: str | None = typer.Option(
        None, "--format", help="Of the rows, where their first ones do not tell."
    ),
    name: str | None = typer.Option(None, help="The adapter that gets a new version."),
    steps: int | None = typer.Option(None, help="Optimiser steps."),
    epochs: float | None = typer.Option(None, help="Times over the data, in place of steps."),
    batch_size: int | None = typer.Option(None, help="Rows that are computed at a time."),
    batch_tokens: int | None = typer.Option(
        None, help="As many rows at a time as fit into so many tokens, in place of --batch-size."
    ),
    processes: int | None = typer.Option(None, help="That take each step together."),
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
    no_lora: bool = typer.Option(False, "--no-lora", help="Leave the decoder as it is; heads alone learn."),
    no_head: bool = typer.Option(False, "--no-head", help="Leave the base's projection head as it is."),
    config: Path | None = typer.Option(None, help="A TOML file with these and more settings; flags win."),
    resume: str | None = typer.Option(None, help="Go on with this job: interrupted, or its worker died."),
    detach: bool = typer.Option(False, "--detach", help="Only queue it: `okavango worker` does it."),
    priority: int = typer.Option(0, help="In the queue; the higher go first."),
) -> None:
    """Train an adapter and register it as a version. Ctrl-C leaves a checkpoint to resume from."""
    from okavango.training.foreground import enqueue, start

    flags = {
        "base": base,
        "data": data,
        "eval": held_out,
        "hold_out": hold_out,
        "format": form,
        "name": name,
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "batch_tokens": batch_tokens,
        "processes": processes,
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
        "lora.train": False if no_lora else None,
    }
    if detach:
        raise typer.Exit(enqueue(load_settings(), config, flags, resume, priority))
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


@adapters.command("to-base")
def to_base(
    ref: str = typer.Argument(help="A version of heads alone: heads, heads@3 or heads@production."),
    name: str = typer.Argument(help="What the new base will be called."),
    force: bool = typer.Option(False, "--force", help="Replace a base of that name."),
) -> None:
    """Make a base whose default heads are an adapter's: what is trained over it sees from the start."""
    from okavango.modalities.aligned import base_with, heads_of_bundle
    from okavango.modalities.base import find_base
    from okavango.platform.artifacts import ArtifactStore
    from okavango.platform.catalog.store import open_catalog

    settings = load_settings()
    catalog = open_catalog(settings)
    try:
        version = catalog.resolve(ref)
    finally:
        catalog.close()
    store = ArtifactStore(settings.artifacts, settings.cache / "artifacts")
    aligned = heads_of_bundle(store.fetch(version.digest))
    old = find_base(version.base, settings.bases)
    made = base_with(settings.bases, name, old, aligned, force=force)
    typer.echo(f"{made.name}: {made.folder}")
    typer.echo(f"decoder and encoders of {old.name}, and of {version.ref} its {_listed(aligned)}")


def _listed(aligned: AlignedHeads) -> str:
    heads = f"{' and '.join(aligned.heads)} {'head' if len(aligned.heads) == 1 else 'heads'}"
    return f"{heads} and space of embeddings" if aligned.embedding is not None else heads


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


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
