"""benchmarks/serving.py, as people start it, against the real server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_fixtures import RunningServer

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "serving.py"
# Few words and tokens: the tiny base has a token a byte, and a context of 512.
SMALL = ["--endpoint", "chat", "--prompt", "8", "--answer", "12", "--requests", "9"]
ALL = ["--model", "tiny", "--model", "r4", "--model", "r8"]
LENGTH = ["--no-extras", "--body", '{"ignore_eos": true}']


@pytest.fixture
def load(server: RunningServer, tmp_path: Path) -> Any:
    def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
        out = tmp_path / "out.json"
        command = [sys.executable, str(PROGRAM), "--url", server.url, *SMALL, "--out", str(out), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert out.is_file(), done.stderr
        return done.returncode, json.loads(out.read_text()), done.stdout

    return run


def test_requests_are_spread_over_models_and_timed(load: Any) -> None:
    code, found, shown = load(
        *LENGTH, "--model", "tiny", "--model", "r4", "--model", "r8", "--concurrency", "4"
    )
    assert code == 0
    figures = found["figures"]
    assert (figures["requests"], figures["errors"], figures["short"]) == (9, {}, 0)
    assert figures["output_tokens"] == 9 * 12
    assert {model: each["requests"] for model, each in found["models"].items()} == dict.fromkeys(
        ("tiny", "r4", "r8"), 3
    )
    assert (
        0 < figures["first"]["p50"] <= figures["first"]["p95"] <= figures["whole"]["p99"] < figures["seconds"]
    )
    assert figures["gap"]["p50"] > 0
    assert figures["decode_rate"] > 0
    assert "output tokens/s" in shown


def test_prompts_of_token_ids_have_the_length_that_was_asked_for(load: Any) -> None:
    code, found, _ = load(*ALL, "--endpoint", "completions", "--vocabulary", "250")
    assert code == 0
    figures = found["figures"]
    assert (figures["prompt_tokens"], figures["output_tokens"], figures["short"]) == (9 * 8, 9 * 12, 0)


def test_adapters_answer_among_others_as_alone(load: Any) -> None:
    code, found, shown = load(*LENGTH, *ALL, "--model", 'tiny {"top_p": 0.5}', "--check")
    assert code == 0
    assert found["check"]["mistaken"] == {}
    assert set(found["check"]["alike"].values()) == {1.0}
    assert found["check"]["twins"] == {'tiny {"top_p": 0.5}': "tiny"}
    assert "100%, 100%" in shown


def test_arrivals_at_a_rate_take_the_time_that_they_take(load: Any) -> None:
    code, found, _ = load(*LENGTH, "--model", "tiny", "--rate", "30", "--no-stream", "--seed", "s")
    assert code == 0
    assert found["figures"]["output_tokens"] == 9 * 12
    assert found["figures"]["first"] is None
    assert found["options"]["seed"] == "s"


def test_failures_are_counted_by_message_and_end_with_1(load: Any) -> None:
    code, found, shown = load(*LENGTH, "--model", "tiny", "--model", 'r4 {"top_p": 7}', "--model", "nobody")
    assert code == 1
    assert found["figures"]["output_tokens"] == 3 * 12
    assert sorted(found["figures"]["errors"].values()) == [3, 3]
    assert "400 top_p" in shown
    assert "404" in shown
