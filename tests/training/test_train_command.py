from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_fixtures import Workshop
from typer.testing import CliRunner, Result

from okavango.platform.cli import app
from okavango.training.foreground import merge

COMMON = ("--base", "tiny", "--name", "emoji", "--precision", "float32", "--batch-size", "4")


@pytest.fixture
def okavango(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Any:
    """okavango("train", …) in this process, at home in the workshop."""
    monkeypatch.setenv("OKAVANGO_HOME", str(workshop.settings.home))
    monkeypatch.setenv("OKAVANGO_CACHE", str(workshop.settings.cache))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments], catch_exceptions=False)

    return call


def test_it_says_what_it_does_and_what_came_of_it(okavango: Any, workshop: Workshop) -> None:
    data = str(workshop.folder / "pictures.jsonl")
    done = okavango("train", *COMMON, "--data", data, "--eval", data, "--steps", "3", "--rank", "2")
    assert done.exit_code == 0, done.output
    (job,) = workshop.catalog.list_jobs()
    version = workshop.catalog.resolve("emoji@1")
    lines = done.stdout.splitlines()
    assert lines[0] == f"Job {job.id}"
    assert "8 rows," in done.stdout
    assert "3 steps, 4 rows a step." in done.stdout
    assert "4,096 LoRA parameters, 5,168 head parameters" in done.stdout
    assert "0.png What is this?" in done.stdout
    assert "Held-out: loss " in done.stdout
    assert lines[-2] == f"emoji@1  {version.digest}"
    assert lines[-1] == "Serve it with: okavango serve --base tiny"
    assert version.lineage["spec"]["lora"]["r"] == 2


def test_flags_win_over_the_file(okavango: Any, workshop: Workshop) -> None:
    config = workshop.folder / "job.toml"
    config.write_text(
        'base = "tiny"\ndata = "pictures.jsonl"\nname = "other"\nepochs = 50\nprecision = "float32"\n'
        "batch_size = 8\n[lora]\nr = 4\nalpha = 4\n[align]\nsteps = 0\n"
    )
    done = okavango("train", "--config", str(config), "--name", "emoji", "--steps", "2", "--rank", "3")
    assert done.exit_code == 0, done.output
    spec = workshop.catalog.resolve("emoji").lineage["spec"]
    assert (spec["steps"], spec["epochs"], spec["align"]["steps"]) == (2, None, 0)
    assert (spec["lora"]["r"], spec["lora"]["alpha"]) == (3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "base: is missing; data: is missing; name: is missing"),
        ((*COMMON, "--data", "gone.jsonl"), "gone.jsonl: there is no such file"),
        ((*COMMON, "--data", "x", "--rank", "0"), "lora.r: Input should be greater"),
        ((*COMMON, "--data", "{data}", "--target", "qproj"), "did you mean q_proj?"),
        ((*COMMON, "--data", "{data}", "--steps", "2", "--epochs", "1"), "steps and epochs are both set"),
        (("--resume", "job-1", "--steps", "2", "--no-head"), "but steps, head.train is given"),
        (("--resume", "job-1"), "job-1: no such job (there is no job yet)"),
        (("--config", "gone.toml"), "gone.toml: cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_1(
    okavango: Any, workshop: Workshop, arguments: tuple[str, ...], message: str
) -> None:
    data = str(workshop.folder / "pictures.jsonl")
    done = okavango("train", *(argument.format(data=data) for argument in arguments))
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert workshop.catalog.list_jobs() == ()


def test_a_finished_job_is_not_resumed(okavango: Any, workshop: Workshop) -> None:
    data = str(workshop.folder / "pictures.jsonl")
    okavango("train", *COMMON, "--data", data, "--steps", "1")
    (job,) = workshop.catalog.list_jobs()
    done = okavango("train", "--resume", job.id)
    assert done.exit_code == 1
    assert f"{job.id}: is succeeded: there is nothing to go on with" in done.stderr


def test_faults_of_the_data_are_all_printed(okavango: Any, workshop: Workshop) -> None:
    path = workshop.folder / "bad.jsonl"
    path.write_text("{}\nnonsense\n")
    done = okavango("train", *COMMON, "--data", str(path))
    assert done.exit_code == 1
    assert f"{path}:1: messages" in done.stderr
    assert f"{path}:2: " in done.stderr


@pytest.mark.parametrize(
    ("raw", "flags", "expected"),
    [
        ({"lr": 1, "lora": {"r": 2}}, {"lora.r": None, "lr": None}, {"lr": 1, "lora": {"r": 2}}),
        ({"lora": {"r": 2, "alpha": 1}}, {"lora.r": 4}, {"lora": {"r": 4, "alpha": 1}}),
        ({}, {"head.train": False}, {"head": {"train": False}}),
        ({"steps": 5}, {"epochs": 2.0}, {"epochs": 2.0}),
        ({"steps": 5}, {"epochs": None}, {"steps": 5}),
    ],
)
def test_merging(raw: dict[str, Any], flags: dict[str, Any], expected: dict[str, Any]) -> None:
    before = repr(raw)
    assert merge(raw, flags) == expected
    assert repr(raw) == before


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; import okavango.training.commands; "
        "print([n for n in ('torch', 'sqlalchemy', 'pydantic', 'rich') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [name for name in ("torch", "sqlalchemy", "pydantic") if name in done.stdout] == []
    assert Path(sys.executable).exists()
