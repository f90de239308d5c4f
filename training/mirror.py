"""What a job keeps on the way: its folder on this host, and checkpoints in the artifact store for others.

The store has them where it is not this host's own folder: a job that a worker of another host takes up
goes on from the last checkpoint that reached it.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from okavango.platform.config import Settings
from okavango.platform.errors import NotReadyError
from okavango.platform.stored import Stored

_LAST = "state.json"
_KEPT = 2


class Mirror:
    """The checkpoints of one job. Errors: those of Stored."""

    def __init__(self, stored: Stored, job_id: str) -> None:
        self._stored = stored
        self._job = job_id

    def push(self, folder: Path) -> None:
        """Copy a checkpoint or best state to the store, and remove all but the newest of its kind there."""
        self._stored.put_folder(self._job, folder, _LAST)
        kind = folder.name.partition("-")[0]
        alike = [name for name in self._stored.list_folders(self._job, _LAST) if name.startswith(f"{kind}-")]
        self._stored.remove_folders(self._job, alike[:-_KEPT])

    def pull(self, folder: Path) -> None:
        """Copy what the store has, and `folder` has not."""
        for name in self._stored.list_folders(self._job, _LAST):
            if not (folder / name / _LAST).is_file():
                shutil.rmtree(folder / name, ignore_errors=True)
                self._stored.get_folder(self._job, name, folder / name)

    def clear(self) -> None:
        self._stored.remove_folders(self._job)


def stored_of(settings: Settings) -> Stored:
    return Stored(settings.artifacts, settings.cache / "files")


def mirror_of(settings: Settings, job_id: str) -> Mirror | None:
    """None where the store is this host's own folder: its jobs' folders lie beside it."""
    return Mirror(stored_of(settings), job_id) if settings.artifacts_url else None


def discard(settings: Settings, job_id: str) -> None:
    """Remove what a job that has ended left on the way."""
    shutil.rmtree(settings.jobs / job_id, ignore_errors=True)
    mirror = mirror_of(settings, job_id)
    if mirror is not None:
        with suppress(NotReadyError):  # a leftover is no reason to fail
            mirror.clear()
