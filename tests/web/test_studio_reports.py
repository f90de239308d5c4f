"""A data check's report as the training page shows it, of data that were really checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from server_fixtures import data_url
from training_fixtures import picture_row, text_row, write_rows

from okavango.modalities.base import Base
from okavango.modalities.tiny_bundle import picture_bytes
from okavango.training.check import check_dataset
from okavango.training.measure import measure_of
from okavango.training.spec import parse_spec
from okavango.web.studio.reports import checking, report

GOOD = picture_row(data_url(picture_bytes(1)), "red fox")


@pytest.fixture
def found(tmp_path: Path, tiny_base: Base) -> Any:
    def check(*rows: dict[str, Any], keep: int = 10) -> dict[str, Any]:
        path = write_rows(tmp_path / "my <rows>.jsonl", rows)
        usual = parse_spec({"base": "tiny", "data": path, "name": "x"})
        report = check_dataset(path, measure=measure_of(tiny_base, usual), keep=keep, allow_files=False)
        return report.to_json() | {"file": path.name}

    return check


def test_good_data_tell_what_they_hold(found: Any) -> None:
    page = report(found(GOOD, text_row("hi", "there")))
    assert "No faults in 2 rows" in page
    for held in ("openai", "2 with 4 messages", "1 distinct", "in batches of 2", "activations"):
        assert held in page
    assert "my &lt;rows&gt;.jsonl" in page
    assert "okv-faults" not in page


def test_every_fault_has_its_place_and_remedy(found: Any) -> None:
    page = report(found(GOOD, picture_row("/etc/passwd", "x"), {"messages": "none"}))
    assert "2 faults in 2 of 3 rows" in page
    assert "no job starts with them" in page
    assert page.count("<tr><td>") == 2
    for shown in ("<td>2</td>", "messages[0].content[0].image_url.url", "send data:image/"):
        assert shown in page


def test_more_faults_than_are_listed_are_counted(found: Any) -> None:
    page = report(found(*[{"messages": i} for i in range(30)], keep=10))
    assert "30 faults" in page
    assert "… and 20 more faults" in page


def test_warnings_are_folded_and_refuse_nothing(found: Any) -> None:
    page = report(found(GOOD, GOOD))
    assert "No faults in 2 rows, 1 warning" in page
    assert "<details><summary>1 warning</summary>" in page
    assert "the same conversation as line 1" in page


def test_what_only_matters_for_learning_can_be_left_out(found: Any) -> None:
    page = report(found(GOOD), brief=True)
    assert "No faults in 1 row" in page
    assert "memory" not in page


def test_what_stands_in_data_does_not_become_markup(found: Any) -> None:
    odd = json.loads(json.dumps(GOOD).replace("red fox", "x")) | {"<img src=x>": 1}
    page = report(found(odd))
    assert "<img" not in page
    assert "&lt;img" in page


def test_a_check_on_its_way_says_how_much_was_read() -> None:
    assert "12.3 MB read" in checking(12_345_678)
    assert "opened" in checking(0)
