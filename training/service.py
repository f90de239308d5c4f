"""A worker: takes jobs from the queue and does each in a process of its own, until it is told to stop.

The worker holds the lease from the claim on, and its process goes on with it. A process that dies gives its
job back at once; where the worker itself dies, its processes notice and stop, and where all of a host dies,
the leases run out.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from okavango.platform.catalog.records import JobRecord
from okavango.platform.catalog.states import FINISHED
from okavango.platform.catalog.store import Catalog, open_catalog
from okavango.platform.config import Settings, environment_of
from okavango.platform.errors import ConflictError, OkavangoError
from okavango.training.lease import LEASE_SECONDS, new_worker
from okavango.training.mirror import discard

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_KEPT_LOGS = 100


@dataclass(frozen=True)
class WorkerOptions:
    """How one worker works.

    Attributes:
        jobs: at a time.
        threads: of each job; None for all cores, shared among the jobs.
        memory_bytes: that each job may take beside what it maps; None for no limit.
        most_running: jobs of one principal at a time, over all workers.
        niceness: of the jobs' processes: 0 as any other, 19 after all others.
        stop_seconds: time for jobs to write a checkpoint when the worker is told to stop.
    """

    jobs: int = 1
    threads: int | None = None
    memory_bytes: int | None = None
    most_running: int | None = None
    niceness: int = 0
    lease_seconds: float = LEASE_SECONDS
    poll_seconds: float = _POLL_SECONDS
    stop_seconds: float = 60.0


@dataclass(frozen=True)
class _Running:
    job: JobRecord
    worker: str
    process: subprocess.Popen[bytes]


class Worker:
    """Works in a thread of its own between `start` and `stop`, or in the caller's: see `run`."""

    def __init__(self, settings: Settings, options: WorkerOptions | None = None) -> None:
        self._settings = settings
        self._options = options or WorkerOptions()
        self._running: list[_Running] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self.run, name="okavango-worker", daemon=True)

    @property
    def jobs(self) -> tuple[str, ...]:
        """Ids of the jobs that it works on."""
        return tuple(each.job.id for each in self._running)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Have jobs write their checkpoints, give them back, and end."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def ask_to_stop(self) -> None:
        """As `stop`, but without waiting for it."""
        self._over.set()

    def run(self, *, until_idle: bool = False) -> None:
        """Work until told to stop, or until nothing is left to do."""
        catalog = open_catalog(self._settings)
        try:
            self._sweep(catalog)
            while not self._over.is_set():
                try:
                    self._reap(catalog)
                    self._fill(catalog)
                except OkavangoError as error:  # a catalog that is away comes back
                    log.warning("the queue cannot be read: %s", error)
                if until_idle and not self._running:
                    break
                self._over.wait(self._options.poll_seconds)
            self._end(catalog)
        finally:
            catalog.close()

    def _sweep(self, catalog: Catalog) -> None:
        """Remove what jobs left here that ended while nobody worked on them."""
        for folder in self._settings.jobs.glob("job-*"):
            with suppress(OkavangoError):
                if catalog.get_job(folder.name).state in FINISHED:
                    discard(self._settings, folder.name)

    def _fill(self, catalog: Catalog) -> None:
        options = self._options
        while len(self._running) < options.jobs and not self._over.is_set():
            worker = new_worker()
            job = catalog.claim_job(worker, options.lease_seconds, most_running=options.most_running)
            if job is None:
                return
            try:
                process = self._spawn(job, worker)
            except OSError:
                catalog.release_job(job.id, worker)
                raise
            log.info("%s for %s: attempt %d, process %d", job.id, job.name, job.attempts, process.pid)
            self._running.append(_Running(job, worker, process))

    def _spawn(self, job: JobRecord, worker: str) -> subprocess.Popen[bytes]:
        options, settings = self._options, self._settings
        threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
        command = [sys.executable, "-m", "okavango.training.process", job.id, worker]
        command += [f"--lease={options.lease_seconds}", f"--threads={threads}"]
        command += [f"--memory={options.memory_bytes or 0}", f"--nice={options.niceness}"]
        with _log_file(settings, job.id).open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment_of(settings) | {"OMP_NUM_THREADS": str(threads)},
                start_new_session=True,  # Ctrl-C is for the worker, which tells its jobs
            )

    def _reap(self, catalog: Catalog) -> None:
        """Notice processes that ended, and see to jobs that one has left behind."""
        for each in tuple(self._running):
            code = each.process.poll()
            if code is None:
                continue
            self._settle(catalog, each, code)
            self._running.remove(each)

    def _settle(self, catalog: Catalog, each: _Running, code: int) -> None:
        job = catalog.get_job(each.job.id)
        if job.worker != each.worker or job.state != "running":
            log.info("%s is %s", job.id, job.state)
            return
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        log.warning("%s: its process ended by %s", job.id, how)
        try:
            catalog.lose_job(job.id, each.worker, f"its process ended by {how}")
        except ConflictError as error:
            log.info("%s", error)

    def _end(self, catalog: Catalog) -> None:
        for each in self._running:
            each.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + self._options.stop_seconds
        for each in self._running:
            try:
                each.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("%s did not stop in time: it goes on from its last checkpoint", each.job.id)
                each.process.kill()
                each.process.wait()
        try:
            self._reap(catalog)
        except OkavangoError as error:
            log.warning("jobs could not be given back, and wait for their leases: %s", error)


def _log_file(settings: Settings, job_id: str) -> Path:
    """Where a job's process writes; the newest hundred are kept."""
    folder = settings.home / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    old = sorted(folder.glob("job-*.log"), key=lambda path: path.stat().st_mtime)[:-_KEPT_LOGS]
    for path in old:
        path.unlink(missing_ok=True)
    return folder / f"{job_id}.log"
