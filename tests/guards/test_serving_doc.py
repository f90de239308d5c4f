"""The tables of docs/serving.md: the options of `okavango serve` with their defaults, and the metrics."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from okavango.platform.cli import app
from okavango.platform.telemetry import METRICS


@pytest.fixture(scope="module")
def rows(root: Path) -> list[list[str]]:
    """Cells of every table row, without the marks of code."""
    lines = (root / "docs" / "serving.md").read_text().splitlines()
    return [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        for line in lines
        if "|" in line
    ]


@pytest.fixture(scope="module")
def options() -> dict[str, str]:
    """Defaults of `okavango serve`, as the command line takes them."""
    cli: Any = typer.main.get_command(app)
    parameters = cli.commands["serve"].params
    return {each.opts[0]: default_of(each) for each in parameters if each.opts[0] != "--help"}


def default_of(parameter: Any) -> str:
    """Empty where an option is required, or where nothing is the default."""
    match parameter.default:
        case bool(flag):
            return "on" if flag else "off"
        case int(number) | float(number):
            return f"{number:g}"
        case str(text) if not parameter.required:
            return text
    return ""


def test_every_option_is_there_with_its_default(rows: list[list[str]], options: dict[str, str]) -> None:
    documented = {row[0]: row[1] for row in rows if re.match("--[a-z]", row[0])}
    assert documented == options


def test_every_metric_is_there_with_its_labels(rows: list[list[str]]) -> None:
    documented = {row[0]: row[1:3] for row in rows if row[0].startswith("okavango_")}
    assert documented == {name: [metric.kind, ", ".join(metric.labels)] for name, metric in METRICS.items()}


def test_every_metric_is_measured(root: Path, modules: list[Path]) -> None:
    """By a part other than the one that declares it."""
    sources = [(root / path).read_text() for path in modules if path.name != "telemetry.py"]
    named = {name for source in sources for name in re.findall(r'"(okavango_\w+)"', source)}
    assert METRICS.keys() - named == set()
