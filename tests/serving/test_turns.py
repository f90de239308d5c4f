"""Where a step has room for guesses: plain Python. Whose prompt is next is in test_scheduler.py."""

from __future__ import annotations

import pytest

from okavango.modalities.prompt import Rendered
from okavango.serving.sequence import Sequence
from okavango.serving.speculation import Guesses
from okavango.serving.step import Chunk
from okavango.serving.turns import most_guesses, with_guesses
from okavango.serving.types import Request

SIZE = 16


def sequence(prompt: int, max_tokens: int, *, guesses: bool = True) -> Sequence:
    tokens = tuple([1, 2, 3] * prompt)[:prompt]
    found = Sequence(Request("r", Rendered(tokens)), max_tokens)
    found.guesses = Guesses(tokens) if guesses else None
    found.num_computed = prompt - 1
    return found


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "room", "most"),
    [
        (10, 50, 16, 6),  # to the end of its block
        (16, 50, 16, 0),  # which is full
        (17, 50, 16, 15),
        (10, 4, 16, 3),  # the last token of the answer is picked, not guessed
        (10, 1, 16, 0),
        (10, 50, 2, 2),
        (10, 50, -3, -3),
    ],
)
def test_guesses_fit_block_answer_and_step(prompt, max_tokens, room, most):
    assert most_guesses(sequence(prompt, max_tokens), room, SIZE) == most


def test_a_step_is_filled_with_guesses_of_those_that_make_some():
    first, silent, last = sequence(20, 50), sequence(20, 50, guesses=False), sequence(20, 50)
    singles = [Chunk(s, s.num_computed, 1) for s in (first, silent, last)]
    filled = with_guesses(singles, 12, SIZE)
    assert [chunk.count for chunk in filled] == [8, 1, 3]
    assert (filled[0].draft, filled[2].draft) == ((3, 1, 2, 3, 1, 2, 3), (3, 1))
    assert [chunk.sure_end for chunk in filled] == [20, 20, 20]


def test_a_step_that_is_full_anyway_gets_none():
    singles = [Chunk(s, s.num_computed, 1) for s in (sequence(20, 50) for _ in range(3))]
    assert with_guesses(singles, 2, SIZE) == singles
