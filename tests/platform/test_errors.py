"""The tree itself is compared with its drawing in tests/guards/test_names.py."""

from __future__ import annotations

import inspect

import pytest

from okavango.platform import errors
from okavango.platform.errors import BusyError, DataError, InputError, NotFoundError, OkavangoError

CLASSES = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, OkavangoError)]


@pytest.mark.parametrize(
    ("where", "remedy", "text"),
    [
        (None, None, "is empty"),
        ("train.jsonl:3", None, "train.jsonl:3: is empty"),
        (None, "add a line", "is empty (add a line)"),
        ("train.jsonl:3", "add a line", "train.jsonl:3: is empty (add a line)"),
    ],
)
def test_where_what_and_the_remedy(where: str | None, remedy: str | None, text: str) -> None:
    error = InputError("is empty", where=where, remedy=remedy)
    assert str(error) == text
    assert (error.message, error.where, error.remedy) == ("is empty", where, remedy)


@pytest.mark.parametrize(("ours", "theirs"), [(InputError, ValueError), (NotFoundError, LookupError)])
def test_ours_are_the_standard_ones_too(ours: type[OkavangoError], theirs: type[Exception]) -> None:
    assert issubclass(ours, theirs)


def test_every_class_has_a_code_of_its_own() -> None:
    codes = [each.code for each in CLASSES]
    assert len(set(codes)) == len(codes)


def test_a_data_error_holds_its_faults() -> None:
    error = DataError("2 faults", ("a", "b"), where="train.jsonl")
    assert error.faults == ("a", "b")
    assert str(error) == "train.jsonl: 2 faults"


def test_a_busy_error_says_when_to_come_back() -> None:
    error = BusyError("the queue is full", retry_after=2.5, remedy="retry")
    assert error.retry_after == 2.5
    assert str(error) == "the queue is full (retry)"
