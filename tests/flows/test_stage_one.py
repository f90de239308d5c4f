"""The data of stage one: titles that say something, sounds that are heard, nothing learned that is held out.

What its Debian packages bring is written here in small, in their form; a stand-in speaks for the voices.
"""

from __future__ import annotations

import gzip
import io
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from okavango.training.spec import parse_spec, read_toml

EXAMPLES = Path(__file__).parents[2] / "examples"
SVG = "<svg><metadata><dc:title>{}</dc:title></metadata></svg>"


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def stage_one() -> Any:
    import stage_one

    return stage_one


@pytest.fixture
def clipart(tmp_path: Path) -> Path:
    """Three pictures: one with a title, one whose title says nothing, one of a theme."""
    titles = {
        "animals/dog_01.png": "Sitting_Dog 2",
        "animals/x.png": "x1y2",
        "education/blue-theme/a.png": "Apple",
    }
    for name, title in titles.items():
        png, svg = tmp_path / "png" / name, (tmp_path / "svg" / name).with_suffix(".svg")
        for path in (png, svg):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (400, 300), "red").save(png)
        svg.write_text(SVG.format(title))
    return tmp_path


def test_clip_art_is_small_and_has_the_titles_that_say_something(stage_one: Any, clipart: Path) -> None:
    items = list(stage_one.clipart(clipart))
    assert [(item.name, item.caption) for item in items] == [("clipart/animals-dog_01.png", "sitting dog")]
    assert Image.open(io.BytesIO(items[0].data)).size == (256, 192)


@pytest.mark.parametrize(
    ("title", "caption"),
    [
        ("A Dog", "a dog"),
        ("big__red   bus", "big red bus"),
        ("open clip art logo", None),
        ("one two three four five six", None),
        ("Собака", None),
        ("x1y2", None),
    ],
)
def test_titles(stage_one: Any, tmp_path: Path, title: str, caption: str | None) -> None:
    path = tmp_path / "a.svg"
    path.write_text(SVG.format(title))
    assert stage_one.clipart_title(path) == caption
    assert stage_one.clipart_title(tmp_path / "none.svg") is None


def test_garments_are_of_every_kind(stage_one: Any, tmp_path: Path) -> None:
    labels = np.arange(40, dtype=np.uint8) % 10
    images = np.zeros((40, 28, 28), np.uint8)
    for name, head, data in (
        ("train-images-idx3-ubyte.gz", struct.pack(">4I", 0x803, 40, 28, 28), images),
        ("train-labels-idx1-ubyte.gz", struct.pack(">2I", 0x801, 40), labels),
    ):
        (tmp_path / name).write_bytes(gzip.compress(head + data.tobytes()))
    items = list(stage_one.fashion(3, tmp_path))
    assert len(items) == 30
    assert len({item.caption for item in items}) == 10
    assert len({item.name for item in items}) == 30


def test_what_is_held_out_anywhere_is_learned_nowhere(
    stage_one: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def item(name: str, caption: str, split: str, kind: str = "image") -> Any:
        return stage_one.Item(name, kind, caption, split, b"")

    made = {
        "emoji": [item("e1", "dog face", "train"), item("e2", "red apple", "test")],
        "clipart": [item("c1", "red apple", "train"), item("c2", "a house", "train")],
        "fashion": [item("f1", "a coat", "train"), item("f2", "a coat", "test")],
        "recorded": [item("r1", "goodbye", "validation", "audio")],
        "spoken": [item("s1", "goodbye", "train", "audio"), item("s2", "dog face", "train", "audio")],
    }
    for name, items in made.items():
        monkeypatch.setattr(stage_one, name, lambda *_, items=items: iter(items))
    kept = stage_one.collect(1, 1, 0)
    assert [each.name for each in kept if each.split == "train"] == ["e1", "c2", "f1", "s2"]
    assert {each.name for each in kept if each.split != "train"} == {"e2", "f2", "r1"}


def test_rows_ask_in_several_ways_and_name_their_medium(stage_one: Any) -> None:
    rows = [stage_one.Item(f"a{i}.png", "image", "x", "train", b"").row() for i in range(20)]
    parts = [row["messages"][0]["content"] for row in rows]
    assert {part[0]["image_url"]["url"] for part in parts} == {f"media/a{i}.png" for i in range(20)}
    assert len({part[1]["text"] for part in parts}) > 3
    sound = stage_one.Item("a.flac", "audio", "hello", "train", b"").row()["messages"]
    assert sound[0]["content"][0] == {"type": "input_audio", "input_audio": {"data": "media/a.flac"}}
    assert sound[1] == {"role": "assistant", "content": "hello"}


def test_sentences_are_the_same_again_and_of_speakable_length(
    stage_one: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stage_one_speech as speech

    for book in speech._BOOKS:
        (tmp_path / book).write_text("A man, a plan.\n%\nThe early bird gets\nthe worm!\n%\nno 4 this\n")
    monkeypatch.setattr(speech, "_FORTUNES", tmp_path)
    found = speech.sentences(30, 1, ["dog face"])
    assert found == speech.sentences(30, 1, ["dog face"]) != speech.sentences(30, 2, ["dog face"])
    assert {"A man, a plan.", "The early bird gets the worm!", "dog face"} <= set(found)
    assert all(1 <= len(text.split()) <= 14 for text in found)


def test_voices_are_bounded_altered_and_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import stage_one_speech as speech

    def said(command: list[str], **_: Any) -> None:
        path = command[command.index("-o" if command[0] == "flite" else "-w") + 1]
        seconds = 9 if "long" in " ".join(command) else 1
        soundfile.write(path, np.sin(np.arange(22050 * seconds) / 20), 22050)

    monkeypatch.setattr(speech.subprocess, "run", said)
    found = list(speech.say_all(["Dog face", "a long one", "Goodbye."], 0))
    assert [(name, words) for name, words, _ in found] == [("00000", "dog face"), ("00002", "goodbye")]
    samples, rate = soundfile.read(io.BytesIO(found[0][2]))
    assert (rate, len(samples)) == (16_000, 16_000)
    assert 0.1 < np.abs(samples).max() <= 1
    assert found == list(speech.say_all(["Dog face", "a long one", "Goodbye."], 0))


def test_without_the_packages_it_names_them(
    stage_one: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stage_one, "_CLIPART", tmp_path)
    monkeypatch.setattr(sys, "argv", ["stage_one.py", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="apt-get install openclipart-png"):
        stage_one.main()
    assert not (tmp_path / "out").exists()


def test_the_recipe_trains_heads_and_a_space_and_nothing_else() -> None:
    spec = parse_spec(read_toml(EXAMPLES / "stage_one.toml"))
    assert not spec.lora.train
    assert not spec.encoders
    assert spec.head.train
    assert spec.joint.weight > 0
    assert spec.data.resolve() == EXAMPLES.parent / "build/stage_one/train.jsonl"
