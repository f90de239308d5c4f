"""Turns → what a model is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from okavango.modalities.content import Limits, Media, Text
from okavango.modalities.tiny_bundle import picture_bytes
from okavango.platform.errors import MediaError
from okavango.web.studio.conversation import Provenance, Turn, completed, messages_of

MADE = Provenance("emoji@1", "0" * 64, 7, 3, 0.5, 4.0)


def saved(folder: Path, data: bytes, name: str = "picture.png") -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


def test_pictures_come_before_their_question_and_answers_between(tmp_path: Path) -> None:
    data = picture_bytes(1)
    turns = (Turn("What?", (saved(tmp_path, data),), "A tile.", MADE), Turn("Sure?"))
    asked, answered, again = messages_of(turns, Limits())
    assert asked.parts == (Media("image", data), Text("What?"))
    assert (answered.role, answered.text) == ("assistant", "A tile.")
    assert (again.role, again.parts) == ("user", (Text("Sure?"),))


def test_a_picture_needs_no_words(tmp_path: Path) -> None:
    data = picture_bytes(1)
    [message] = messages_of([Turn("", (saved(tmp_path, data),))], Limits())
    assert message.parts == (Media("image", data),)


def test_a_damaged_picture_is_refused(tmp_path: Path) -> None:
    turn = Turn("What?", (saved(tmp_path, picture_bytes(1)[:60]),))
    with pytest.raises(MediaError, match="damaged"):
        messages_of([turn], Limits())


def test_a_picture_that_was_swept_away_is_asked_for_again(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"no longer on the server \(add it again\)"):
        messages_of([Turn("What?", (str(tmp_path / "gone.png"),))], Limits())


def test_the_whole_conversation_is_held_to_the_limits(tmp_path: Path) -> None:
    path = saved(tmp_path, picture_bytes(1))
    turns = (Turn("One", (path, path), "Yes.", MADE), Turn("Two", (path,)))
    with pytest.raises(MediaError, match="3 media, over the limit of 2"):
        messages_of(turns, Limits(media_per_request=2))


def test_only_turns_with_an_answer_are_built_on() -> None:
    good, stopped = Turn("a", (), "b", MADE), Turn("a", (), "half", MADE)
    failed, silent = Turn("a", fault="No."), Turn("a", (), "", MADE, fault="The answer is empty.")
    assert completed((failed, good, silent, stopped, Turn("asked now"))) == (good, stopped)
