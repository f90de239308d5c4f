"""What the guards read: the tree as git sees it, what is new and not ignored included, and pyproject.toml."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def pyproject(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


@pytest.fixture(scope="session")
def tracked(root: Path) -> list[Path]:
    """Files of the project, relative to its root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    paths = [Path(name) for name in listing.split("\0") if name]
    return sorted(path for path in paths if (root / path).is_file())


@pytest.fixture(scope="session")
def parts(pyproject: dict[str, Any]) -> list[str]:
    """Folders of the root that are subpackages of okavango."""
    return sorted(pyproject["tool"]["setuptools"]["package-dir"].values())


@pytest.fixture(scope="session")
def modules(tracked: list[Path], parts: list[str]) -> list[Path]:
    """The Python files of the parts, relative to the root."""
    return [path for path in tracked if path.suffix == ".py" and path.parts[0] in parts]
