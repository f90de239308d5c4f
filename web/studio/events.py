"""How all of the studio's events behave: no part of a public API, and nothing is covered while they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUEUED: Mapping[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""For what streams, or has a message for the page."""
DIRECT: Mapping[str, Any] = {**QUEUED, "queue": False}
"""For what is answered at once."""
