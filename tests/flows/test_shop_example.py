"""The shop example as its users start it, on the tiny base and with made-up photos."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fashion_photos import write_photos
from server_fixtures import Site

EXAMPLE = Path(__file__).parents[2] / "examples" / "shop_demo.py"
Example = Callable[..., str]


@pytest.fixture
def example(site: Site) -> Iterator[Example]:
    """example("--steps", "2"): what it prints."""
    homes = {"OKAVANGO_HOME": str(site.settings.home), "OKAVANGO_CACHE": str(site.settings.cache)}
    environ = os.environ | homes | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}

    def run(*arguments: str) -> str:
        command = [sys.executable, str(EXAMPLE), *arguments]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    yield run
    run("--stop")


def test_two_shops_are_trained_served_and_scored(example: Example, site: Site, tmp_path: Path) -> None:
    photos = ["--source", str(write_photos(tmp_path / "photos")), "--photos", "60", "--data", str(tmp_path)]
    shown = example("--base", "tiny", "--steps", "2", "--score", "3", "--examples", "2", *photos)
    assert "One photo, two shops" in shown
    for style, ways in (("ledger", 4), ("chatty", 3)):
        assert f"{style}: 3 held-out photos" in shown
        scored = shown.partition(f"{style}: 3 held-out photos")[2].split("held-out photos")[0]
        assert scored.count(" of 3 ") == ways
