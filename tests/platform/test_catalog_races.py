"""Several processes on one catalog at a time, and what happens when one of them is killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from okavango.platform.catalog import migrate
from okavango.platform.catalog.store import Catalog
from okavango.platform.catalog.transactions import utc_now
from okavango.platform.errors import ConflictError

NUM_RACERS = 4


class Racer:
    def __init__(self) -> None:
        script = Path(__file__).with_name("racer.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def start(self, verb: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"verb": verb, **arguments}) + "\n")

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the racer died: its traceback is above"
        return json.loads(line)

    def kill(self) -> None:
        """As `kill -9` does: no handler runs, nothing is tidied up."""
        self.process.kill()
        self.close()

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait()


@contextmanager
def running_racer() -> Iterator[Racer]:
    racer = Racer()
    try:
        yield racer
    finally:
        if racer.process.poll() is None:
            racer.kill()


@pytest.fixture(scope="module")
def racers() -> Iterator[list[Racer]]:
    started = [Racer() for _ in range(NUM_RACERS)]
    yield started
    for racer in started:
        racer.close()


def race(racers: list[Racer], verb: str, each: list[dict[str, Any]]) -> list[Any]:
    """All at once, one request a racer; the answers in order."""
    for racer, arguments in zip(racers, each, strict=True):
        racer.start(verb, **arguments)
    return [racer.answer() for racer in racers]


@pytest.fixture
def url(catalog_url: str) -> str:
    catalog = Catalog(catalog_url)
    catalog.put_base("starter", "base-1", {}, "/bases/starter")
    catalog.close()
    return catalog_url


def test_no_job_is_claimed_twice(url: str, racers: list[Racer]) -> None:
    assert any(race_for_jobs(url, racers) > 1 for _ in range(10)), "nobody raced"


def race_for_jobs(url: str, racers: list[Racer]) -> int:
    """How many racers got any of 60 new jobs; on a busy machine one may take them all."""
    catalog = Catalog(url)
    created = {catalog.create_job("train", f"job {i}", {}).id for i in range(60)}
    claims = race(racers, "claim_all", [{"url": url, "worker": f"w{i}"} for i in range(NUM_RACERS)])
    claimed = [job for jobs in claims for job in jobs]
    assert len(claimed) == len(created)
    assert set(claimed) == created
    owners = {job.id: job.worker for job in catalog.list_jobs("running") if job.id in created}
    assert owners == {job: f"w{i}" for i, jobs in enumerate(claims) for job in jobs}
    return sum(1 for jobs in claims if jobs)


def test_versions_get_distinct_numbers(url: str, racers: list[Racer]) -> None:
    """Of an adapter that is new to all of them."""
    each = [{"url": url, "digests": [f"racer {i} bundle {j}" for j in range(10)]} for i in range(NUM_RACERS)]
    numbers = [number for answers in race(racers, "register", each) for number in answers]
    assert sorted(numbers) == list(range(1, 10 * NUM_RACERS + 1))
    catalog = Catalog(url)
    assert len(catalog.get_adapter("emoji").versions) == 10 * NUM_RACERS


def test_one_bundle_is_one_version(url: str, racers: list[Racer]) -> None:
    """A worker that lost its lease and its successor may both publish the same bundle."""
    each = [{"url": url, "digests": [f"bundle {j}" for j in range(10)]} for _ in range(NUM_RACERS)]
    answers = race(racers, "register", each)
    assert all(answer == answers[0] for answer in answers)
    assert sorted(answers[0]) == list(range(1, 11))


def test_threads_share_a_catalog(url: str) -> None:
    catalog = Catalog(url)

    def register(digest: str) -> int:
        version = catalog.register_version(
            "emoji", digest, base="starter", components={}, modalities=(), lineage={}, metrics={}
        )
        assert catalog.resolve(version.ref) == version
        return version.version

    with ThreadPoolExecutor(8) as pool:
        numbers = pool.map(register, [f"bundle {i}" for i in range(40)])
    assert sorted(numbers) == list(range(1, 41))


def test_alias_moves_are_one_history(url: str, racers: list[Racer]) -> None:
    """Each move starts where another ended: no two of them started from the same state."""
    catalog = Catalog(url)
    for number in range(1, 2 * NUM_RACERS + 1):
        catalog.register_version(
            "emoji", f"v{number}", base="starter", components={}, modalities=(), lineage={}, metrics={}
        )
        catalog.set_version_state("emoji", number, "ready")
    catalog.promote("emoji", 1)
    movers, reader = racers[:-1], racers[-1]
    reader.start("resolve", url=url, times=100)
    # Each mover goes back and forth between two versions of its own, so every call is a move.
    each = [{"url": url, "versions": [2 * i + 2, 2 * i + 3] * 10} for i in range(len(movers))]
    moves = [tuple(move) for answers in race(movers, "promote", each) for move in answers]
    last = catalog.resolve("emoji").version
    left, reached = Counter(move[0] for move in moves), Counter(move[1] for move in moves)
    reached[1] += 1  # where it all began
    reached[last] -= 1  # nobody has left it yet
    assert +left == +reached
    assert set(reader.answer()) <= {1, *range(2, 2 * NUM_RACERS)}


def test_a_killed_workers_job_goes_to_the_next(url: str) -> None:
    catalog = Catalog(url)
    job = catalog.create_job("train", "emoji", {"rank": 16})
    with running_racer() as racer:
        racer.start("claim", url=url, worker="first")
        assert racer.answer() == job.id
        racer.kill()
    assert catalog.claim_job("second", 60) is None, "its lease still runs"
    later = Catalog(url, clock=lambda: utc_now() + timedelta(seconds=61))
    taken = later.claim_job("second", 60)
    assert taken is not None
    assert (taken.id, taken.worker, taken.attempts, taken.spec) == (job.id, "second", 2, {"rank": 16})
    with pytest.raises(ConflictError, match="taken over by second"):
        catalog.heartbeat(job.id, "first", 60)


def test_a_writer_killed_midway_leaves_nothing(url: str) -> None:
    """Neither its half-done work nor its lock."""
    with running_racer() as racer:
        racer.start("hold", url=url)
        assert racer.answer() == "held"
        racer.kill()
    catalog = Catalog(url)
    assert catalog.get_base("starter").location == "/bases/starter"
    catalog.put_base("starter", "base-2", {}, "/moved")
    assert catalog.get_base("starter").location == "/moved"


def test_readers_do_not_wait_for_a_writer(url: str) -> None:
    with running_racer() as racer:
        racer.start("hold", url=url)
        assert racer.answer() == "held"
        assert Catalog(url).get_base("starter").location == "/bases/starter"


def test_a_new_file_may_be_opened_by_many_at_once(tmp_path: Path, racers: list[Racer]) -> None:
    url = f"sqlite:///{tmp_path}/new/catalog.db"
    assert race(racers, "open_catalog", [{"url": url}] * NUM_RACERS) == [[]] * NUM_RACERS
    migrate.check(url)


def test_connections_meet_at_a_new_file(tmp_path: Path, racers: list[Racer]) -> None:
    """SQLite answers "locked" at once, one time in 30 or so, when two of them turn a file to WAL together."""
    request = {"folder": str(tmp_path), "start": time.time() + 0.1, "times": 100}
    assert race(racers, "connect_at", [request] * NUM_RACERS) == [["wal"] * 100] * NUM_RACERS


def test_a_shared_database_may_be_upgraded_by_many_at_once(postgres_url: str, racers: list[Racer]) -> None:
    race(racers, "upgrade", [{"url": postgres_url}] * NUM_RACERS)
    migrate.check(postgres_url)
