"""The check for servers that answer with another's adapter."""

from __future__ import annotations

from mixing import Mixing

ALONE = {"base": "a river runs", "one": "a road turns", "two": "boats"}


def test_equal_answers_are_alike() -> None:
    found = Mixing.of(ALONE, ALONE)
    assert found == Mixing(dict.fromkeys(ALONE, 1.0), {}, {})


def test_a_batch_answered_by_one_adapter_is_noticed() -> None:
    found = Mixing.of(ALONE, dict.fromkeys(ALONE, "a road turns"))
    assert found.mistaken == {"base": "one", "two": "one"}
    assert found.alike["two"] == 0


def test_rounding_late_in_an_answer_is_no_mistake() -> None:
    found = Mixing.of(ALONE, {**ALONE, "base": "a river rises"})
    assert found.mistaken == {}
    assert found.alike["base"] == 9 / 13


def test_an_adapter_that_does_nothing_is_a_twin() -> None:
    assert Mixing.of({**ALONE, "two": "a river runs"}, {**ALONE, "two": "a river runs"}).twins == {
        "two": "base"
    }
