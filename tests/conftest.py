"""Fixtures for every part lie in tests/support, one file an idea; pyproject.toml puts it on the path."""

import os
from pathlib import Path

import pytest

FLOWS = Path(__file__).parent / "flows"

if not Path("/dev/nvidiactl").exists():
    # kernels for GPUs are interpreted where there is none; Triton wants to know before it is imported
    os.environ["TRITON_INTERPRET"] = "1"

pytest_plugins = [
    "browser_fixtures",
    "checkpoint_fixtures",
    "database_fixtures",
    "server_fixtures",
    "tiny_fixtures",
    "training_fixtures",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Flows drive browsers and processes of their own on whatever machine this is: one that failed gets a
    second try, and the summary says so. Whatever fails twice has failed."""
    for item in items:
        if FLOWS in item.path.parents:
            item.add_marker(pytest.mark.flaky(reruns=1))
