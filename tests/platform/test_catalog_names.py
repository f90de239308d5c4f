from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from okavango.platform.catalog.names import Ref, check_alias, check_name, near, parse_ref
from okavango.platform.errors import InputError


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("emoji", Ref("emoji")),
        ("emoji@3", Ref("emoji", version=3)),
        ("emoji@prod", Ref("emoji", alias="prod")),
        ("emoji@3a", Ref("emoji", alias="3a")),
        ("emoji@٣", Ref("emoji", alias="٣")),  # a digit elsewhere, but no version number here
    ],
)
def test_references(text: str, ref: Ref) -> None:
    assert parse_ref(text) == ref


@pytest.mark.parametrize("text", ["", "@", "@3", "emoji@"])
def test_half_a_reference_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="ADAPTER@3"):
        parse_ref(text)


@pytest.mark.parametrize("name", ["a", "0", "emoji", "shop-7.de_at", "a" * 64])
def test_names(name: str) -> None:
    check_name(name, "adapter")


@pytest.mark.parametrize(
    "name", ["", "Emoji", "-a", ".a", "_a", "a@1", "a/b", "a b", "é", "a\n", "a" * 65, "٣"]
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(InputError) as caught:
        check_name(name, "adapter")
    assert caught.value.where == f"adapter {name!r}"


@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True))
def test_a_name_is_a_reference_to_itself(name: str) -> None:
    check_name(name, "adapter")
    assert parse_ref(name) == Ref(name)


@pytest.mark.parametrize("name", ["3", "007", "Prod", "a@b"])
def test_what_is_no_alias(name: str) -> None:
    with pytest.raises(InputError):
        check_alias(name)


def test_near_names() -> None:
    assert near("emojj", ["emoji", "tickets"], "none") == "did you mean emoji?"
    assert near("zzz", ["b", "a"], "none") == "known: a, b"
    assert near("zzz", [f"n{i}" for i in range(9)], "none").endswith("n7, …")
    assert near("zzz", [], "none") == "none"
