"""Tables are real files, written by datasets and read through it."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

from okavango.modalities.content import Media, Message, Text
from okavango.modalities.tiny_bundle import picture_bytes
from okavango.platform.errors import DataError
from okavango.training.check import check_dataset
from okavango.training.dataset import Dataset, open_dataset

ONE, TWO = picture_bytes(1), picture_bytes(2)
ROWS = [
    {"instruction": "What?", "output": name, "image": {"bytes": data, "path": None}}
    for name, data in (("one", ONE), ("two", TWO))
]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


@pytest.fixture
def table() -> Any:
    text = datasets.Value("string")
    features = {"instruction": text, "output": text, "image": datasets.Image()}
    return datasets.Dataset.from_list(ROWS, features=datasets.Features(features))


def opened(path: Path, cache: Path, **options: Any) -> Dataset:
    return open_dataset(path, cache=cache / "cache", **options)


def seen(dataset: Dataset) -> list[tuple[Message, ...]]:
    return [example.messages for example in dataset.rows()]


def expected(name: str, data: bytes) -> tuple[Message, ...]:
    question = Message("user", (Media("image", data), Text("What?")))
    return question, Message("assistant", (Text(name),))


BOTH = [expected("one", ONE), expected("two", TWO)]


def test_pictures_in_parquet_are_taken_as_they_are_stored(tmp_path: Path, table: Any) -> None:
    table.to_parquet(tmp_path / "data.parquet")
    dataset = opened(tmp_path / "data.parquet", tmp_path)
    assert (dataset.format, seen(dataset)) == ("alpaca", BOTH)
    assert dataset.row(1).messages == BOTH[1]
    assert dataset.where(1) == f"{tmp_path / 'data.parquet'}: row 2"
    # an upload has no suffix, and what it holds is data, not a name
    upload = shutil.copy(tmp_path / "data.parquet", tmp_path / "file-1")
    assert seen(opened(upload, tmp_path, allow_files=False)) == BOTH
    assert dataset.digest == opened(upload, tmp_path).digest


def test_messages_in_parquet_leave_unset_what_arrow_fills_in(tmp_path: Path) -> None:
    content = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    answer = [{"type": "text", "text": "one"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    turn = {"role": datasets.Value("string"), "content": [part]}
    features = datasets.Features({"messages": [turn], "images": datasets.List(datasets.Image())})
    rows = [{"messages": messages, "images": [{"bytes": ONE, "path": "dog.png"}]}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data.parquet")
    dataset = opened(tmp_path / "data.parquet", tmp_path)
    assert seen(dataset) == [expected("one", ONE)]
    assert dataset.names(0) == ["dog.png"]


def test_cells_of_csv_are_text_and_empty_ones_are_none(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('instruction,input,output,extra\n"Two\nlines",,007,x\nSum?,1+1,NA,\nNone?,,,y\n')
    dataset = opened(path, tmp_path)
    texts = [[message.text for message in dataset.row(i).messages] for i in range(2)]
    assert texts == [["Two\nlines", "007"], ["Sum?\n1+1", "NA"]]
    report = check_dataset(path, cache=tmp_path / "cache")
    assert [str(fault) for fault in report.faults] == [f"{path}: row 3: output: is missing"]
    assert [(each.row, each.field, each.text) for each in report.warnings] == [
        (None, "extra", "is a column that is not used")
    ]
    (tmp_path / "data.tsv").write_text("instruction\toutput\na,b\tc\n")
    assert opened(tmp_path / "data.tsv", tmp_path).row(0).messages[0].text == "a,b"


def test_a_misspelt_column_is_no_unused_one(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("instruction,imput,output\na,b,c\n")
    [fault] = check_dataset(path, cache=tmp_path / "cache").faults
    assert (fault.row, fault.field, fault.text) == (1, "imput", "unknown key; did you mean input?")


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("cut.parquet", b"PAR1 and no more", "cannot be read: .*Parquet"),
        ("ragged.csv", b"instruction,output\na,b\nc,d,e\n", "Expected 2 fields in line 3, saw 3"),
        ("twice.csv", b"output,output\na,b\n", "name each column once"),
        ("latin.csv", b"instruction,output\na,\xff\n", "cannot be read: .*utf-8"),
        ("other.csv", b"question,answer\na,b\n", r"no known format: question, answer.*alpaca: instruction"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(tmp_path: Path, name: str, data: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=text) as caught:
        opened(tmp_path / name, tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_saved_datasets_and_their_splits(tmp_path: Path, table: Any) -> None:
    table.save_to_disk(tmp_path / "one")
    assert seen(opened(tmp_path / "one", tmp_path)) == BOTH
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "many")
    assert len(opened(Path(f"{tmp_path}/many#test"), tmp_path)) == 1
    with pytest.raises(DataError, match=r"several splits: train, test \(name one: .*many#train"):
        opened(tmp_path / "many", tmp_path)
    with pytest.raises(DataError, match="has no split 'x'"):
        opened(Path(f"{tmp_path}/many#x"), tmp_path)
    with pytest.raises(DataError, match="has no splits"):
        opened(Path(f"{tmp_path}/one#train"), tmp_path)
    digests = {
        opened(tmp_path / "one", tmp_path).digest,
        opened(Path(f"{tmp_path}/many#train"), tmp_path).digest,
    }
    assert len(digests) == 1


def test_a_folder_of_pictures_with_a_table_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for name, data in (("one", ONE), ("two", TWO)):
        (folder / f"{name}.png").write_bytes(data)
        rows.append({"file_name": f"{name}.png", "instruction": "What?", "output": name})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = opened(folder, tmp_path)
    assert seen(dataset) == BOTH
    assert dataset.names(0) == ["one.png"]


def test_a_table_names_no_file_outside_its_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(ONE)
    (tmp_path / "data").mkdir()
    text = datasets.Value("string")
    features = datasets.Features({"instruction": text, "output": text, "image": datasets.Image()})
    rows = [{"instruction": "a", "output": "b", "image": {"bytes": None, "path": str(secret)}}]
    path = tmp_path / "data" / "data.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    for allow_files, text in ((True, "outside the data file's folder"), (False, "only data URLs")):
        report = check_dataset(path, allow_files=allow_files, cache=tmp_path / "cache")
        assert [fault.field for fault in report.faults] == ["image"]
        assert text in report.faults[0].text


def test_arrow_files_are_taken_from_this_machine_only(tmp_path: Path, table: Any) -> None:
    table.save_to_disk(tmp_path / "saved")
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    path = arrow.rename(tmp_path / "rows.arrow")
    assert seen(opened(path, tmp_path)) == BOTH
    with pytest.raises(DataError, match="send parquet"):
        opened(path, tmp_path, allow_files=False)
