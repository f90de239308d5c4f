import base64
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from okavango.modalities.base import Base
from okavango.modalities.content import Limits, Message, Modality
from okavango.modalities.encoders import check_medium
from okavango.platform.errors import DataError, PromptError
from okavango.training import seen
from okavango.training.check import Measure, Seen, check_dataset, measure_of
from okavango.training.dataset import open_dataset
from okavango.training.memory import Length
from okavango.training.rows import row_bytes

LIMITS = Limits(media_bytes=4096, image_pixels=400, media_per_request=2, text_chars=200)


def png(width: int = 4, height: int = 4, colour: str = "red") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def turn(content: Any = "What is this?", answer: Any = "a dog") -> list[dict[str, Any]]:
    return [said("user", content), said("assistant", answer)]


def line(messages: Any) -> bytes:
    return json.dumps({"messages": messages}).encode()


GOOD = line(turn())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with pictures of every kind, below a folder with something to keep out."""
    (tmp_path / "secret.png").write_bytes(png())
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    noise = Image.effect_noise((40, 40), 90)
    noise.save(folder / "noise.png")
    files = {
        "dog.png": png(),
        "images/cat.png": png(colour="blue"),
        "large.png": png(21, 20),
        "cut.png": png(20, 20)[:-30],
        "text.png": b"no picture at all",
        "heavy.png": png() + bytes(4096),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


def findings(folder: Path, *lines: bytes, **options: Any) -> list[tuple[int | None, str, str]]:
    path = folder / "data.jsonl"
    path.write_bytes(b"".join(each + b"\n" for each in lines))
    report = check_dataset(path, **{"limits": LIMITS, **options})
    assert report.counts.faults == len(report.faults)
    assert all(fault.path == path for fault in report.faults)
    return [(fault.line, fault.field, fault.text) for fault in report.faults]


def test_a_good_file_has_no_faults_and_is_counted(folder: Path) -> None:
    first = line([said("system", "Be brief."), *turn([picture("dog.png"), picture("images/cat.png")])])
    second = line(turn([picture("dog.png"), {"type": "text", "text": "?"}], "yes") + turn("and this", "no"))
    assert findings(folder, first, second) == []
    report = check_dataset(folder / "data.jsonl", limits=LIMITS)
    assert report.ok
    counts = report.counts
    assert (counts.rows, counts.messages, counts.media, counts.distinct_media) == (2, 7, 3, 2)
    assert counts.media_bytes == len(png()) + len(png(colour="blue"))
    assert counts.answer_chars == len("a dog" + "yes" + "no")
    report.require_ok()


FAULTS: dict[str, tuple[bytes, str, str]] = {
    # kind: (line, field, text)
    "not UTF-8": (b'{"messages": "\xff"}', "", "is not UTF-8: byte 0xff at position 15"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "", "byte order mark"),
    "blank line": (b" \t", "", "the line is blank"),
    "bad JSON": (b'{"messages": [}', "", "is not JSON: Expecting value at column 15"),
    "two rows on a line": (GOOD + GOOD, "", f"is not JSON: Extra data at column {len(GOOD) + 1}"),
    "NaN": (b'{"messages": NaN}', "", "NaN is no JSON value"),
    "endless number": (b'{"messages": %s}' % (b"1" * 5000), "", "4300 digits"),
    "too deep": (b"[" * 50_000, "", "nested too deeply"),
    "a key twice": (b'{"messages": [], "messages": []}', "", "'messages' stands twice"),
    "line too long": (b'"%s"' % (b"x" * row_bytes(LIMITS)), "", "the line is longer than"),
    "not an object": (b"[1, 2]", "", "is not a JSON object"),
    "messages missing": (b"{}", "messages", "is missing"),
    "messages not a list": (line({"role": "user"}), "messages", "must be a list, not an object"),
    "messages empty": (line([]), "messages", "is empty"),
    "message not an object": (line([*turn(), 7]), "messages[2]", "must be an object, not a number"),
    "role missing": (line([{"content": "x"}, *turn()]), "messages[0].role", "is missing"),
    "unknown role": (line([said("bot", "x"), *turn()]), "messages[0].role", "is 'bot'; one of system"),
    "content missing": (line([{"role": "user"}, *turn()]), "messages[0].content", "is missing"),
    "content of wrong type": (line(turn(content=3)), "messages[0].content", "a string or a list of parts"),
    "content null": (line(turn(answer=None)), "messages[1].content", "a list of parts, not null"),
    "content empty list": (line(turn(content=[])), "messages[0].content", "is empty"),
    "half a character": (line(turn("a\ud83d")), "messages[0].content", "surrogate pair at character 2"),
    "no assistant turn": (line([said("user", "x")]), "messages", "has no assistant turn"),
    "last not assistant": (line([*turn(), said("user", "x")]), "messages[2].role", "last message must be"),
    "empty answer": (line(turn(answer=" \n")), "messages[1].content", "text is empty"),
    "empty answer parts": (
        line(turn(answer=[{"type": "text", "text": ""}])),
        "messages[1].content",
        "text is empty",
    ),
    "part not an object": (line(turn(["x"])), "messages[0].content[0]", "must be an object, not a string"),
    "part without type": (line(turn([{"text": "x"}])), "messages[0].content[0].type", "is missing"),
    "unknown part type": (
        line(turn([{"type": "video"}])),
        "messages[0].content[0].type",
        "'video'; one of text, image_url",
    ),
    "text missing": (line(turn([{"type": "text"}])), "messages[0].content[0].text", "is missing"),
    "image_url without url": (
        line(turn([{"type": "image_url", "image_url": {}}])),
        "messages[0].content[0].image_url.url",
        "is missing",
    ),
    "media in an answer": (
        line(turn(answer=[{"type": "text", "text": "x"}, picture("dog.png")])),
        "messages[1].content",
        "assistant message holds no media",
    ),
    "too many media": (line(turn([picture("dog.png")] * 3)), "messages", "3 media, over the limit of 2"),
    "too much text": (line(turn("x" * 196)), "messages", "201 characters, over the limit of 200"),
    "two system messages": (
        line([said("system", "x"), said("system", "y"), *turn()]),
        "messages[1].role",
        "a system message comes first",
    ),
    "system not first": (
        line([*turn(), said("system", "x"), *turn()]),
        "messages[2].role",
        "a system message comes first",
    ),
    "unknown key": (
        json.dumps({"messages": turn(), "message": 1}).encode(),
        "message",
        "unknown key; did you mean messages?",
    ),
    "unknown key in a message": (
        line([{**said("user", "x"), "name": "Ann"}, said("assistant", "y")]),
        "messages[0].name",
        "unknown key; known here: role, content, weight",
    ),
    "a user's weight": (
        line([{**said("user", "x"), "weight": 1}, said("assistant", "y")]),
        "messages[0].weight",
        "only an assistant's message is learned",
    ),
    "another weight": (
        line([said("user", "x"), {**said("assistant", "y"), "weight": 0.5}]),
        "messages[1].weight",
        "must be 0 or 1",
    ),
    "a boolean weight": (
        line([said("user", "x"), {**said("assistant", "y"), "weight": False}]),
        "messages[1].weight",
        "must be 0 or 1",
    ),
    "nothing has weight": (
        line([said("user", "x"), {**said("assistant", "y"), "weight": 0}]),
        "messages",
        "all of the assistant's messages have weight 0",
    ),
}

MEDIA_FAULTS = {
    "missing": ("gone.png", "there is no file 'gone.png'"),
    "a folder": ("images", "'images' is not a file"),
    "outside": ("../secret.png", "'../secret.png' lies outside"),
    "absolute": ("/etc/hostname", "'/etc/hostname' lies outside"),
    "link to outside": ("link.png", "'link.png' lies outside"),
    "remote": ("https://example.org/a.png", "not https:"),
    "file URL": ("file:///etc/hostname", "not file:"),
    "bad base64": ("data:image/png;base64,!!!", "not valid base64"),
    "base64 beyond ASCII": ("data:image/png;base64,é", "not valid base64"),
    "not base64": ("data:image/png,abc", "is not base64"),
    "wrong content type": (data_url(b"x", "text/plain"), "content type text/plain"),
    "undecodable": ("text.png", "not a PNG"),
    "undecodable data": (data_url(b"nothing"), "not a PNG"),
    "empty": (data_url(b""), "only|empty"),
    "truncated": ("cut.png", "truncated or damaged"),
    "truncated data": (data_url(png(20, 20)[:-30]), "truncated or damaged"),
    "over the byte limit": ("heavy.png", "over the limit of 4,096"),
    "data over the byte limit": (data_url(png() + bytes(4096)), "over the limit of 4,096"),
    "over the pixel limit": ("large.png", "21 × 20 pixels, over the limit of 400"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_row_is_the_only_fault_of_its_file(folder: Path, kind: str) -> None:
    bad, field, text = FAULTS[kind]
    other = line(turn("another"))
    found = findings(folder, GOOD, bad, other)
    assert [(line, field) for line, field, _ in found] == [(2, field)]
    assert text in found[0][2]
    with pytest.raises(DataError):
        open_dataset(folder / "data.jsonl", limits=LIMITS).row(1)


@pytest.mark.parametrize("kind", MEDIA_FAULTS)
def test_faulty_media_are_named_by_their_place(folder: Path, kind: str) -> None:
    url, text = MEDIA_FAULTS[kind]
    found = findings(folder, GOOD, line(turn([{"type": "text", "text": "x"}, picture(url)])))
    assert [(line, field) for line, field, _ in found] == [(2, "messages[0].content[1].image_url.url")]
    assert any(each in found[0][2] for each in text.split("|"))


@pytest.mark.parametrize(
    ("name", "text"),
    [("none.jsonl", "no such file"), ("images", "no known format"), ("empty.jsonl", "empty")],
)
def test_what_is_no_data_file_is_a_fault_without_line(folder: Path, name: str, text: str) -> None:
    (folder / "empty.jsonl").touch()
    report = check_dataset(folder / name)
    assert [(fault.line, fault.field) for fault in report.faults] == [(None, "")]
    assert text in report.faults[0].text
    assert str(report.faults[0]) == f"{folder / name}: {report.faults[0].text}"
    assert not report.ok


def test_all_faults_of_a_row_and_of_a_file_are_reported_in_order(folder: Path) -> None:
    row = json.dumps(
        {
            "mesages": 1,
            "messages": [said("bot", [picture("gone.png"), {}]), said("assistant", ""), said("user", "x")],
        }
    )
    found = findings(folder, row.encode(), b"", GOOD, b"{")
    assert [(line, field) for line, field, _ in found] == [
        (1, "mesages"),
        (1, "messages[0].role"),
        (1, "messages[0].content[0].image_url.url"),
        (1, "messages[0].content[1].type"),
        (1, "messages[1].content"),
        (1, "messages[2].role"),
        (2, ""),
        (4, ""),
    ]
    counts = check_dataset(folder / "data.jsonl").counts
    assert (counts.rows, counts.faulty_rows) == (4, 3)


def test_keys_that_clients_leave_unset_are_no_fault(folder: Path) -> None:
    row = line([{**said("user", "x"), "name": None}, {**said("assistant", "y"), "tool_calls": None}])
    assert findings(folder, row) == []


def test_uploads_may_name_no_files(folder: Path) -> None:
    rows = line(turn([picture("dog.png")])), line(turn([picture(data_url(png()))]))
    found = findings(folder, *rows, allow_files=False)
    assert [line for line, _, _ in found] == [1]
    assert "only data URLs are accepted, not a path" in found[0][2]


def test_each_distinct_picture_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def counting(data: bytes, modality: Modality, limits: Limits) -> None:
        decoded.append(data)
        check_medium(data, modality, limits)

    monkeypatch.setattr(seen, "check_medium", counting)
    (folder / "copy.png").write_bytes(png())
    good = [line(turn([picture(url)], str(i))) for i, url in enumerate(["dog.png", "copy.png"] * 3)]
    bad = [line(turn([picture(url)], str(i))) for i, url in enumerate(["cut.png"] * 3)]
    assert [line for line, _, _ in findings(folder, *good, *bad, line(turn([picture(data_url(png()))])))] == [
        7,
        8,
        9,
    ]
    assert len(decoded) == 2


def test_the_report_holds_so_many_faults_and_counts_all(folder: Path) -> None:
    (folder / "data.jsonl").write_bytes(b"\n" * 1000)
    report = check_dataset(folder / "data.jsonl", keep=3)
    assert [fault.line for fault in report.faults] == [1, 2, 3]
    assert report.counts.faults == report.counts.faulty_rows == 1000
    with pytest.raises(DataError, match="1,000 faults") as caught:
        report.require_ok()
    assert caught.value.faults[0] == f"{folder / 'data.jsonl'}:1: the line is blank"


def test_rows_that_say_the_same_are_a_warning(folder: Path) -> None:
    (folder / "copy.png").write_bytes(png())
    same = [line(turn([picture("dog.png")])), line(turn([picture("copy.png")])).replace(b": ", b":")]
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join([*same, line(turn([picture("images/cat.png")])), b"{", b"{"]))
    report = check_dataset(path)
    assert [(warning.line, warning.text) for warning in report.warnings] == [
        (2, "the same conversation as line 1")
    ]
    assert report.counts.warnings == 1


def test_rows_that_two_files_share_are_a_warning(folder: Path) -> None:
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    train.write_bytes(line(turn("a")) + b"\n" + line(turn("b")) + b"\n")
    test.write_bytes(line(turn("c")) + b"\n" + line(turn("b")) + b"\n")
    seen = Seen()
    assert check_dataset(train, seen=seen).warnings == ()
    report = check_dataset(test, seen=seen)
    assert [str(warning) for warning in report.warnings] == [
        f"{test}:2: messages: the same conversation as {train}:2"
    ]
    assert report.ok


def test_rows_over_a_base_context_are_faults(folder: Path) -> None:
    def words(messages: Sequence[Message]) -> Length:
        if "refuse" in messages[0].text:
            raise PromptError("the template refuses this")
        return Length(sum(len(message.text.split()) for message in messages), 1)

    rows = [line(turn(text, "yes")) for text in ("a b", "a b c d", "refuse", "a b c")]
    found = findings(folder, *rows, measure=Measure(words, context=4))
    assert [line for line, _, _ in found] == [2, 3]
    assert "5 tokens, over the base's context of 4" in found[0][2]
    assert "the template refuses this" in found[1][2]
    counts = check_dataset(folder / "data.jsonl", measure=Measure(words, context=4)).counts
    assert (counts.tokens, counts.longest) == (3 + 5 + 4, 5)


def test_a_base_counts_a_row_as_it_renders_it(folder: Path, tiny_base: Base) -> None:
    rows = [line(turn([picture("dog.png"), {"type": "text", "text": "?"}])), line(turn("?"))]
    measure = measure_of(tiny_base)
    assert measure.context == tiny_base.decoder.context
    assert findings(folder, *rows, measure=measure) == []
    alone = check_dataset(open_rows(folder, rows[1]), measure=measure).counts.tokens
    both = check_dataset(open_rows(folder, *rows), measure=measure).counts
    assert both.tokens - alone == both.longest == alone + tiny_base.heads["image"].spec.tokens
    long = line(turn("?", "x" * tiny_base.decoder.context))
    report = check_dataset(open_rows(folder, rows[1], long), measure=measure)
    assert [fault.line for fault in report.faults] == [2]
    assert f"over the base's context of {tiny_base.decoder.context:,}" in report.faults[0].text


def open_rows(folder: Path, *rows: bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(rows))
    return path


def test_findings_do_nothing_to_a_terminal(folder: Path) -> None:
    messages = [said("\x1b[0m" + "r" * 10_000, "x")]
    row = json.dumps({"\x1b[31m\n" + "k" * 10_000: 1, "messages": messages})
    [key, role] = check_dataset_of(folder, row.encode() + b"\n")
    for text in (key, role):
        assert text.isprintable()
        assert len(text) < 800


def check_dataset_of(folder: Path, data: bytes) -> list[str]:
    (folder / "data.jsonl").write_bytes(data)
    return [str(fault) for fault in check_dataset(folder / "data.jsonl").faults]


def test_a_report_is_json(folder: Path) -> None:
    findings(folder, GOOD, GOOD, b"{")
    report = check_dataset(folder / "data.jsonl")
    raw = json.loads(json.dumps(report.to_json()))
    assert (raw["ok"], raw["counts"]["rows"], raw["file"]) == (False, 3, str(folder / "data.jsonl"))
    assert raw["faults"] == [
        {"file": raw["file"], "line": 3, "row": 3, "field": "", "text": report.faults[0].text},
    ]
    assert raw["warnings"][0]["line"] == 2


def test_progress_ends_at_the_size_of_the_file(folder: Path) -> None:
    seen: list[int] = []
    findings(folder, GOOD, b"", b"x" * 100, progress=seen.append)
    assert seen == sorted(seen)
    assert (len(seen), seen[-1]) == (3, (folder / "data.jsonl").stat().st_size)


# Values that look enough like rows to reach every branch.
_URLS = st.sampled_from(
    ["dog.png", "gone.png", "../secret.png", "images", "", "\0", "link.png", "data:image/png;base64,AA=="]
) | st.text(max_size=8)
_JUNK = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_TEXT = st.text(max_size=6) | st.sampled_from(["\ud800", "x", " "])
_PARTS = st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": _TEXT})
    | st.fixed_dictionaries(
        {"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": _URLS})}
    )
    | st.dictionaries(st.sampled_from(["type", "text", "image_url"]), _JUNK, max_size=3)
    | _JUNK,
    max_size=4,
)
_CONTENT = _TEXT | _PARTS | _JUNK
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | _JUNK, "content": _CONTENT},
        optional={"name": _JUNK},
    )
    | _JUNK,
    max_size=4,
)
_LIKELY = st.builds(lambda *m: list(m), st.builds(said, st.just("user"), _CONTENT)).flatmap(
    lambda start: st.builds(lambda end: [*start, said("assistant", end)], _CONTENT)
)
_ROWS = _JUNK | st.fixed_dictionaries({"messages": _LIKELY | _MESSAGES | _JUNK}, optional={"extra": _JUNK})


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(_ROWS, min_size=1, max_size=4))
def test_any_json_is_faulted_or_readable(folder: Path, rows: list[Any]) -> None:
    path = folder / "any.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    agree(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=80) | st.lists(st.sampled_from([GOOD, b"\n", b"\r", b"{", b"\xff"])).map(b"".join)
)
def test_any_bytes_are_faulted_or_readable(folder: Path, data: bytes) -> None:
    path = folder / "any.jsonl"
    path.write_bytes(data)
    agree(path)


def agree(path: Path) -> None:
    """The check passes exactly the rows that training can read."""
    report = check_dataset(path, limits=LIMITS)
    if not path.stat().st_size:
        assert not report.ok
        return
    dataset = open_dataset(path, limits=LIMITS)
    assert len(dataset) == report.counts.rows
    faulty = {fault.line for fault in report.faults}
    assert len(faulty) == report.counts.faulty_rows
    for i in range(len(dataset)):
        if i + 1 not in faulty:
            messages = dataset.row(i).messages
            assert messages[-1].role == "assistant"
            assert messages[-1].text.strip()
            for message in messages:
                for medium in message.media:
                    check_medium(medium.data, medium.modality, LIMITS)
