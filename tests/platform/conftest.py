"""Short ways to fill a catalog."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from okavango.platform.catalog.records import VersionRecord
from okavango.platform.catalog.store import Catalog

COMPONENTS = {"decoder": "d" * 64, "encoders.image": "e" * 64}

Register = Callable[..., VersionRecord]


@pytest.fixture
def register(catalog: Catalog) -> Register:
    """register("emoji", "digest") adds a version over the base `starter`; more by keyword."""
    catalog.put_base("starter", "base-1", COMPONENTS, "/bases/starter")

    def add(adapter: str, digest: str, *, state: str | None = None, **changes: Any) -> VersionRecord:
        facts: dict[str, Any] = {
            "base": "starter",
            "components": COMPONENTS,
            "modalities": ("image",),
            "lineage": {"data": "x"},
            "metrics": {"chrf": 21.5},
        }
        version = catalog.register_version(adapter, digest, **(facts | changes))
        if state is None:
            return version
        return catalog.set_version_state(adapter, version.version, state)

    return add
