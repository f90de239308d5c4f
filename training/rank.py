"""A further process of a job, which the leading one started:
python -m okavango.training.rank JOB RANK SIZE PORT THREADS."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from okavango.platform.catalog.store import open_catalog
from okavango.platform.config import load_settings

_WATCH_SECONDS = 1.0


def main() -> None:
    # stopping is the leader's to decide, who is asked by the same Ctrl-C
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _end_with_parent()
    from okavango.training.ranks import Seat, take
    from okavango.training.run import follow

    job, *numbers = sys.argv[1:]
    accelerator = take(Seat(*map(int, numbers)))
    settings = load_settings()
    catalog = open_catalog(settings)
    try:
        follow(catalog.get_job(job), accelerator, catalog, settings)
    finally:
        catalog.close()


def _end_with_parent() -> None:
    """A leader that is killed leaves nobody waiting for it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    main()
