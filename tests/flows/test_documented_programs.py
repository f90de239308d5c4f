"""The Python programs of README and docs/serving.md, run as they stand against a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from server_fixtures import RunningServer, Site

from okavango.modalities.tiny_bundle import picture_bytes, write_tiny_bundle

ROOT = Path(__file__).parents[2]
PROGRAM = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture
def run(
    site: Site,
    make_server: Callable[..., RunningServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], dict[str, Any]]:
    """run("README.md"): the names that its programs leave, one after the other."""
    write_tiny_bundle(tmp_path / "bundle", site.base, joint=True)
    site.publish("emoji", tmp_path / "bundle")
    server = make_server()
    picture = tmp_path / "emoji" / "images" / "1f436.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(picture_bytes(3))
    monkeypatch.chdir(tmp_path)

    def run(document: str) -> dict[str, Any]:
        program = "".join(PROGRAM.findall((ROOT / document).read_text()))
        assert ADDRESS in program
        names: dict[str, Any] = {}
        exec(program.replace(ADDRESS, server.url).replace('"starter"', '"tiny"'), names)
        return names

    return run


def test_the_readmes(run: Callable[[str], dict[str, Any]]) -> None:
    names = run("README.md")
    schema, last = names["schema"], json.loads(names["answer"].choices[0].message.content)
    assert list(last) == schema["required"]
    assert last["kind"] in schema["properties"]["kind"]["enum"]


def test_those_of_the_api(run: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    run("docs/serving.md")
    assert "'base': 'tiny'" in capsys.readouterr().out
