from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from okavango.modalities.tiny import byte_tokenizer
from okavango.serving.stream import TextStream

TOKENIZER = byte_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def pieces(text: str, stop=()) -> tuple[list[str], bool]:
    stream = TextStream(TOKENIZER, stop)
    found = []
    for token in encode(text):
        found.append(stream.push(token))
        if stream.stopped:
            return found, True
    return [*found, stream.flush()], False


@given(st.text(max_size=40))
def test_pieces_join_to_the_text(text):
    found, _ = pieces(text)
    assert "".join(found) == TOKENIZER.decode(encode(text), skip_special_tokens=True)


def test_a_character_of_several_tokens_comes_whole():
    found, _ = pieces("a😀b")
    assert found == ["a", "", "", "", "😀", "b", ""]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("ababac", ["abac"], "ab"),
        ("no stop here", ["xyz"], "no stop here"),
        ("ends like st", ["stop"], "ends like st"),
        ("😀stop", ["st"], "😀"),
    ],
)
def test_a_stop_string_ends_the_text_before_itself(text, stop, expected):
    found, stopped = pieces(text, stop)
    assert "".join(found) == expected
    assert stopped == any(s in text for s in stop)


def test_a_stop_string_counts_from_the_least_number_of_tokens_on():
    def until_stopped(min_tokens: int) -> str:
        stream, found = TextStream(TOKENIZER, ["stop"], min_tokens), ""
        for token in encode("a stop b stop c"):
            found += stream.push(token)
            if stream.stopped:
                return found
        return found + stream.flush()

    found = [until_stopped(n) for n in (0, 3, 4, 10, 99)]
    assert found == ["a ", "a ", "a stop b ", "a stop b ", "a stop b stop c"]


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_of_a_stop_string_leaks(text, stop):
    found, stopped = pieces(text, stop)
    joined = "".join(found)
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if stopped:
        # the first stop string to be complete ends the answer
        seen = text[: min(ends)]
        assert joined == seen[: min(seen.find(s) for s in stop if s in seen)]
    else:
        assert joined == text


def test_incomplete_bytes_at_the_end_are_flushed_as_a_replacement():
    stream = TextStream(TOKENIZER)
    assert stream.push(encode("é")[0]) == ""
    assert stream.flush() == "\ufffd"


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, tokens: list[int], **options) -> str:
        self.decoded += len(tokens)
        return TOKENIZER.decode(tokens, **options)


@pytest.mark.parametrize("unit", [encode("é")[1:], [TOKENIZER.eos_token_id], encode("word ")])
def test_the_cost_of_an_answer_grows_with_its_length_only(unit):
    """Continuation bytes that begin nothing, tokens without text, and plain text."""
    costs = []
    for count in (500, 2000):
        counting = Counting()
        stream = TextStream(counting)
        text = "".join(stream.push(token) for token in (unit * count)[:count]) + stream.flush()
        assert text == TOKENIZER.decode((unit * count)[:count], skip_special_tokens=True)
        costs.append(counting.decoded)
    assert costs[1] < 5 * costs[0]


def test_text_comes_through_after_tokens_that_are_no_text():
    stream = TextStream(TOKENIZER)
    tokens = encode("é")[1:] * 100 + [TOKENIZER.eos_token_id] * 100 + encode("now 😀")
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.flush() == "\ufffd" * 100 + "now 😀"
    assert pieces[-1] == "😀"
