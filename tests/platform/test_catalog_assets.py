from __future__ import annotations

from dataclasses import FrozenInstanceError
from datetime import UTC
from typing import Any

import pytest

from okavango.platform.catalog.store import Catalog
from okavango.platform.errors import ConflictError, InputError, NotFoundError

COMPONENTS = {"decoder": "d1", "encoders.image": "e1"}


def test_a_base_said_twice_changes_nothing(catalog: Catalog, clock: Any) -> None:
    first = catalog.put_base("starter", "b1", COMPONENTS, "/here")
    clock.advance(60)
    assert catalog.put_base("starter", "b1", COMPONENTS, "/here") == first
    assert catalog.get_base("starter") == first
    assert first.components == COMPONENTS
    assert first.created_at == first.updated_at
    assert first.created_at.tzinfo is UTC


def test_a_base_of_another_digest_takes_the_name(catalog: Catalog, clock: Any, register: Any) -> None:
    version = register("emoji", "v1")
    clock.advance(60)
    moved = catalog.put_base("starter", "base-2", {"decoder": "d2"}, "/there")
    assert (moved.digest, moved.components, moved.location) == ("base-2", {"decoder": "d2"}, "/there")
    assert moved.updated_at > moved.created_at
    assert catalog.resolve("emoji") == version
    assert version.base_digest == "base-1"
    assert register("emoji", "v2").base_digest == "base-2"


def test_a_base_is_not_called_like_an_adapter(catalog: Catalog, register: Any) -> None:
    register("emoji", "v1")
    with pytest.raises(ConflictError, match="emoji"):
        catalog.put_base("emoji", "b", {}, "/b")


def test_a_base_has_a_name(catalog: Catalog) -> None:
    with pytest.raises(InputError, match="base 'A@1'"):
        catalog.put_base("A@1", "b", {}, "/b")


def test_an_unknown_base_names_its_neighbours(catalog: Catalog) -> None:
    with pytest.raises(NotFoundError, match="okavango base build starter"):
        catalog.get_base("starter")
    catalog.put_base("starter", "b1", {}, "/here")
    with pytest.raises(NotFoundError, match="did you mean starter"):
        catalog.get_base("startre")


def test_bases_by_name(catalog: Catalog) -> None:
    for name in ("tiny", "starter"):
        catalog.put_base(name, name, {}, "/here")
    assert [base.name for base in catalog.list_bases()] == ["starter", "tiny"]


def test_a_dataset_is_its_digest(catalog: Catalog, clock: Any) -> None:
    first = catalog.put_dataset("train.jsonl", "t1", "/data/train.jsonl", 700)
    clock.advance(60)
    assert catalog.put_dataset("train.jsonl", "t1", "/data/train.jsonl", 700) == first
    moved = catalog.put_dataset("copy.jsonl", "t1", "/data/copy.jsonl", 700)
    assert (moved.name, moved.created_at) == ("copy.jsonl", first.created_at)
    assert catalog.get_dataset("t1") == moved
    with pytest.raises(NotFoundError):
        catalog.get_dataset("t2")


def test_a_dataset_has_no_negative_length(catalog: Catalog) -> None:
    with pytest.raises(InputError, match="-1 rows"):
        catalog.put_dataset("train.jsonl", "t1", "/data", -1)


def test_records_do_not_change(catalog: Catalog) -> None:
    base = catalog.put_base("starter", "b1", COMPONENTS, "/here")
    with pytest.raises(FrozenInstanceError):
        base.digest = "b2"  # type: ignore[misc]
    base.components["decoder"] = "mine"  # a copy: the catalog keeps its own
    assert catalog.get_base("starter").components == COMPONENTS
