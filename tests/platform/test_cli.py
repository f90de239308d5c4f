"""The root command, run as a user does: in a process of its own, with parts that other packages bring."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

PART = '''
import typer
from okavango.platform.errors import DataError, InputError

group = typer.Typer(help="A group of commands.")

@group.command()
def fail():
    """Fails as commands should."""
    raise InputError("[red] is no number", where="--rank", remedy="give one of 1 to 256")

@group.command()
def crash():
    """Fails as commands should not."""
    raise RuntimeError("a fault of ours")

small = typer.Typer(help="A group of one command.")

@small.command()
def only():
    """The only one."""
    print("only")

def single(name: str, loud: bool = False):
    """One command."""
    print(name.upper() if loud else name)

def check():
    """Finds many faults."""
    raise DataError("2 faults", ("train.jsonl:1: messages is missing", "train.jsonl:9: bad [JSON]"))

def wait():
    """Waits for Ctrl-C."""
    import time
    print("waiting", flush=True)
    time.sleep(600)
'''

ENTRY_POINTS = """
[okavango.commands]
group = fake_part:group
small = fake_part:small
single = fake_part:single
check = fake_part:check
wait = fake_part:wait
absent = fake_part_that_is_not_there:app
misnamed = fake_part:nothing
raising = fake_raising_part:app
"""


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A package that registers commands, as it lies in site-packages."""
    info = tmp_path / "site" / "fake_part-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-part\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (info.parent / "fake_part.py").write_text(PART)
    (info.parent / "fake_raising_part.py").write_text("raise OSError('libthing.so is missing')")
    return info.parent


@pytest.fixture
def environ(parts: Path, tmp_path: Path) -> dict[str, str]:
    # Wide, and without colours: what is tested are words.
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(parts), os.environ.get("PYTHONPATH", "")]),
        "OKAVANGO_HOME": str(tmp_path / "home"),
        "COLUMNS": "200",
        "NO_COLOR": "1",
    }


@pytest.fixture
def okavango(environ: dict[str, str]) -> Run:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "okavango.platform.cli", *arguments]
        return subprocess.run(command, env=environ, capture_output=True, text=True)

    return run


def test_help_lists_every_part_and_what_is_wrong_with_it(okavango: Run) -> None:
    done = okavango("--help")
    assert done.returncode == 0
    lines = {words[1]: line for line in done.stdout.splitlines() if len(words := line.split()) > 1}
    assert "A group of commands." in lines["group"]
    assert "One command." in lines["single"]
    assert "Cannot be loaded: ModuleNotFoundError" in lines["absent"]
    assert "fake_part_that_is_not_there" in lines["absent"]
    assert "Cannot be loaded: AttributeError" in lines["misnamed"]
    assert "libthing.so is missing" in lines["raising"]
    assert {"adapters", "db"} <= set(lines)


def test_groups_and_single_commands(okavango: Run) -> None:
    assert okavango("single", "--loud", "hello").stdout == "HELLO\n"
    assert okavango("small", "only").stdout == "only\n"
    assert "Fails as commands should." in okavango("group", "--help").stdout
    assert "--install-completion" not in okavango("group", "--help").stdout


def test_an_error_is_one_line(okavango: Run) -> None:
    done = okavango("group", "fail")
    assert done.returncode == 1
    assert done.stderr == "error: --rank: [red] is no number (give one of 1 to 256)\n"
    assert done.stdout == ""


def test_an_error_is_red_on_a_terminal(environ: dict[str, str]) -> None:
    del environ["NO_COLOR"]
    command = [sys.executable, "-m", "okavango.platform.cli", "group", "fail"]
    done = subprocess.run(command, env=environ | {"FORCE_COLOR": "1"}, capture_output=True, text=True)
    assert done.stderr.startswith("\x1b[1;31merror: --rank")


def test_verbose_shows_where_it_came_from(okavango: Run) -> None:
    done = okavango("-v", "group", "fail")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "fake_part.py" in done.stderr
    assert done.stderr.endswith("error: --rank: [red] is no number (give one of 1 to 256)\n")


def test_a_data_error_shows_every_fault(okavango: Run) -> None:
    done = okavango("check")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: 2 faults",
        "  train.jsonl:1: messages is missing",
        "  train.jsonl:9: bad [JSON]",
    ]


def test_a_fault_of_ours_is_not_hidden(okavango: Run) -> None:
    done = okavango("group", "crash")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RuntimeError: a fault of ours" in done.stderr


@pytest.mark.parametrize("name", ["absent", "misnamed", "raising"])
def test_a_broken_part_is_named_and_costs_only_itself(okavango: Run, name: str) -> None:
    for arguments in ([name], [name, "x", "--option", "y"]):
        done = okavango(*arguments)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: command '{name}': cannot be loaded from fake_")
        assert len(done.stderr.splitlines()) == 1
    assert "Traceback" in okavango("-v", name).stderr
    assert okavango("single", "works").stdout == "works\n"


def test_an_unknown_command_names_the_nearest(okavango: Run) -> None:
    done = okavango("singel")
    assert done.returncode == 2
    assert "single" in done.stderr


def test_version(okavango: Run) -> None:
    assert okavango("--version").stdout == f"okavango {version('okavango')}\n"


def test_ctrl_c_is_no_accident(environ: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "okavango.platform.cli", "wait"],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that started the tests in its background would have them ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "interrupted\n"


def imported_by(*arguments: str, environ: dict[str, str]) -> set[str]:
    code = (
        "import sys\n"
        f"sys.argv = ['okavango', *{list(arguments)!r}]\n"
        "from okavango.platform.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_help_imports_nothing_heavy(environ: dict[str, str]) -> None:
    heavy = {
        "torch",
        "transformers",
        "sqlalchemy",
        "alembic",
        "gradio",
        "fastapi",
        "datasets",
        "fsspec",
        "PIL",
    }
    imported = imported_by("--help", environ=environ)
    assert "fake_part" in imported
    assert imported & heavy == set()


def test_a_command_imports_its_own_part_only(environ: dict[str, str]) -> None:
    assert "fake_part" not in imported_by("db", "--help", environ=environ)
    assert "okavango.platform.catalog.commands" not in imported_by("single", "--help", environ=environ)
