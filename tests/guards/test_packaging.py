"""The wheel holds the parts, whole and alone; imports are declared; the lock fits what is declared."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint, packages_distributions
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="module")
def wheel(root: Path, tracked: list[Path], tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy: a build folder left in the tree would add its stale files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in tracked:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, source / path)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


@pytest.fixture(scope="module")
def unpacked(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    wheel.extractall(folder)
    return folder


def test_the_wheel_holds_every_file_of_the_parts_and_nothing_else(
    wheel: zipfile.ZipFile, tracked: list[Path], parts: list[str]
) -> None:
    expected = {f"okavango/{path.as_posix()}" for path in tracked if path.parts[0] in parts}
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_the_wheel_runs_outside_the_tree(unpacked: Path) -> None:
    code = (
        "import platform, sys; assert platform.system(); import okavango.platform.cli as cli;"
        "assert cli.__file__.startswith(sys.argv[1]), cli.__file__;"
        "sys.argv[:] = ['okavango', '--help']; cli.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-c", code, str(unpacked)]
    done = subprocess.run(
        command, cwd=unpacked.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_platform_is_a_bare_namespace(root: Path, parts: list[str]) -> None:
    """With an __init__.py, `import platform` from the root would find ours before the standard library's."""
    direct = [path.name for path in (root / "platform").iterdir() if path.is_file()]
    assert "__init__.py" not in direct
    assert [name for name in direct if not name.endswith(".py")] == []
    assert [part for part in parts if not (root / part / "__init__.py").is_file()] == ["platform"]


def test_every_subpackage_is_listed(pyproject: dict[str, Any], modules: list[Path]) -> None:
    listed = pyproject["tool"]["setuptools"]["packages"]
    assert listed == sorted({".".join(["okavango", *path.parent.parts]) for path in modules})


def test_subpackages_have_an_init(root: Path, modules: list[Path]) -> None:
    folders = {path.parent for path in modules} - {Path("platform")}
    assert [folder for folder in sorted(folders) if not (root / folder / "__init__.py").is_file()] == []


def test_tests_are_no_packages(tracked: list[Path]) -> None:
    assert [path for path in tracked if path.parts[0] == "tests" and path.name == "__init__.py"] == []


def test_entry_points_load(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    points = [
        EntryPoint(name, value, group) for group, all_ in groups.items() for name, value in all_.items()
    ]
    assert points
    for point in points:
        assert point.load() is not None, point


def undeclared(root: Path, paths: list[Path], requirements: list[str]) -> set[str]:
    """Imports that no requirement brings by itself."""
    declared = {canonicalize_name(Requirement(line).name) for line in requirements}
    owners = packages_distributions()
    return {
        f"{path}: {name}"
        for path in paths
        for name in third_party(root / path)
        if not declared & {canonicalize_name(owner) for owner in owners.get(name, [name])}
    }


def test_what_the_code_imports_is_declared(
    root: Path, pyproject: dict[str, Any], modules: list[Path], tracked: list[Path]
) -> None:
    project = pyproject["project"]
    users = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    assert undeclared(root, modules, users) == set()
    tools = {path for path in tracked if path.suffix == ".py"} - set(modules)
    # Helpers import each other by name: those of a folder that is run, and tests/support.
    ours = {path.stem for path in tools}
    assert undeclared(root, sorted(tools), [*users, *pyproject["dependency-groups"]["dev"], *ours]) == set()


def third_party(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).split(".")[0])
    return names - sys.stdlib_module_names - {"okavango"}


@pytest.fixture(scope="module")
def pins(root: Path) -> list[str]:
    return (root / "requirements.lock").read_text().splitlines()


def test_the_lock_is_plain_pins(pins: list[str]) -> None:
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin)] == []
    assert pins == sorted(set(pins))


def test_the_lock_fits_what_is_declared(pyproject: dict[str, Any], pins: list[str]) -> None:
    project = pyproject["project"]
    groups = [
        pyproject["build-system"]["requires"],
        project["dependencies"],
        *project["optional-dependencies"].values(),
        *pyproject["dependency-groups"].values(),
    ]
    versions = dict(pin.split("==") for pin in pins)
    unfit = [
        line
        for group in groups
        for line in group
        if not Requirement(line).specifier.contains(
            versions.get(canonicalize_name(Requirement(line).name), "0")
        )
    ]
    assert unfit == []
