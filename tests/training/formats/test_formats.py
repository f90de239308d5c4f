"""Each format's rows become the conversations that OpenAI's would, and faults name the row's own fields."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from okavango.modalities.content import Media, Message, Part, Text
from okavango.modalities.tiny_bundle import picture_bytes
from okavango.platform.errors import ConfigError, DataError
from okavango.training.check import check_dataset
from okavango.training.dataset import open_dataset
from okavango.training.formats.detect import FORMATS, detect, formats_of

ONE, TWO = picture_bytes(1), picture_bytes(2)
URL = f"data:image/png;base64,{base64.b64encode(ONE).decode()}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "1.png").write_bytes(ONE)
    (tmp_path / "2.png").write_bytes(TWO)
    return tmp_path


def said(role: str, *parts: str | bytes) -> Message:
    held: list[Part] = [Text(part) if isinstance(part, str) else Media("image", part) for part in parts]
    return Message(role, tuple(held))


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


def chat(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": each} for i, each in enumerate(contents)]


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PLAIN = (said("user", "Hi"), said("assistant", "Hello"))
SEEN = (said("user", ONE, "What?"), said("assistant", "a dog"))
ROWS: dict[str, tuple[str, dict[str, Any], tuple[Message, ...]]] = {
    # kind: (format, row, messages)
    "openai": ("openai", {"messages": chat("Hi", "Hello")}, PLAIN),
    "openai, image parts and a column": (
        "openai",
        {
            "messages": chat([{"type": "image"}, {"type": "text", "text": "What?"}], "a dog"),
            "images": ["1.png"],
        },
        SEEN,
    ),
    "openai, a medium in its part": (
        "openai",
        {"messages": chat([{"type": "image", "image": "1.png"}, {"type": "text", "text": "What?"}], "a dog")},
        SEEN,
    ),
    "openai, a column and no mark": ("openai", {"messages": chat("What?", "a dog"), "image": "1.png"}, SEEN),
    "openai, marks": (
        "openai",
        {"messages": chat("a <image> b\n<image>", "yes"), "images": ["1.png", URL]},
        (said("user", "a ", ONE, " b", ONE), said("assistant", "yes")),
    ),
    "sharegpt": ("sharegpt", {"conversations": talk("Hi", "Hello"), "id": 7}, PLAIN),
    "sharegpt, media in order": (
        "sharegpt",
        {"conversations": talk("<image><image>Both?", "yes"), "images": ["1.png", "2.png"], "system": "Be."},
        (said("system", "Be."), said("user", ONE, TWO, "Both?"), said("assistant", "yes")),
    ),
    "llava": ("llava", {"id": "a", "image": "1.png", "conversations": talk("<image>\nWhat?", "a dog")}, SEEN),
    "llava, the mark behind": (
        "llava",
        {"image": "1.png", "conversations": talk("What?\n<image>", "a dog")},
        (said("user", "What?", ONE), said("assistant", "a dog")),
    ),
    "alpaca": ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}, PLAIN),
    "alpaca, everything": (
        "alpaca",
        {
            "instruction": "Colour?",
            "input": "grass",
            "output": "green",
            "system": "Be.",
            "history": [["Hi", "Hello"]],
        },
        (
            said("system", "Be."),
            *PLAIN,
            said("user", "Colour?\ngrass"),
            said("assistant", "green"),
        ),
    ),
    "alpaca, a picture": ("alpaca", {"instruction": "What?", "output": "a dog", "image": "1.png"}, SEEN),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_becomes_the_conversation_that_it_holds(folder: Path, kind: str) -> None:
    name, row, messages = ROWS[kind]
    if name == "llava":
        assert formats_of(row) == {"llava"}
    dataset = open_dataset(write(folder, row))
    assert dataset.format == name
    assert dataset.row(0).messages == messages
    assert check_dataset(dataset.path).ok
    assert check_dataset(dataset.path, form=name).ok


@pytest.mark.parametrize(
    ("row", "field", "text"),
    [
        ({"conversations": []}, "conversations", "is empty"),
        ({"conversations": "x", "system": "y"}, "conversations", "must be a list, not a string"),
        ({"conversations": [7, *talk("a", "b")]}, "conversations[0]", "must be an object, not a number"),
        ({"conversations": [{"value": "x"}, *talk("a", "b")]}, "conversations[0].from", "is missing"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from", "is 'bot'; one of"),
        ({"conversations": [{"from": "human"}, *talk("a", "b")]}, "conversations[0].value", "is missing"),
        ({"conversations": talk("a", "b", "c")}, "conversations[2].from", "must be the assistant's"),
        ({"conversations": talk("a", "")}, "conversations[1].value", "text is empty"),
        ({"conversations": talk("a", None)}, "conversations[1].value", "must be a string, not null"),
        (
            {"conversations": [{**talk("a")[0], "weight": 1}, *talk("a", "b")[1:]]},
            "conversations[0].weight",
            "",
        ),
        ({"conversations": talk("a", "b"), "system": 3}, "system", "must be a string, not a number"),
        (
            {"conversations": talk("<image>", "b")},
            "conversations[0].value",
            "has an <image> mark, but the row",
        ),
        ({"conversations": talk("a", "b"), "images": ["1.png"]}, "images[0]", "is taken by no <image> mark"),
        ({"conversations": talk("<image>", "b"), "images": [4]}, "images[0]", "a path or a data URL"),
        ({"conversations": talk("<image>", "b"), "images": ["no.png"]}, "images[0]", "there is no file"),
        ({"conversations": talk("<image>", "b"), "image": "no.png"}, "image", "there is no file 'no.png'"),
        (
            {"conversations": talk("a", "<image>"), "image": "1.png"},
            "conversations[1].value",
            "holds no media",
        ),
        ({"instruction": "a"}, "output", "is missing"),
        ({"instruction": "a", "output": 7}, "output", "must be a string, not a number"),
        ({"instruction": ["a"], "output": "b"}, "instruction", "must be a string, not a list"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input", "must be a string, not a number"),
        ({"instruction": "a", "output": " "}, "output", "text is empty"),
        ({"instruction": "a", "output": "b", "history": "c"}, "history", "must be a list, not a string"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "history[0]", "a question and its answer"),
        ({"instruction": "a", "output": "b", "history": [["c", ""]]}, "history[0][1]", "text is empty"),
        ({"instruction": "a", "output": "b", "inputs": "c"}, "inputs", "did you mean input?"),
        ({"messages": chat("a", "b"), "images": ["no.png"]}, "images[0]", "there is no file"),
        (
            {"messages": chat([{"type": "image"}], "b")},
            "messages[0].content[0]",
            "the row holds no image for it",
        ),
        (
            {"messages": chat([{"type": "image", "image": 5}], "b")},
            "messages[0].content[0].image",
            "a path or a data URL, not a number",
        ),
        (
            {"messages": chat([{"type": "image", "image": "no.png"}], "b")},
            "messages[0].content[0].image",
            "there is no file",
        ),
        (
            {"messages": chat([{"type": "image"}, {"type": "text"}], "b"), "images": ["1.png"]},
            "messages[0].content[1].text",
            "is missing",
        ),
        ({"messages": chat("a", "b"), "instruction": "c", "output": "d"}, "instruction", "unknown key"),
    ],
)
def test_a_fault_stands_where_the_row_has_it(
    folder: Path, row: dict[str, Any], field: str, text: str
) -> None:
    known = {"llava": ("image",), "sharegpt": ("conversations",), "alpaca": ("instruction",)}
    form = next((name for name, keys in known.items() if set(keys) & row.keys()), "openai")
    form = "openai" if "messages" in row else form
    report = check_dataset(write(folder, row), form=form)
    found = [(fault.line, fault.field) for fault in report.faults]
    assert (1, field) in found
    assert text in next(fault.text for fault in report.faults if fault.field == field)
    others = {"output"} if "messages" in row else set()
    assert {name for _, name in found} - others == {field}


def test_a_row_of_another_format_is_a_fault_of_its_own(folder: Path) -> None:
    path = write(folder, ROWS["sharegpt"][1], ROWS["alpaca"][1], ROWS["openai"][1], {"conversations": []})
    report = check_dataset(path)
    assert report.format == "sharegpt"
    assert [(fault.line, fault.field) for fault in report.faults] == [(2, ""), (3, ""), (4, "conversations")]
    assert "as alpaca, and the data are read as sharegpt by its first rows" in report.faults[0].text
    named = check_dataset(path, form="alpaca")
    assert [fault.line for fault in named.faults] == [1, 3, 4]
    assert "as was asked for" in named.faults[0].text


def test_the_format_is_told_by_the_first_row_that_can() -> None:
    both, llava = {"conversations": talk("a", "b")}, ROWS["llava"][1]
    assert formats_of(both) == {"sharegpt", "llava"}
    for rows, name in [
        ([None, 3, {}, ROWS["alpaca"][1]], "alpaca"),
        ([both, both, llava], "llava"),
        ([both, ROWS["sharegpt, media in order"][1], llava], "sharegpt"),
        ([both], "sharegpt"),
        ([{"messages": None, "instruction": "a"}], "alpaca"),
    ]:
        found = detect(rows)
        assert found is not None
        assert found.name == name
    assert detect([{"a": 1}, [], None]) is None
    assert formats_of({"messages": [], "conversations": []}) == set()


def test_a_format_that_does_not_exist_is_refused_with_the_nearest(folder: Path) -> None:
    path = write(folder, ROWS["sharegpt"][1])
    with pytest.raises(ConfigError, match="did you mean sharegpt"):
        open_dataset(path, form="sharegtp")
    with pytest.raises(ConfigError, match="no format"):
        check_dataset(path, form="x")
    assert list(FORMATS) == ["openai", "sharegpt", "llava", "alpaca"]


def test_the_same_bytes_in_another_format_are_another_dataset(folder: Path) -> None:
    path = write(folder, {"conversations": talk("a", "b")})
    assert open_dataset(path, form="llava").digest != open_dataset(path, form="sharegpt").digest


def test_media_are_named_as_the_row_names_them(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "images/1.png").write_bytes(ONE)
    rows = [
        {"conversations": talk("<image><image>", "b"), "images": ["images/1.png", URL]},
        {"conversations": talk("a", "b")},
    ]
    dataset = open_dataset(write(folder, *rows))
    assert [dataset.names(i) for i in range(2)] == [["1.png"], []]
    with pytest.raises(DataError):
        open_dataset(dataset.path, allow_files=False).row(0)


def test_the_documented_rows_are_what_they_are_said_to_be(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "images/1.png").write_bytes(ONE)
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\{.*\})` \|", text, re.MULTILINE)
    assert {name for name, _ in rows} == FORMATS.keys()
    for name, row in rows:
        path = folder / "row.jsonl"
        path.write_text(row + "\n")
        dataset = open_dataset(path)
        assert dataset.format == name
        said = [message for message in dataset.row(0).messages if message.media]
        assert [message.media[0].data for message in said] == [ONE]
        assert dataset.row(0).messages[-1].text == "dog face"
