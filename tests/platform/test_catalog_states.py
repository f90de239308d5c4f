from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from okavango.platform.catalog import states
from okavango.platform.errors import ConflictError

Check = Callable[[str, str, str], None]

LEGAL_JOB_MOVES = {
    ("queued", "running"),
    ("queued", "paused"),
    ("queued", "cancelled"),
    ("running", "queued"),
    ("running", "paused"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelled"),
    ("paused", "queued"),
    ("paused", "cancelled"),
}
LEGAL_VERSION_MOVES = {
    ("registered", "ready"),
    ("registered", "bound"),
    ("registered", "refused"),
    ("ready", "retired"),
    ("bound", "retired"),
}


@pytest.mark.parametrize(
    ("check", "known", "legal"),
    [
        (states.check_job_move, states.JOB_STATES, LEGAL_JOB_MOVES),
        (states.check_version_move, states.VERSION_STATES, LEGAL_VERSION_MOVES),
    ],
)
def test_exactly_the_drawn_moves_are_legal(
    check: Check, known: tuple[str, ...], legal: set[tuple[str, str]]
) -> None:
    def is_legal(old: str, new: str) -> bool:
        try:
            check(old, new, "here")
        except ConflictError:
            return False
        return True

    assert {(old, new) for old in known for new in known if is_legal(old, new)} == legal


def test_a_refusal_says_where_and_what_is_possible() -> None:
    with pytest.raises(ConflictError) as caught:
        states.check_job_move("queued", "succeeded", "job-1")
    assert (
        str(caught.value)
        == "job-1: is queued and cannot become succeeded (possible: cancelled, paused, running)"
    )


def test_a_final_state_says_that_it_is() -> None:
    with pytest.raises(ConflictError, match="final"):
        states.check_version_move("retired", "ready", "emoji@1")


@pytest.mark.parametrize("moves", [states.JOB_MOVES, states.VERSION_MOVES])
@given(choices=st.lists(st.integers(min_value=0), max_size=30))
def test_every_walk_can_still_end(moves: Mapping[str, frozenset[str]], choices: list[int]) -> None:
    """Wherever legal moves lead, a final state is within reach."""
    state = next(iter(moves))
    for choice in choices:
        if moves[state]:
            state = sorted(moves[state])[choice % len(moves[state])]
    reached = {state}
    while (more := set().union(*(moves[each] for each in reached)) - reached) != set():
        reached |= more
    assert any(not moves[each] for each in reached)


def test_finished_states_are_those_without_a_way_out() -> None:
    assert {"succeeded", "failed", "cancelled"} == states.FINISHED
