import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from okavango.modalities.content import Limits
from okavango.training.check import check_dataset
from okavango.training.dataset import open_dataset
from okavango.training.sources import json_array
from okavango.training.sources.json_array import JsonArray


def array_of(folder: Path, text: str) -> JsonArray:
    path = folder / "data.json"
    path.write_text(text)
    return JsonArray(path, Limits())


def row(answer: str) -> dict[str, Any]:
    return {"instruction": "a", "output": answer}


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\[]{},\n é', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\]}', max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(_VALUES, max_size=6),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_elements_are_those_of_the_parsed_array_whatever_the_chunks(
    tmp_path: Path, values: list[Any], chunk: int, indent: int | None, ascii_only: bool
) -> None:
    before, json_array._CHUNK = json_array._CHUNK, chunk
    try:
        source = array_of(tmp_path, f" {json.dumps(values, indent=indent, ensure_ascii=ascii_only)}\n")
    finally:
        json_array._CHUNK = before
    assert source.fault() is None
    assert len(source) == len(values)
    assert [raw.value for raw, _ in source.rows()] == values
    assert [source.row(i).value for i in reversed(range(len(values)))] == values[::-1]


def test_rows_have_their_number_and_the_line_on_which_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([row("a"), row(""), row("b"), {"instruction": ""}], indent=2))
    report = check_dataset(path)
    assert [str(fault) for fault in report.faults] == [
        f"{path}:6: row 2: output: the assistant's text is empty",
        f"{path}:14: row 4: output: is missing",
    ]
    assert report.faults[0].to_json()["row"] == 2
    assert open_dataset(path).where(2) == f"{path}:10: row 3"


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("[", ["the array is not closed in line 1"]),
        ('[{"instruction": "a"', ["is not JSON", "the array is not closed in line 1"]),
        ("[\n1] x", ["not a JSON object", "more follows the array in line 2"]),
        ("[\n1\n}", ["not a JSON object", "[ is closed by } in line 3"]),
        ("[1,]", ["not a JSON object", "the row is blank"]),
        ("[,1]", ["the row is blank", "not a JSON object"]),
        ('[{"a" 1},\n 2]', ["is not JSON: Expecting ':' delimiter at column 6", "not a JSON object"]),
        ("[]", ["there are no rows"]),
    ],
)
def test_what_breaks_an_array_is_told_with_its_place(tmp_path: Path, text: str, faults: list[str]) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    found = [fault.text for fault in check_dataset(path).faults]
    assert len(found) == len(faults)
    for one, expected in zip(found, faults, strict=True):
        assert expected in one


def test_json_that_is_no_array_is_read_a_line_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text(f"\n{json.dumps(row('b'))}\n")
    assert [fault.text for fault in check_dataset(path).faults] == ["the line is blank"]
    path.write_text(f" \n[{json.dumps(row('b'))}]")
    assert check_dataset(path).counts.rows == 1
    assert check_dataset(path).ok
