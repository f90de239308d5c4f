"""The `okavango` command. It knows no command itself: every part registers its own under the entry point
group okavango.commands, as a typer.Typer (a group of commands) or a plain function (one command).

The rule for those modules: importing one is cheap. They import torch, SQL, web servers and their like inside
their functions, because `okavango --help` imports all of them; any other call imports the one that it names.

Exit codes: 0 done, 1 a reported error, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

import typer
from typer.core import TyperGroup

from okavango.platform.errors import DataError, OkavangoError

GROUP = "okavango.commands"
INTERRUPTED = 130


class Commands(Mapping[str, Any]):
    """Command by name, imported when asked for. One that cannot be imported says so when it is called."""

    def __init__(self) -> None:
        self._entries = {entry.name: entry for entry in sorted(entry_points(group=GROUP))}

    def __getitem__(self, name: str) -> Any:
        entry = self._entries[name]
        try:
            return _as_command(name, entry.load())
        # Whatever a broken part raises at import, the other commands go on working.
        except Exception as error:
            return _broken_command(entry, error)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class RootGroup(TyperGroup):
    """Finds commands late, and turns what they raise into one line and an exit code."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.commands = Commands()  # type: ignore[assignment]  # read-only, and read only

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OkavangoError as error:
            report(error, verbose=ctx.params["verbose"])
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(cls=RootGroup, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"okavango {version('okavango')}")
        raise typer.Exit


@app.callback()
def root(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Show the traceback of an error."),
    show_version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Fine-tune many small adapters of one multimodal base, and serve them all at once."""


def report(error: OkavangoError, *, verbose: bool) -> None:
    """One red line on stderr; every fault of a dataset below it; the traceback above it if wanted."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    if verbose:
        console.print("".join(traceback.format_exception(error)), style="dim")
    console.print(f"error: {error}", style="bold red")
    for fault in error.faults if isinstance(error, DataError) else ():
        console.print(f"  {fault}", style="red")


def main() -> None:
    """Run the command line, and exit with its code."""
    # PEFT imports it where it is installed, and it warns of a kernel that only packed weights would use
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    app(prog_name="okavango")


def _as_command(name: str, target: typer.Typer | Callable[..., Any]) -> Any:
    if isinstance(target, typer.Typer):
        command: Any = typer.main.get_group(target)  # a group, even if it has one command only
    else:
        single = typer.Typer(add_completion=False)  # the root has it
        single.command(name)(target)
        command = typer.main.get_command(single)
    command.name = name
    return command


def _broken_command(entry: EntryPoint, cause: Exception) -> Any:
    reason = f"{type(cause).__name__}: {cause}"

    def broken(arguments: list[str] = typer.Argument(None, hidden=True)) -> None:
        raise OkavangoError(
            f"cannot be loaded from {entry.value}: {reason}",
            where=f"command {entry.name!r}",
            remedy="reinstall okavango; `okavango -v` shows the traceback",
        ) from cause

    broken.__doc__ = f"Cannot be loaded: {reason}"
    command = _as_command(entry.name, broken)
    command.context_settings = {"ignore_unknown_options": True}
    return command


if __name__ == "__main__":
    main()
