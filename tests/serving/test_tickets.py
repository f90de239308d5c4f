"""What a request may get, and when its time is up: plain Python."""

from __future__ import annotations

import pytest

from okavango.modalities.prompt import Rendered
from okavango.platform.errors import ContextLengthError
from okavango.serving.tickets import most_tokens
from okavango.serving.types import Request, SamplingParams


def request(prompt: int, wanted: int | None) -> Request:
    return Request("r", Rendered(tuple(range(prompt))), params=SamplingParams(max_tokens=wanted))


@pytest.mark.parametrize(
    ("prompt", "wanted", "longest", "most"),
    [(10, 5, None, 5), (10, None, None, 90), (10, None, 64, 54), (10, None, 640, 90), (99, 1, None, 1)],
)
def test_an_answer_ends_with_the_context_or_the_memory(prompt, wanted, longest, most):
    assert most_tokens(request(prompt, wanted), 100, longest) == most


@pytest.mark.parametrize(
    ("prompt", "wanted", "longest", "said"),
    [
        (100, None, None, "100 prompt tokens exceed the limit of 100 tokens .*lower max_tokens.$"),
        (90, 11, None, "90 prompt tokens and 11 to generate exceed the limit of 100 tokens"),
        (60, 5, 64, "exceed the limit of 64 tokens .*--kv-memory"),
    ],
)
def test_what_does_not_fit_is_refused(prompt, wanted, longest, said):
    with pytest.raises(ContextLengthError, match=said):
        most_tokens(request(prompt, wanted), 100, longest)
