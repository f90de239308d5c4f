"""The legal moves of jobs and adapter versions. Plain Python: no SQL, no clock.

job      queued → running → paused | succeeded | failed | cancelled
         running → queued      its lease expired, or its worker gave it back
         queued → paused       before anybody took it
         paused → queued       resumed
         queued, paused → cancelled

version  registered → ready | bound | refused      what the serving side found
         ready, bound → retired
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from okavango.platform.errors import ConflictError

JobState = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
VersionState = Literal["registered", "ready", "bound", "refused", "retired"]

JOB_STATES: tuple[str, ...] = get_args(JobState)
VERSION_STATES: tuple[str, ...] = get_args(VersionState)

JOB_MOVES: Mapping[str, frozenset[str]] = {
    "queued": frozenset({"running", "paused", "cancelled"}),
    "running": frozenset({"queued", "paused", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
VERSION_MOVES: Mapping[str, frozenset[str]] = {
    "registered": frozenset({"ready", "bound", "refused"}),
    "ready": frozenset({"retired"}),
    "bound": frozenset({"retired"}),
    "refused": frozenset(),
    "retired": frozenset(),
}

FINISHED = frozenset(state for state, moves in JOB_MOVES.items() if not moves)
SERVABLE = frozenset({"ready", "bound"})
"""Versions that may take traffic: their bundle binds, and where it has probes, it reproduces them."""


def check_job_move(old: str, new: str, where: str) -> None:
    """Raises ConflictError where a job may not go from `old` to `new`."""
    _check(JOB_MOVES, old, new, where)


def check_version_move(old: str, new: str, where: str) -> None:
    """Raises ConflictError where a version may not go from `old` to `new`."""
    _check(VERSION_MOVES, old, new, where)


def _check(moves: Mapping[str, frozenset[str]], old: str, new: str, where: str) -> None:
    assert new in moves, f"no such state: {new}"
    if new not in moves[old]:
        legal = ", ".join(sorted(moves[old])) or "nothing: that state is final"
        raise ConflictError(f"is {old} and cannot become {new}", where=where, remedy=f"possible: {legal}")
