"""The benchmarks of the engine, as `make bench` starts them, on the tiny base: they run, and their files hold
what they say. What they measure is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(program: str, out: Path, *arguments: str) -> None:
    command = [sys.executable, str(BENCHMARKS / program), "--base", "tiny", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_comparison_measures_every_side_and_writes_both_files(tmp_path: Path) -> None:
    work = {"requests": 3, "prompt": 8, "answer": 8}
    small = [word for name, number in work.items() for word in (f"--{name}", str(number))]
    run("run.py", tmp_path, "--rounds", "1", "--arrivals", "3", "--dtype", "float32", *small)
    found = read(tmp_path / "cpu.json")
    assert found["work"] == work
    together = {"base", "1 adapter", "8 adapters mixed"}
    assert set(found["arrivals"]) == together
    assert set(found["cases"]) == {*together, "single stream", "single stream, adapter"}
    for name, case in found["cases"].items():
        bare = "adapter" not in name
        assert set(case["peers"]) == {"generate + PEFT"} | ({"generate_batch"} if bare else set())
        # In float32 the same weights and prompts give the same answers on every side.
        assert {peer["first_equal"] for peer in case["peers"].values()} == {1.0}, name
    assert found["memory"]["peak"] >= found["memory"]["loaded"] > 0
    shown = (tmp_path / "cpu.md").read_text()
    assert f"| 8 adapters mixed | **{found['cases']['8 adapters mixed']['rate']:.1f}** |" in shown


def test_what_media_cost_is_measured_beside_the_decoder_alone(tmp_path: Path) -> None:
    small = {"rounds": 1, "requests": 2, "prompt": 8, "answer": 4, "pictures": 3}
    run(
        "media.py", tmp_path, *(word for name, number in small.items() for word in (f"--{name}", str(number)))
    )
    found = read(tmp_path / "media.json")
    assert found["runs"] == [1, 8]
    assert {name: len(each) for name, each in found["rates"].items()} == {"whole": 1, "decoder alone": 1}
    assert set(found["gaps"]) == {"nothing", "texts", "pictures"}
    assert min(found["resident"].values()) > 0
    assert "| one picture |" in (tmp_path / "media.md").read_text()


def test_a_killed_job_is_timed_until_it_trains_again(tmp_path: Path) -> None:
    run("recovery.py", tmp_path, "--rounds", "1", "--steps", "3", "--kill", "process")
    (found,) = read(tmp_path / "recovery.json")["found"]["SQLite"]["process"]
    assert 0 < found["claimed"] < found["seconds"]
    assert "| the job's process |" in (tmp_path / "recovery.md").read_text()


def test_curves_have_all_their_points(tmp_path: Path) -> None:
    run("curves.py", tmp_path, "--only", "registered", "context", "prefix", "--most", "1024")
    found = read(tmp_path / "curves.json")["curves"]
    assert [point["label"] for point in found["context"]] == ["256", "512", "1024"]
    assert [point["label"] for point in found["registered"]][-2:] == ["1000, evenly", "1000, skewed"]
    points = [point for curve in found.values() for point in curve]
    assert {len(point["figures"]["errors"]) for point in points} == {0}
    assert all(point["figures"]["short"] == 0 < point["figures"]["output_rate"] for point in points)
    shown = (tmp_path / "curves.md").read_text()
    assert [line for line in shown.splitlines() if line.startswith("## ")] == [
        "## Adapters registered",
        "## Context",
        "## Prefix shared or not",
    ]
