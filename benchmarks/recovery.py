"""How long until a job trains again that something has killed: from kill -9 to the next attempt's first step.

    python benchmarks/recovery.py                      on the starter base, SQLite
    python benchmarks/recovery.py --base tiny          a quick look
    python benchmarks/recovery.py --database URL       on a PostgreSQL database that nothing else uses, too

Prints the figures, and writes them with machine and versions to recovery.json and recovery.md in
benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from machine import describe
from ours import base_of
from report import PACKAGES, describe_machine, table
from rich.console import Console
from rich.markdown import Markdown

from okavango.modalities.base import Base
from okavango.modalities.build import quiet_transformers
from okavango.platform.catalog import migrate
from okavango.platform.catalog.records import JobEventRecord
from okavango.platform.catalog.store import Catalog, open_catalog
from okavango.platform.config import Settings, environment_of
from okavango.training.spec import parse_spec
from okavango.training.worker import submit

KILLED = {
    "process": "the job's process",
    "worker": "its worker",
    "host": "both, as when a host dies",
}
_ROWS = 256
_PATIENCE_SECONDS = 300.0

T = TypeVar("T")


@dataclass(frozen=True)
class Recovery:
    """One kill.

    Attributes:
        seconds: until the first step of the next attempt is in the catalog.
        claimed: until the next attempt began.
    """

    seconds: float
    claimed: float


class Service:
    """A catalog with workers: one works, and one waits for what it leaves."""

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self._settings = settings
        self.catalog = catalog
        self._workers: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        command = [Path(sys.executable).with_name("okavango"), "worker", "--threads", "1"]
        output = subprocess.DEVNULL
        environment = environment_of(self._settings)
        worker = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        self._workers.append(worker)
        return worker

    def stop(self) -> None:
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.wait()

    def steps(self, job_id: str, after: int = 0) -> tuple[JobEventRecord, ...]:
        return self.catalog.list_events(job_id, after=after, kind="metrics", limit=10_000)

    def begun(self, job_id: str) -> list[int]:
        """Numbers of the events with which attempts began."""
        events = self.catalog.list_events(job_id, kind="state", limit=10_000)
        return [event.number for event in events if event.message == "running"]


def main() -> None:
    options = parse_options()
    found: dict[str, dict[str, list[Recovery]]] = {}
    with tempfile.TemporaryDirectory() as name, quiet_transformers():
        folder = Path(name)
        base = base_of(options.base, folder)
        databases = {"SQLite": "", **({"PostgreSQL": options.database} if options.database else {})}
        with Console(stderr=True).status("starting") as status:
            for kind, url in databases.items():
                settings = prepare(folder / kind, base, url)
                found[kind] = measure(settings, base, options, lambda text: status.update(text))
        Console().print(Markdown(write(options, base.name, found)))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--steps", type=int, default=30, help="before the kill, at least; default: 30")
    parser.add_argument("--base", default="starter", help='a base, or "tiny" for a quick look')
    parser.add_argument("--database", default="", help="URL of a PostgreSQL database, for a second table")
    parser.add_argument("--kill", nargs="+", choices=tuple(KILLED), default=list(KILLED), help="default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="a folder")
    return parser.parse_args()


def prepare(folder: Path, base: Base, url: str) -> Settings:
    """A home of its own, with the base and rows of text."""
    settings = Settings(home=folder / "home", cache=folder / "cache", database_url=url)
    settings.bases.mkdir(parents=True)
    (settings.bases / base.name).symlink_to(base.folder)
    if url:
        migrate.upgrade(url)
    rows = []
    for i in range(_ROWS):
        turns = (("user", f"What is {i} and one?"), ("assistant", f"That is {i + 1}."))
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return settings


def measure(
    settings: Settings, base: Base, options: argparse.Namespace, tell: Callable[[str], None]
) -> dict[str, list[Recovery]]:
    found: dict[str, list[Recovery]] = {name: [] for name in options.kill}
    catalog = open_catalog(settings)
    try:
        for number in range(options.rounds):
            for name, recoveries in found.items():
                tell(f"{KILLED[name]}, round {number + 1} of {options.rounds}")
                recoveries.append(recover(settings, catalog, base, name, options.steps))
    finally:
        catalog.close()
    return found


def recover(settings: Settings, catalog: Catalog, base: Base, killed: str, steps: int) -> Recovery:
    """Let a job run, kill what is to be killed, and wait until it trains again."""
    spec = {"base": base.name, "data": settings.home.parent / "rows.jsonl", "name": "recovery"}
    job = submit(catalog, settings, parse_spec({**spec, "steps": 1_000_000, "save_every": 20}))
    service = Service(settings, catalog)
    try:
        worker = service.start()
        wait(lambda: len(service.steps(job.id)) >= steps)
        if killed != "process":
            service.start()
            time.sleep(5)  # for it to be up, and to wait as it would
        before = service.begun(job.id)
        kill(worker, killed)
        start = time.monotonic()
        begun = wait(lambda: service.begun(job.id)[len(before) :])[0]
        claimed = time.monotonic() - start
        wait(lambda: service.steps(job.id, after=begun))
        return Recovery(time.monotonic() - start, claimed)
    finally:
        catalog.request_cancel(job.id)
        wait(lambda: catalog.get_job(job.id).state == "cancelled")
        service.stop()


def kill(worker: subprocess.Popen[bytes], what: str) -> None:
    """The worker before its processes, so that it cannot notice."""
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    if what != "process":
        worker.kill()
    if what != "worker":
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)


def wait(what: Callable[[], T]) -> T:
    """What is asked for, once it is something."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < until:
        if found := what():
            return found
        time.sleep(0.05)
    raise SystemExit(f"nothing for {_PATIENCE_SECONDS:.0f} seconds")


def write(options: argparse.Namespace, base: str, found: dict[str, dict[str, list[Recovery]]]) -> str:
    """Write recovery.json and recovery.md; the latter's text."""
    machine = describe(PACKAGES)
    options.out.mkdir(parents=True, exist_ok=True)
    raw = {
        kind: {name: [asdict(each) for each in recoveries] for name, recoveries in cases.items()}
        for kind, cases in found.items()
    }
    described = {**machine, "base": base, "found": raw}
    (options.out / "recovery.json").write_text(json.dumps(described, indent=2) + "\n")
    parts = [
        "# From kill -9 to the next step",
        "Written by `benchmarks/recovery.py`; do not edit.",
        describe_machine(machine, "one thread a job"),
        f"Base {base}, rows of text, a checkpoint every 20 steps; medians of {options.rounds} rounds with "
        "their range. A worker polls the queue once a second, a lease lasts 30 seconds; where the worker is "
        "killed, another one waits. Claimed: until the next attempt begins; the rest is its process's start.",
        *(f"## {kind}\n\n{_table(cases)}" for kind, cases in found.items()),
    ]
    shown = "\n\n".join(parts) + "\n"
    (options.out / "recovery.md").write_text(shown)
    return shown


def _table(cases: dict[str, list[Recovery]]) -> str:
    rows = [
        [
            KILLED[name],
            _spread([each.seconds for each in recoveries]),
            _spread([each.claimed for each in recoveries]),
        ]
        for name, recoveries in cases.items()
    ]
    return table(["killed", "seconds to the next step", "claimed after"], rows)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
