from __future__ import annotations

from typing import Any

import pytest

from okavango.platform.catalog.store import Catalog
from okavango.platform.errors import ConflictError, NotFoundError


def put(catalog: Catalog, file_id: str, size: int = 10, principal: str = "ana", **options: Any) -> Any:
    purpose = options.pop("purpose", "fine-tune")
    return catalog.put_file(
        file_id, f"{file_id}.jsonl", purpose, size, "0" * 64, principal=principal, **options
    )


def test_a_file_is_found_by_its_owner(catalog: Catalog, clock: Any) -> None:
    made = put(catalog, "file-1", 2**33)
    assert (made.name, made.bytes, made.created_at) == ("file-1.jsonl", 2**33, clock.now)
    assert catalog.get_file("file-1") == catalog.get_file("file-1", principal="ana") == made
    for call in (
        lambda: catalog.get_file("file-1", principal="bo"),
        lambda: catalog.delete_file("file-1", principal="bo"),
        lambda: catalog.list_files(principal="bo", after="file-1"),
        lambda: catalog.get_file("file-2"),
    ):
        with pytest.raises(NotFoundError, match="no such file"):
            call()
    assert catalog.delete_file("file-1", principal="ana") == made
    assert catalog.list_files() == ()


def test_files_are_listed_in_order_and_pages(catalog: Catalog, clock: Any) -> None:
    for i in range(4):
        put(catalog, f"file-{i}", purpose="vision" if i == 3 else "fine-tune")
        if i != 1:  # two of one moment
            clock.advance(1)
    put(catalog, "file-9", principal="bo")

    def listed(**options: Any) -> list[str]:
        return [each.id for each in catalog.list_files(principal="ana", **options)]

    assert listed() == ["file-3", "file-2", "file-1", "file-0"]
    assert listed(newest_first=False) == ["file-0", "file-1", "file-2", "file-3"]
    assert listed(after="file-2") == ["file-1", "file-0"]
    assert listed(after="file-1") == ["file-0"]
    assert listed(after="file-0", newest_first=False, limit=2) == ["file-1", "file-2"]
    assert listed(purpose="vision") == ["file-3"]


def test_a_quota_is_over_all_files_of_a_principal(catalog: Catalog) -> None:
    put(catalog, "file-1", 60, quota_bytes=100)
    with pytest.raises(ConflictError, match="41 bytes beside 60 are over the quota of 100"):
        put(catalog, "file-2", 41, quota_bytes=100)
    put(catalog, "file-2", 40, quota_bytes=100)
    put(catalog, "file-3", 100, "bo", quota_bytes=100)
    assert (catalog.file_bytes("ana"), catalog.file_bytes("cy")) == (100, 0)
