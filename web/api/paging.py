"""Lists in OpenAI's form, a page at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


def page(found: Sequence[Item], limit: int, shown: Callable[[Item], dict[str, Any]]) -> dict[str, Any]:
    """A page of `limit` items. `found` holds one more where there are more."""
    data = [shown(item) for item in found[:limit]]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
    return {"object": "list", "data": data, "has_more": len(found) > limit, **ends}
