"""Folders that nobody sees until they are whole."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_SUFFIX = ".draft"


logger = logging.getLogger(__name__)


@contextmanager
def draft_folder(parent: Path, name: str) -> Iterator[Path]:
    """An empty hidden folder in `parent`, gone after the block unless it was renamed.

    Drafts of one name wait for each other, across processes; a killed owner's leavings go when the next one
    starts. What is made in a draft becomes visible by one rename, so it is never seen half-made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with _turn(FileLock(parent / f".{name}.lock"), name):
        for leftover in parent.glob(f".{name}.*{_SUFFIX}"):
            shutil.rmtree(leftover, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=_SUFFIX, dir=parent))
        draft.chmod(0o755)  # mkdtemp's own mode would keep the result from other users
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _turn(lock: FileLock, name: str) -> Iterator[None]:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is making %s; waiting for it", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
