"""Imports point down: web → serving, training → modalities → platform. One inside a function counts, too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

CATALOG = "okavango.platform.catalog"

# What a part may import of okavango, by module prefix, and what of that it may not.
ALLOWED = {
    "platform": ["platform"],
    "modalities": ["modalities", "platform"],
    "training": ["training", "modalities", "platform"],
    "serving": ["serving", "modalities", "platform"],
    "web": ["web", "serving", "training", "modalities", "platform"],
    "migrations": ["migrations", "platform"],
}
NO_CATALOG = ["modalities", "serving"]

_TENSORS = {
    "torch",
    "torchvision",
    "transformers",
    "peft",
    "accelerate",
    "open_clip",
    "timm",
    "safetensors",
    "gguf",
}
_WEB = {"fastapi", "starlette", "uvicorn", "gradio", "gradio_client"}
_SQL = {"sqlalchemy", "alembic", "psycopg", "sqlite3"}
_DATA = {"datasets"}
# Third-party packages that a part leaves to another part.
FOREIGN = {
    "platform": _TENSORS | _WEB | _DATA,
    "modalities": _WEB | _SQL | _DATA | {"accelerate"},
    "training": _WEB | _SQL,
    "serving": _WEB
    | _SQL
    | _DATA
    | {"accelerate", "pydantic", "typer", "rich", "open_clip", "timm", "fsspec"},
    "web": _SQL | _DATA | {"accelerate", "peft"},
    "migrations": _TENSORS | _WEB | _DATA,
}


def module_name(path: Path) -> str:
    """platform/catalog/store.py → okavango.platform.catalog.store."""
    parts = path.with_suffix("").parts
    return ".".join(["okavango", *(parts[:-1] if parts[-1] == "__init__" else parts)])


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a file imports; the names of a `from` are joined to its module."""
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(names=names, level=level):
                above = package[: len(package) - level + 1] if level else []
                origin = ".".join([*above, *([node.module] if node.module else [])])
                yield from ((node.lineno, f"{origin}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(str(name)), *_]
            ):
                if called in {"import_module", "__import__"}:
                    yield node.lineno, name


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def fault_of(part: str, name: str) -> str | None:
    """Why a part must not import a name; None when it may."""
    if within(name, "okavango"):
        if not any(within(name, f"okavango.{allowed}") for allowed in ALLOWED[part]):
            return f"{part} stands on {', '.join(ALLOWED[part])} only"
        if part in NO_CATALOG and within(name, CATALOG):
            return f"{part} does not know the catalog"
    elif name.split(".")[0] in FOREIGN[part]:
        return f"{part} leaves {name.split('.')[0]} to other parts"
    return None


def faults(root: Path, paths: Iterable[Path]) -> list[str]:
    return [
        f"{path}:{line}: imports {name}, but {fault}"
        for path in paths
        for line, name in imports(path, ast.parse((root / path).read_text()))
        if (fault := fault_of(path.parts[0], name))
    ]


def test_every_part_has_its_rules(parts: list[str]) -> None:
    assert set(parts) == set(ALLOWED) == set(FOREIGN)


def test_imports_point_down(root: Path, modules: list[Path]) -> None:
    assert len(modules) > len(ALLOWED)
    assert faults(root, modules) == []


def test_only_web_joins_serving_and_the_catalog(root: Path, modules: list[Path]) -> None:
    joining = []
    for path in modules:
        names = [name for _, name in imports(path, ast.parse((root / path).read_text()))]
        if all(any(within(name, each) for name in names) for each in ("okavango.serving", CATALOG)):
            joining.append(path)
    assert [path for path in joining if path.parts[0] != "web"] == []


# Commands run only in a full installation; all else of these two parts must do without one.
def test_what_serving_needs_of_platform_is_standard_library(root: Path, modules: list[Path]) -> None:
    waiting = [path for path in modules if path.parts[0] in NO_CATALOG and path.name != "commands.py"]
    seen: dict[Path, Path] = {}
    for path in waiting:
        for target in at_import_time(root, path):
            if target.parts[0] == "platform" and target not in seen:
                seen[target] = path
                waiting.append(target)
    assert seen, "no file of platform is used: the guard reads the wrong tree"
    outside = {
        f"{path} (for {user}) imports {name}"
        for path, user in seen.items()
        for name in top_level(root, path)
        if name.split(".")[0] not in sys.stdlib_module_names | {"okavango"}
    }
    assert outside == set()


def top_level(root: Path, path: Path) -> list[str]:
    """What a file imports when it is imported itself."""
    body = ast.parse((root / path).read_text()).body
    direct = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom | ast.Try | ast.With)]
    return [name for _, name in imports(path, ast.Module(direct, []))]


def at_import_time(root: Path, path: Path) -> set[Path]:
    """Files of ours that importing a file brings in, packages on the way included."""
    found = set()
    for name in top_level(root, path):
        steps = name.split(".")[1:] if within(name, "okavango") else []
        for end in range(1, len(steps) + 1):
            candidate = Path(*steps[:end])
            found.update({candidate.with_suffix(".py"), candidate / "__init__.py"})
    return {each for each in found if (root / each).is_file()}


def test_only_config_reads_the_environment(root: Path, modules: list[Path]) -> None:
    readers = {
        f"{path}:{node.lineno}"
        for path in modules
        if path != Path("platform/config.py")
        for node in ast.walk(ast.parse((root / path).read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv"}
    }
    assert readers == set()


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("serving/bad.py", "from okavango.training.loop import train"),
        ("serving/bad.py", "from okavango import training"),
        ("serving/bad.py", "from okavango.platform import catalog"),
        ("serving/adapters/bad.py", "from ...training import loop"),
        ("serving/bad.py", "import pydantic"),
        ("training/bad.py", "import okavango.serving.engine as engine"),
        ("training/bad.py", "def f():\n    from okavango.web import app"),
        ("modalities/bad.py", "import importlib\nimportlib.import_module('okavango.platform.catalog.store')"),
        ("modalities/bad.py", "if TYPE_CHECKING:\n    from okavango.serving.types import Request"),
        ("platform/bad.py", "def f():\n    import torch.nn"),
        ("platform/catalog/bad.py", "from okavango.modalities.content import Message"),
        ("migrations/bad.py", "from okavango.web import app"),
        ("web/bad.py", "import sqlalchemy.orm"),
    ],
)
def test_the_guard_sees_a_bad_import(tmp_path: Path, place: str, line: str) -> None:
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text(line + "\n")
    assert len(faults(tmp_path, [Path(place)])) == 1


@pytest.mark.parametrize(
    ("place", "line"),
    [
        (
            "web/good.py",
            "from okavango.serving.engine import Engine\nfrom okavango.platform.catalog import store",
        ),
        ("training/good.py", "from okavango.platform.catalog.store import Catalog"),
        ("serving/good.py", "from okavango.platform.bundle import verify\nimport platform, torch"),
        ("migrations/good.py", "import sqlalchemy as sa\nfrom alembic import op"),
    ],
)
def test_the_guard_lets_a_good_import_pass(tmp_path: Path, place: str, line: str) -> None:
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text(line + "\n")
    assert faults(tmp_path, [Path(place)]) == []
