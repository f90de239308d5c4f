import hashlib
import json
import os
from pathlib import Path

import pytest

from okavango.modalities.content import Limits, Media, Text
from okavango.platform.errors import DataError
from okavango.training.dataset import open_dataset
from okavango.training.rows import row_bytes

SMALL = Limits(media_bytes=64, image_pixels=100, media_per_request=1, text_chars=100)


def row(question: str, answer: str, *pictures: str) -> str:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    content = [*parts, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}, ensure_ascii=False)


def write(folder: Path, *rows: str, end: str = "\n") -> Path:
    path = folder / "data.jsonl"
    path.write_bytes("".join(each + end for each in rows).encode())
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, bytes]:
    found = {"images/a.png": b"first", "images/ü b.png": b"second"}
    (tmp_path / "images").mkdir()
    for name, data in found.items():
        (tmp_path / name).write_bytes(data)
    return found


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_hold_their_parts_in_order(tmp_path: Path, pictures: dict[str, bytes], end: str) -> None:
    path = write(tmp_path, row("ä?", "b", *pictures), row("c", "d"), end=end)
    dataset = open_dataset(path)
    assert len(dataset) == 2
    first, second = dataset.rows()
    assert first.messages[0].parts == (Media("image", b"first"), Media("image", b"second"), Text("ä?"))
    assert (first.messages[1].role, first.messages[1].text, first.line) == ("assistant", "b", 1)
    assert (second.messages[0].parts, second.line) == ((Text("c"),), 2)


def test_a_last_line_without_its_end_counts(tmp_path: Path) -> None:
    path = write(tmp_path, row("a", "b"), row("c", "d"))
    path.write_bytes(path.read_bytes()[:-1])
    assert [example.messages[1].text for example in open_dataset(path).rows()] == ["b", "d"]


def test_rows_are_found_across_read_chunks(tmp_path: Path) -> None:
    # Lines of ever other lengths: some end exactly at, just before and just after a mebibyte.
    rows = [row("q" * (size % 4099), str(size)) for size in range(1200)]
    head = (1 << 20) - len(row("", "")) - 1
    dataset = open_dataset(write(tmp_path, row("x" * head, ""), *rows), limits=Limits(text_chars=1 << 21))
    assert len(dataset) == 1201
    assert [dataset.row(i + 1).messages[1].text for i in range(1200)] == [str(i) for i in range(1200)]


def test_a_line_that_ends_with_a_chunk_starts_no_further_row(tmp_path: Path) -> None:
    path = write(tmp_path, row("x" * ((1 << 20) - len(row("", "y")) - 1), "y"))
    assert path.stat().st_size == 1 << 20
    assert len(open_dataset(path)) == 1


def test_media_are_read_when_a_row_is_asked_for(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    dataset = open_dataset(write(tmp_path, row("a", "b", "images/a.png")))
    (tmp_path / "images/a.png").write_bytes(b"later")
    assert dataset.row(0).messages[0].media[0].data == b"later"


def test_a_faulty_row_raises_with_every_fault(tmp_path: Path) -> None:
    path = write(tmp_path, row("a", "b"), row("a", "", "gone.png", "http://x/y.png"))
    dataset = open_dataset(path)
    assert dataset.row(0).line == 1
    with pytest.raises(DataError, match="gone") as caught:
        dataset.row(1)
    assert caught.value.where == f"{path}:2"
    assert len(caught.value.faults) == 3
    assert all(fault.startswith(f"{path}:2: messages[") for fault in caught.value.faults)


def test_the_digest_follows_the_lines_and_the_media(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    path = write(tmp_path, row("a", "b", *pictures))
    digests = "".join(hashlib.sha256(data).hexdigest() for data in pictures.values())
    first = open_dataset(path).digest
    assert first == hashlib.sha256(path.read_bytes() + digests.encode()).hexdigest()
    assert open_dataset(path).digest == first
    (tmp_path / "images/a.png").write_bytes(b"other")
    second = open_dataset(path).digest
    write(tmp_path, row("a", "c", *pictures))
    assert len({first, second, open_dataset(path).digest}) == 3


def test_what_is_no_data_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    for name, text in [
        ("none.jsonl", "no such file"),
        ("folder", "cannot be read"),
        ("empty.jsonl", "empty"),
    ]:
        with pytest.raises(DataError, match=text) as caught:
            open_dataset(tmp_path / name)
        assert caught.value.where == str(tmp_path / name)


def test_uploads_name_no_files(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    path = write(tmp_path, row("a", "b", "images/a.png"), row("a", "b", "data:image/png;base64,Zmlyc3Q="))
    dataset = open_dataset(path, allow_files=False)
    assert dataset.row(1).messages[0].media[0].data == b"first"
    with pytest.raises(DataError, match="only data URLs"):
        dataset.row(0)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "images/../../secret.png",
        "{absolute}",
        "link.png",
        "folder/secret.png",
        "dangling.png",
    ],
)
def test_nothing_outside_the_folder_is_read(tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    inside = tmp_path / "data"
    (inside / "images").mkdir(parents=True)
    (inside / "link.png").symlink_to(secret)
    (inside / "folder").symlink_to(tmp_path)
    (inside / "dangling.png").symlink_to(tmp_path / "gone.png")
    dataset = open_dataset(write(inside, row("a", "b", name.replace("{absolute}", str(secret)))))
    with pytest.raises(DataError, match="outside the data file's folder"):
        dataset.row(0)


def test_a_link_inside_the_folder_and_a_linked_folder_are_fine(
    tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    (tmp_path / "images/link.png").symlink_to("a.png")
    write(tmp_path, row("a", "b", "images/link.png"))
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    dataset = open_dataset(tmp_path / "elsewhere" / "data.jsonl")
    assert dataset.row(0).messages[0].media[0].data == b"first"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("file:///etc/hostname", "not file:"),
        ("https://example.org/a.png", "not https:"),
        ("", "is not a file"),
        ("images", "is not a file"),
        ("pipe", "is not a file"),
        ("loop", "cannot be read"),
        ("nul\0.png", "cannot be read"),
        ("\ud800.png", "cannot be read"),
        ("n" * 300, "cannot be read"),
        ("big.png", "65 bytes, over the limit of 64"),
    ],
)
def test_names_that_are_no_readable_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "big.png").write_bytes(bytes(65))
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(json.loads(row("a", "b", name))) + "\n")
    with pytest.raises(DataError, match=text):
        open_dataset(path, limits=SMALL).row(0)


def test_a_line_longer_than_any_row_may_be_is_refused_unread(tmp_path: Path) -> None:
    path = write(tmp_path, "x" * (row_bytes(SMALL) + 2_000_000), row("a", "b"))
    dataset = open_dataset(path, limits=SMALL)
    assert len(dataset) == 2
    with pytest.raises(DataError, match="longer than"):
        dataset.row(0)
    assert dataset.row(1).messages[1].text == "b"
