"""Fixtures for every part lie in tests/support, one file an idea; pyproject.toml puts it on the path."""

import os
from pathlib import Path

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
