"""Drafting goes on where it brings more tokens a second, and rests where it brings fewer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from okavango.serving.worth import Seen, Worth


def drafted_steps(worth: Worth, steps: int, *, gain: int, cost: float, sequences: int = 1) -> int:
    """How many of these steps, a millisecond each, were drafted: `gain` more tokens for `cost` seconds.

    Of the cost, a tenth of a millisecond goes to four rows more.
    """
    drafted, rows = 0, 1e-4
    for _ in range(steps):
        if worth.wants_drafts(sequences):
            drafted += 1
            worth.saw(Seen(sequences, sequences + 4, 0.001 + rows, 4, gain, cost - rows))
        else:
            worth.saw(Seen(sequences, sequences, 0.001))
    return drafted


def test_drafts_that_pay_go_on():
    assert drafted_steps(Worth(), 1000, gain=2, cost=0.001) > 950


def test_drafts_that_do_not_pay_grow_rare():
    worth = Worth()
    assert 16 <= drafted_steps(worth, 80, gain=2, cost=0.003) <= 20
    assert drafted_steps(worth, 10_000, gain=2, cost=0.003) < 150


def test_what_pays_again_is_found_again():
    worth = Worth()
    drafted_steps(worth, 500, gain=0, cost=0.001)
    assert drafted_steps(worth, 2000, gain=3, cost=0.001) > 1500


def test_what_stops_to_pay_is_found_out():
    worth = Worth()
    drafted_steps(worth, 500, gain=3, cost=0.001)
    assert drafted_steps(worth, 500, gain=0, cost=0.001) < 150


def test_batches_of_another_size_are_another_matter():
    worth = Worth()
    drafted_steps(worth, 500, gain=2, cost=0.003)
    assert drafted_steps(worth, 500, gain=16, cost=0.003, sequences=4) > 400


def test_reading_is_paid_off_over_many_steps():
    """A prompt that takes as long as ten steps is worth reading where every step saves half of itself."""
    worth = Worth()
    assert drafted_steps(worth, 4, gain=0, cost=1) == 0
    worth.owe(0.010)
    assert drafted_steps(worth, 100, gain=1, cost=0.0005) > 90
    worth.owe(0.200)
    assert drafted_steps(worth, 100, gain=1, cost=0.0005) < 50


def test_rows_of_other_guesses_are_not_the_drafts_fault():
    """Steps of sixteen rows take long; that twelve of these are look-up's is no reason to rest."""
    worth, drafted = Worth(), 0
    for _ in range(200):
        if worth.wants_drafts(2):
            drafted += 1
            worth.saw(Seen(2, 16, 0.0102, 2, 2, 0.001))
        else:
            worth.saw(Seen(2, 14, 0.010))
            worth.saw(Seen(2, 2, 0.001))
    assert drafted > 150


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 7), st.floats(0, 1)), max_size=400))
def test_steps_without_drafts_never_end(steps):
    """Else nobody would know what drafts are compared with."""
    worth, drafted = Worth(), 0
    for sequences, gain, seconds in steps:
        wants = worth.wants_drafts(sequences)
        drafted += wants
        if wants:
            worth.saw(Seen(sequences, sequences + gain, seconds, gain, gain, 0.1))
        else:
            worth.saw(Seen(sequences, sequences, seconds))
    assert drafted <= len(steps) - len(steps) // (32 * 6)
