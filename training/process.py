"""One job in a process of its own, which a worker started: python -m okavango.training.process JOB WORKER.

Says that it lives before it loads torch, and stops where the worker that started it is no more.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import select
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from rich.console import Console

from okavango.platform.catalog.records import JobRecord
from okavango.platform.catalog.store import Catalog, open_catalog
from okavango.platform.config import Settings, load_settings
from okavango.training.lease import Lease
from okavango.training.monitor import Monitor, Reason, Stopped

_WATCH_SECONDS = 1.0
FAILED, STOPPED = 1, 3


def main() -> int:
    """The exit code: 0 done, 1 failed, 3 stopped; the job's state says more."""
    options = _options()
    _take_place(options)
    settings = load_settings()
    monitor = Monitor(Console(force_terminal=False, width=120))
    _heed_signals(monitor)
    _watch_parent(monitor)
    catalog = open_catalog(settings)
    try:
        job = catalog.get_job(options.job)
        with Lease(catalog, job.id, options.worker, options.lease, monitor) as lease:
            return _work(catalog, settings, job, monitor, lease, options.threads)
    finally:
        catalog.close()


def _work(
    catalog: Catalog, settings: Settings, job: JobRecord, monitor: Monitor, lease: Lease, threads: int
) -> int:
    import torch

    from okavango.platform.artifacts import ArtifactStore
    from okavango.training.worker import work_on

    torch.set_num_threads(threads)
    store = ArtifactStore(settings.artifacts, settings.cache / "artifacts")
    try:
        work_on(catalog, store, settings, job, monitor, lease)
    except Stopped as stop:
        print(f"{job.id}: {stop.reason.value}", flush=True)
        return STOPPED
    except Exception as error:
        print(f"{job.id}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return FAILED
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("worker")
    parser.add_argument("--lease", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--nice", type=int, default=0)
    return parser.parse_args()


def _take_place(options: argparse.Namespace) -> None:
    give_way(options.nice)
    if options.memory:
        # Data and heap, not what is mapped from files: a job that wants more fails, and not its neighbours.
        resource.setrlimit(resource.RLIMIT_DATA, (options.memory, options.memory))


def give_way(niceness: int) -> None:
    """Let other processes of the machine go first, those of other sessions, too: where Linux groups processes
    by session, it weighs the groups first, and niceness counts within one. See sched(7)."""
    os.nice(niceness)
    group = Path("/proc/self/autogroup")
    if niceness and group.is_file():
        with contextlib.suppress(OSError):  # no groups, or not for this process to set
            group.write_text(str(niceness))


def _heed_signals(monitor: Monitor) -> None:
    def stop(_: int, __: FrameType | None) -> None:
        monitor.stop(Reason.INTERRUPT)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _watch_parent(monitor: Monitor) -> None:
    """Stop, with a checkpoint, where the worker died: another one may take the job."""
    parent = os.getppid()

    def watch() -> None:
        _wait_for_end(parent)
        monitor.stop(Reason.INTERRUPT)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _wait_for_end(parent: int) -> None:
    """Until the parent has ended: at once where Linux tells so (pidfd_open(2)), within a second elsewhere."""
    with contextlib.suppress(AttributeError, OSError):
        handle = os.pidfd_open(parent)
        try:
            select.select([handle], [], [])
        finally:
            os.close(handle)
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
