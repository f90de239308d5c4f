"""The engine runs on a bare GPU machine: torch, transformers, peft, safetensors, and no more than they need.

Such a machine is made here: a folder of links to just these packages and what they depend on, the parts as
`make typing-links` links them, and a Python that sees nothing else. On top, files of okavango may name only
the packages below: what transformers itself brings along today (tqdm, an HTTP client) may be gone tomorrow.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BARE = ["torch", "transformers", "peft", "safetensors", "numpy", "jinja2", "huggingface_hub", "tokenizers"]
NAMED = {*BARE, "triton"}
# Only the `transformers` command needs it, and it brings pydantic and rich.
ABSENT = {"typer"}

GUARD = f"""
import builtins, sys
found = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer, root = (globals or {{}}).get("__name__", ""), name.split(".")[0]
    if level == 0 and importer.split(".")[0] == "okavango":
        if root not in sys.stdlib_module_names | {NAMED | {"okavango"}!r}:
            raise ModuleNotFoundError(f"{{importer}} imports {{name}}, which a bare machine may not have")
    return found(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
"""


def closure(names: list[str]) -> Iterator[Distribution]:
    """Installed distributions and all that they depend on."""
    waiting, seen = [Requirement(name) for name in names], set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen or requirement.name in ABSENT:
            continue
        seen.add(key)
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        yield found
        extras = [{"extra": extra} for extra in ("", *requirement.extras)]
        needs = [Requirement(line) for line in found.requires or ()]
        waiting += [n for n in needs if n.marker is None or any(n.marker.evaluate(each) for each in extras)]


@pytest.fixture(scope="module")
def bare_path(tmp_path_factory: pytest.TempPathFactory, root: Path, parts: list[str]) -> str:
    """PYTHONPATH of the bare machine."""
    subprocess.run(["make", "-s", "typing-links"], cwd=root, check=True)
    assert sorted(link.name for link in (root / ".typing/okavango").iterdir()) == parts
    site = tmp_path_factory.mktemp("site")
    for found in closure(BARE):
        for top in {Path(file).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            link = site / top
            if not link.is_symlink():
                link.symlink_to(Path(str(found.locate_file(top))))
    return os.pathsep.join([str(root / ".typing"), str(site)])


def run(bare_path: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": bare_path,
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-S", "-c", GUARD + code]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "name", ["okavango.serving.engine", "okavango.modalities.base", "okavango.modalities.prompt"]
)
def test_the_engine_imports_alone(bare_path: str, name: str) -> None:
    done = run(bare_path, f"import {name}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["fastapi", "pydantic", "rich", "sqlalchemy", "gradio", "okavango.platform.catalog.schema"]
)
def test_the_bare_machine_is_bare(bare_path: str, name: str) -> None:
    done = run(bare_path, f"import {name}")
    assert "ModuleNotFoundError" in done.stderr


def test_the_guard_sees_what_only_transformers_may_use(bare_path: str) -> None:
    ours = run(bare_path, "exec('import tqdm', {'__name__': 'okavango.serving.bad'})")
    assert "okavango.serving.bad imports tqdm" in ours.stderr
    theirs = run(bare_path, "import tqdm")
    assert theirs.returncode == 0, theirs.stderr


def test_what_the_machine_has_loads(bare_path: str) -> None:
    code = (
        "import torch, platform; from transformers import LlamaForCausalLM; import peft; print(peft.__file__)"
    )
    done = run(bare_path, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(bare_path.split(os.pathsep)[1])
