"""What the documents say still holds: commands, printed trees, links. And what no file may say."""

from __future__ import annotations

import ast
import re
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from okavango.platform.cli import app
from okavango.platform.config import PREFIX, Settings

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"")
SHELL = {"", "sh", "bash", "shell", "console"}


@pytest.fixture(scope="module")
def documents(root: Path, tracked: list[Path]) -> dict[Path, str]:
    return {path: (root / path).read_text() for path in tracked if path.suffix == ".md"}


@pytest.fixture(scope="module")
def targets(root: Path) -> set[str]:
    """Verbs of the Makefile."""
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (root / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def cli() -> Any:
    """The root of the `okavango` command, with every part's commands."""
    return typer.main.get_command(app)


# Commands


def commands(text: str) -> Iterator[list[str]]:
    """Words of each `make …` and `okavango …` in shell blocks and in inline code."""
    blocks = [
        body.replace("\\\n", " ").splitlines() for language, body in FENCE.findall(text) if language in SHELL
    ]
    lines = [line for block in blocks for line in block] + INLINE.findall(FENCE.sub("", text))
    for line in lines:
        for piece in re.split(r"&&|;|\s\|\s", line):
            words = words_of(piece)
            while words and re.fullmatch(r"\$|\w+=.*", words[0]):
                words.pop(0)
            if words and words[0].split("/")[-1] in {"make", "okavango"}:
                yield [words[0].split("/")[-1], *words[1:]]


def words_of(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # prose with an apostrophe
        return line.split()


def make_faults(words: list[str], targets: set[str]) -> list[str]:
    asked = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
    return [f"make has no {word}" for word in asked if word not in targets]


def cli_faults(words: list[str], command: Any) -> list[str]:
    """Walk down the groups that the words name; then every option must be the command's own."""
    for i, word in enumerate(words[1:], start=1):
        word = word.strip("[]")
        children = getattr(command, "commands", {})
        if word.startswith("-"):
            if word.split("=")[0] not in options_of(command):
                return [f"{' '.join(words[:i])} has no {word}"]
        elif children and re.fullmatch(r"[a-z][\w|-]*", word):
            unknown = [name for name in word.split("|") if name not in children]
            if unknown:
                return [f"{' '.join(words[:i])} has no {', '.join(unknown)}"]
            command = children[word.split("|")[0]]
    return []


def options_of(command: Any) -> set[str]:
    return {"--help"}.union(*(set(each.opts) | set(each.secondary_opts) for each in command.params))


def command_faults(text: str, targets: set[str], cli: Any) -> list[str]:
    found = []
    for words in commands(text):
        found += make_faults(words, targets) if words[0] == "make" else cli_faults(words, cli)
    return found


def test_commands_in_the_documents_exist(documents: dict[Path, str], targets: set[str], cli: Any) -> None:
    assert any(words[0] == "okavango" for words in commands(documents[Path("README.md")]))
    assert any(words[0] == "make" for words in commands(documents[Path("README.md")]))
    faults = {
        path: found for path, text in documents.items() if (found := command_faults(text, targets, cli))
    }
    assert faults == {}


def named_in_code(source: str) -> str:
    """A program's text, with its strings that begin with a command set in inline code: remedies of errors."""
    strings = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    remedies = [each for each in strings if isinstance(each, str) and re.match(r"okavango [a-z]", each)]
    return "\n".join([source, *(f"`{remedy.strip()}`" for remedy in remedies)])


def test_commands_that_the_code_names_exist(
    root: Path, modules: list[Path], targets: set[str], cli: Any
) -> None:
    texts = {path: named_in_code((root / path).read_text()) for path in modules}
    faults = {path: found for path, text in texts.items() if (found := command_faults(text, targets, cli))}
    assert faults == {}


def test_the_guard_sees_a_bad_remedy(targets: set[str], cli: Any) -> None:
    bad = 'raise InputError("no", remedy=f"okavango adapters shwo {name}")'
    assert command_faults(named_in_code(bad), targets, cli) == ["okavango adapters has no shwo"]


@pytest.mark.parametrize(
    "text",
    [
        "Run `make tests`.",
        "`okavango base biuld starter`",
        "`okavango adapters list|remove-all`",
        "```bash\n$ FOO=1 .venv/bin/okavango train \\\n    --base starter --no-such-option 3\n```",
        "```\nmake setup && okavango srve\n```",
    ],
)
def test_the_guard_sees_a_bad_command(text: str, targets: set[str], cli: Any) -> None:
    assert len(command_faults(text, targets, cli)) == 1


def test_the_guard_lets_good_commands_pass(targets: set[str], cli: Any) -> None:
    text = (
        "`make test ARGS=x`, `okavango base build starter`, `okavango`\n```sh\nmake check  # it's slow\n```\n"
    )
    assert command_faults(text, targets, cli) == []
    assert len(list(commands(text))) == 4


def test_settings_in_the_documents_exist(documents: dict[Path, str]) -> None:
    known = {PREFIX + field.name.upper() for field in fields(Settings)}
    named = {name for text in documents.values() for name in re.findall(rf"\b{PREFIX}[A-Z_]+\b", text)}
    assert named
    assert named - known == set()


# Trees


def tree_of(text: str) -> list[Path]:
    """Paths that the printed trees of a document name: blocks in which a line begins with platform/.

    Two columns: names, separated by two spaces or more, then what they are for. Indentation or box-drawing
    characters tell the depth.
    """
    paths: list[Path] = []
    for language, body in FENCE.findall(text):
        if language in {"", "text"} and re.search(r"^\W*platform/", body, re.MULTILINE):
            paths += tree_paths(body)
    return paths


def tree_paths(body: str) -> Iterator[Path]:
    above: list[tuple[int, Path]] = []
    for line in body.splitlines():
        indent = len(line) - len(line.lstrip(" │├└─"))
        while above and above[-1][0] >= indent:
            above.pop()
        parent = above[-1][1] if above else Path()
        for name in names_of(line[indent:]):
            yield parent / name
            if name.endswith("/"):
                above.append((indent, parent / name))


def names_of(row: str) -> Iterator[str]:
    for cell in re.split(r" {2,}", row):
        if not re.fullmatch(r"[\w./-]+/|[\w./-]*\.\w+|Makefile|LICENSE", cell):
            return
        yield cell


def test_printed_trees_exist(root: Path, documents: dict[Path, str]) -> None:
    for document, text in documents.items():
        missing = [str(path) for path in tree_of(text) if not (root / path).exists()]
        assert (document, missing) == (document, [])


def test_the_readme_prints_every_folder(
    tracked: list[Path], parts: list[str], documents: dict[Path, str]
) -> None:
    printed = set(tree_of(documents[Path("README.md")]))
    folders = {path.parents[-2] for path in tracked if len(path.parts) > 1}
    folders |= {path.parent for path in tracked if path.parts[0] in parts}
    folders -= {folder for folder in folders if folder.name == "versions" or folder.name.startswith(".")}
    assert folders - printed == set()


INDENTED = """
```
platform/     what all stands on
  cli.py  config.py   two files
  catalog/
    x.py
web/
```
"""
DRAWN = """
```text
├── platform/        what all stands on
│   ├── cli.py
│   ├── config.py    settings
│   └── catalog/
│       └── x.py
└── web/
```
"""


@pytest.mark.parametrize("text", [INDENTED, DRAWN])
def test_the_guard_reads_trees(text: str) -> None:
    inside = ["cli.py", "config.py", "catalog", "catalog/x.py"]
    expected = [Path("platform"), *(Path("platform") / name for name in inside), Path("web")]
    assert tree_of(text) == expected


# Links


def slugs(text: str) -> set[str]:
    """Anchors of a document's headings, as code hosts make them."""
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def link_fault(root: Path, document: Path, link: str) -> str | None:
    name, _, fragment = link.partition("#")
    target = root / document.parent / name if name else root / document
    if not target.exists():
        return f"{document}: {link} leads nowhere"
    if fragment and target.suffix == ".md" and fragment not in slugs(target.read_text()):
        return f"{document}: {link} names no heading"
    return None


def test_relative_links_resolve(root: Path, documents: dict[Path, str]) -> None:
    faults = []
    for document, text in documents.items():
        links = ["".join(groups) for groups in LINK.findall(INLINE.sub("", FENCE.sub("", text)))]
        relative = [link for link in links if not re.match(r"[a-z]+:", link)]
        faults += [fault for link in relative if (fault := link_fault(root, document, link))]
    assert faults == []


# What belongs to one machine or one registry


def machine_paths(root: Path) -> list[str]:
    """Folders that only this machine has. A parent that every machine has says nothing."""
    common = {Path("/"), Path("/home"), Path("/opt"), Path("/srv"), Path("/tmp"), Path(tempfile.gettempdir())}
    return [f"{folder}/" for folder in (root, root.parent, Path.home()) if folder not in common]


def lines_with(root: Path, tracked: list[Path], pattern: str) -> list[str]:
    found = []
    for path in tracked:
        text = (root / path).read_bytes().decode(errors="ignore")
        found += [f"{path}: {line.strip()[:120]}" for line in text.splitlines() if re.search(pattern, line)]
    return found


def test_no_paths_of_this_machine(root: Path, tracked: list[Path]) -> None:
    pattern = "|".join(rf"(?<![\w.]){re.escape(path)}" for path in machine_paths(root))
    assert lines_with(root, tracked, pattern) == []


def test_no_package_registries(root: Path, tracked: list[Path]) -> None:
    hosts = ["py" + "pi", "python" + "hosted", "npm" + "js", "deb" + "ian"]
    assert lines_with(root, tracked, rf"({'|'.join(hosts)})\.(org|com|io)\b") == []
