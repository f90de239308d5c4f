"""25 different faults, one a row, over all formats: each is reported once, with its row, field and reason."""

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from typer.testing import CliRunner

from okavango.modalities.tiny_bundle import picture_bytes
from okavango.training.commands import data

PNG = picture_bytes(1)
URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


def chat(question: Any, answer: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def talk(*turns: tuple[str, Any], **keys: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": said} for who, said in turns], **keys}


def picture(url: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]


def dumped(row: Any) -> bytes:
    return json.dumps(row).encode()


OPENAI = [
    # (line, field, text)
    (b'{"messages": [}', "", "is not JSON: Expecting value at column 15"),
    (b'{"messages": "\xff"}', "", "is not UTF-8: byte 0xff at position 15"),
    (b"", "", "the line is blank"),
    (b'{"messages": [], "messages": []}', "", "the key 'messages' stands twice in one object"),
    (dumped([1]), "", "the row is not a JSON object"),
    (dumped({"message": 1, **chat("a", "b")}), "message", "unknown key; did you mean messages?"),
    (dumped({"messages": chat("a", "b")["messages"][:1]}), "messages", "has no assistant turn"),
    (dumped(chat("a", " ")), "messages[1].content", "the assistant's text is empty"),
    (dumped(chat(picture("gone.png"), "b")), "messages[0].content[0].image_url.url", "there is no file"),
    (dumped(chat(picture("../x.png"), "b")), "messages[0].content[0].image_url.url", "lies outside"),
    (dumped(chat(picture("cut.png"), "b")), "messages[0].content[0].image_url.url", "truncated or damaged"),
    (dumped(chat("a\ud800", "b")), "messages[0].content", "half a surrogate pair at character 2"),
    (
        dumped(talk(("human", "a"), ("gpt", "b"))),
        "",
        "is written as llava or sharegpt, and the data",
    ),
]
SHAREGPT = [
    (talk(("human", "a"), ("bot", "b"), ("gpt", "c")), "conversations[1].from", "is 'bot'; one of human"),
    (talk(("human", None), ("gpt", "b")), "conversations[0].value", "must be a string, not null"),
    (talk(("human", "<image>"), ("gpt", "b")), "conversations[0].value", "has an <image> mark, but"),
    (talk(("human", "a"), ("gpt", "b"), images=[URL]), "images[0]", "is taken by no <image> mark"),
    (talk(("human", "a"), ("gpt", "b"), system=["c"]), "system", "must be a string, not a list"),
]
LLAVA = [
    (
        talk(("human", "<image>"), ("gpt", "b"), image=7),
        "image",
        "must be a path or a data URL, not a number",
    ),
    (
        talk(("human", "<image>"), ("gpt", "b"), image="data:text/plain;base64,"),
        "image",
        "content type text/plain where image/… is expected",
    ),
    (talk(("human", "<image>"), image=URL), "conversations", "has no assistant turn"),
]
ALPACA = [
    ({"instruction": "a", "output": None}, "output", "is missing"),
    (
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "history[0]",
        "a list of a question and its answer",
    ),
]
TABLE = [
    ({"instruction": "a", "output": "", "image": None}, "output", "the assistant's text is empty"),
    ({"instruction": "a", "output": "b", "image": {"bytes": b"no", "path": None}}, "image", "not a PNG"),
]


@pytest.fixture
def files(tmp_path: Path) -> dict[Path, list[tuple[str, str]]]:
    """Data files with a good row in front, and what is wrong with those behind it."""
    buffer = BytesIO()
    Image.effect_noise((20, 20), 90).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:-30])
    lines = [dumped(chat("good", "row")), *(line for line, _, _ in OPENAI)]
    (tmp_path / "openai.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    good = talk(("human", "good"), ("gpt", "row"))
    (tmp_path / "sharegpt.jsonl").write_bytes(
        b"".join(dumped(row) + b"\n" for row in [{**good, "system": "Be."}, *(row for row, _, _ in SHAREGPT)])
    )
    llava = talk(("human", "<image>\ngood"), ("gpt", "row"), image=URL)
    (tmp_path / "llava.json").write_text(json.dumps([llava, *(row for row, _, _ in LLAVA)], indent=1))
    alpaca = {"instruction": "good", "output": "row"}
    (tmp_path / "alpaca.json").write_text(json.dumps([alpaca, *(row for row, _, _ in ALPACA)]))
    text = datasets.Value("string")
    features = datasets.Features({"instruction": text, "output": text, "image": datasets.Image()})
    rows = [{**alpaca, "image": {"bytes": PNG, "path": None}}, *(row for row, _, _ in TABLE)]
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "table.parquet")
    all_faults = {
        "openai.jsonl": OPENAI,
        "sharegpt.jsonl": SHAREGPT,
        "llava.json": LLAVA,
        "alpaca.json": ALPACA,
        "table.parquet": TABLE,
    }
    return {
        tmp_path / name: [(field, text) for _, field, text in faults]  # type: ignore[attr-defined]
        for name, faults in all_faults.items()
    }


def test_25_faults_are_25_exact_reports(
    files: dict[Path, list[tuple[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OKAVANGO_CACHE", str(tmp_path / "cache"))
    result = CliRunner().invoke(data, ["check", *map(str, files), "--json"])
    assert result.exit_code == 1
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert sum(len(report["faults"]) for report in reports) == sum(map(len, files.values())) == 25
    assert [report["format"] for report in reports] == ["openai", "sharegpt", "llava", "alpaca", "alpaca"]
    for report, (path, faults) in zip(reports, files.items(), strict=True):
        assert report["counts"]["rows"] == len(faults) + 1
        assert [fault["row"] for fault in report["faults"]] == list(range(2, len(faults) + 2))
        for found, (field, text) in zip(report["faults"], faults, strict=True):
            assert (found["file"], found["field"]) == (str(path), field)
            assert text in found["text"]
    lines = [[fault["line"] for fault in report["faults"]] for report in reports]
    assert lines[0] == list(range(2, 15))
    assert lines[2] == sorted(lines[2])
    assert min(lines[2]) > 10
    assert lines[3] == [1, 1]
    assert lines[4] == [None, None]
