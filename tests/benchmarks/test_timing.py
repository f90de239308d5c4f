"""Figures out of traces whose times are known."""

from __future__ import annotations

import pytest
from timing import Figures, Spread, Trace, by_model, percentile

STREAMED = Trace("a", 1.0, (2.0, 2.5, 3.0), 3.5, tokens=5, wanted=5, prompt_tokens=10)
WHOLE = Trace("b", 0.0, (), 4.0, tokens=3, wanted=5, prompt_tokens=10)
FAILED = Trace("b", 0.0, (), 5.0, tokens=0, wanted=5, error="busy")


def test_decoding_is_measured_from_the_first_token_on() -> None:
    assert STREAMED.first == 1.0
    assert STREAMED.gaps == [0.5, 0.5]
    assert STREAMED.decode_rate == 4.0
    assert WHOLE.decode_rate is None


def test_figures_span_from_the_first_start_to_the_last_end() -> None:
    found = Figures.of([STREAMED, WHOLE, FAILED])
    assert (found.requests, found.short, found.errors) == (3, 1, {"busy": 1})
    assert (found.seconds, found.output_tokens, found.prompt_tokens) == (5.0, 8, 20)
    assert (found.output_rate, found.request_rate, found.decode_rate) == (1.6, 0.4, 4.0)
    assert found.first == Spread(1.0, 1.0, 1.0)


def test_nothing_but_failures_has_figures_too() -> None:
    found = Figures.of([FAILED])
    assert (found.output_rate, found.first, found.gap, found.whole, found.decode_rate) == (0, *[None] * 4)


def test_figures_by_model() -> None:
    found = by_model([STREAMED, WHOLE, FAILED])
    assert {model: each.requests for model, each in found.items()} == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([3.0], 0.95, 3.0),
        ([1.0, 2.0], 0.5, 1.5),
        ([4.0, 1.0, 3.0, 2.0, 5.0], 0.95, 4.8),
        ([1.0, 2.0], 1.0, 2.0),
    ],
)
def test_percentiles_lie_between_ranks(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == pytest.approx(expected)
