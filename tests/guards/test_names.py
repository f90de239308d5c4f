"""Public names explain themselves: modules and classes have docstrings, and the error tree is drawn whole."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from okavango.platform import errors


def undocumented(path: Path, tree: ast.Module) -> Iterator[str]:
    """A class of nothing but fields or columns may let them speak."""
    if tree.body and ast.get_docstring(tree) is None:
        yield str(path)
    for node in tree.body:
        if (
            isinstance(node, ast.ClassDef)
            and not node.name.startswith("_")
            and ast.get_docstring(node) is None
        ):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
            if any(not method.name.startswith("_") for method in methods):
                yield f"{path}:{node.lineno}: {node.name}"


def test_modules_and_public_classes_say_what_they_are(root: Path, modules: list[Path]) -> None:
    found = [name for path in modules for name in undocumented(path, ast.parse((root / path).read_text()))]
    assert found == []


def test_the_guard_sees_what_is_undocumented() -> None:
    def found(source: str) -> list[str]:
        return list(undocumented(Path("x.py"), ast.parse(source)))

    method = "    def run(self): ...\n"
    assert found("x = 1") == ["x.py"]
    assert found(f'"""x"""\nclass Big:\n{method}') == ["x.py:2: Big"]
    assert found(f'"""x"""\nclass _Big:\n{method}') == []
    assert found('"""x"""\nclass Small:\n    field: int') == []


def test_the_error_tree_is_drawn_whole() -> None:
    """Every class stands in the tree, below the class that it derives from."""
    above: list[str] = []
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"([│├└─ ]*)(\w+Error)\b", line):
            depth = len(match[1]) // 4
            above[depth:] = [match[2]]
            drawn[match[2]] = above[depth - 1] if depth else "Exception"
    classes = [
        each for _, each in inspect.getmembers(errors, inspect.isclass) if each.__module__ == errors.__name__
    ]
    assert drawn == {each.__name__: each.__bases__[0].__name__ for each in classes}
