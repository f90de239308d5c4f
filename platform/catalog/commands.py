"""`okavango adapters` (training adds `import` to it) and `okavango db`.

Heavy imports stand inside functions (platform/cli.py says why).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from okavango.platform.catalog.records import AdapterRecord, VersionRecord
    from okavango.platform.catalog.store import Catalog

adapters = typer.Typer(
    no_args_is_help=True, help="The adapters of the catalog: list, look at, import, promote."
)
db = typer.Typer(no_args_is_help=True, help="The catalog's database: bring it up to date, check it.")

AS_JSON = typer.Option(False, "--json", help="Print JSON, for programs.")


@adapters.command("list")
def list_adapters(as_json: bool = AS_JSON) -> None:
    """All adapters: what each name serves now, its aliases and scores."""
    found = _catalog().list_adapters()
    if as_json:
        _print_json([asdict(adapter) for adapter in found])
    elif not found:
        typer.echo(
            "There is no adapter yet: `okavango train` makes one, `okavango adapters import` takes one in."
        )
    else:
        _print_adapters(found)


@adapters.command()
def show(
    ref: str = typer.Argument(help="ADAPTER, ADAPTER@3 or ADAPTER@prod"), as_json: bool = AS_JSON
) -> None:
    """One adapter with all its versions, or one version with its lineage."""
    catalog = _catalog()
    if "@" in ref:
        version = catalog.resolve(ref)
        _print_json(asdict(version)) if as_json else _print_version(version)
    else:
        adapter = catalog.get_adapter(ref)
        _print_json(asdict(adapter)) if as_json else _print_adapter(adapter)


@adapters.command()
def promote(
    ref: str = typer.Argument(help="ADAPTER@3, or ADAPTER@canary for what that alias names"),
    alias: str = typer.Option("prod", help="The alias to move."),
) -> None:
    """Move an alias to a version. A bare ADAPTER then means what `prod` names."""
    from okavango.platform.errors import InputError

    if "@" not in ref:
        raise InputError("names no version", where=ref, remedy=f"write {ref}@3")
    catalog = _catalog()
    version = catalog.resolve(ref)
    moved = catalog.promote(version.adapter, version.version, alias)
    before = "" if moved.previous is None else f" (before: {moved.adapter}@{moved.previous})"
    typer.echo(f"{moved.adapter}@{moved.name} is {version.ref}{before}")


@db.command()
def upgrade() -> None:
    """Bring the database to the newest revision."""
    from okavango.platform.catalog import migrate

    url = _database()
    migrate.upgrade(url)
    typer.echo(f"The catalog is at revision {migrate.head()}.")


@db.command()
def check() -> None:
    """Fail unless the database is at the newest revision and its tables are as they should be."""
    from okavango.platform.catalog import migrate

    migrate.check(_database())
    typer.echo(f"The catalog is at revision {migrate.head()}, and its tables are as they should be.")


def _database() -> str:
    from okavango.platform.config import load_settings

    return load_settings().database


def _catalog() -> Catalog:
    from okavango.platform.catalog.store import Catalog

    return Catalog(_database())


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=_json_time))


def _json_time(value: Any) -> str:
    assert isinstance(value, datetime), f"no JSON for {type(value).__name__}"
    return value.isoformat()


def _print_adapters(found: tuple[AdapterRecord, ...]) -> None:
    table = _table("adapter", "base", "is now", "state", "aliases", "scores", "made (UTC)")
    for adapter in found:
        aliases = ", ".join(f"{alias.name} → {alias.version}" for alias in adapter.aliases)
        version = adapter.current
        now = ("none", "", aliases, "", "")
        if version is not None:
            scores, made = _scores(version.metrics), _when(version.created_at)
            now = (f"@{version.version}", version.state, aliases, scores, made)
        table.add_row(adapter.name, adapter.base, *now)
    _print(table)


def _print_adapter(adapter: AdapterRecord) -> None:
    table = _table("version", "state", "aliases", "digest", "scores", "made (UTC)", "note")
    for version in adapter.versions:
        aliases = ", ".join(alias.name for alias in adapter.aliases if alias.version == version.version)
        table.add_row(
            str(version.version),
            version.state,
            aliases,
            version.digest[:12],
            _scores(version.metrics),
            _when(version.created_at),
            version.error or "",
        )
    table.title = f"{adapter.name}, an adapter of {adapter.base}"
    _print(table)


def _print_version(version: VersionRecord) -> None:
    table = _table("", "")
    table.show_header = False
    for name, value in asdict(version).items():
        if isinstance(value, Mapping):
            value = json.dumps(value, indent=2)
        elif isinstance(value, tuple):
            value = ", ".join(value)
        elif isinstance(value, datetime):
            value = _when(value)
        table.add_row(name, "" if value is None else str(value))
    _print(table)


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    Console(markup=False, highlight=False).print(table)


def _scores(metrics: Mapping[str, Any]) -> str:
    numbers = [(name, value) for name, value in metrics.items() if isinstance(value, int | float)]
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers)


def _when(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M")
