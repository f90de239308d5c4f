"""A process that works on a catalog as it is told: a JSON line in, a JSON line out. Run by its path."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from okavango.platform.catalog import migrate
from okavango.platform.catalog.database import make_engine, parse_url
from okavango.platform.catalog.store import Catalog


def claim_all(url: str, worker: str) -> list[str]:
    """Claim jobs until none is left."""
    catalog = Catalog(url)
    claimed = []
    while (job := catalog.claim_job(worker, 60)) is not None:
        claimed.append(job.id)
    return claimed


def register(url: str, digests: list[str]) -> list[int]:
    catalog = Catalog(url)
    return [
        catalog.register_version(
            "emoji", digest, base="starter", components={}, modalities=(), lineage={}, metrics={}
        ).version
        for digest in digests
    ]


def promote(url: str, versions: list[int]) -> list[tuple[int | None, int]]:
    """Move `prod` through versions in turn; what each move went from and to."""
    catalog = Catalog(url)
    moves = [catalog.promote("emoji", version) for version in versions]
    return [(move.previous, move.version) for move in moves]


def resolve(url: str, times: int) -> list[int]:
    catalog = Catalog(url)
    return [catalog.resolve("emoji").version for _ in range(times)]


def upgrade(url: str) -> list[str]:
    migrate.upgrade(url)
    return [migrate.head()]


def open_catalog(url: str) -> list[str]:
    return [base.name for base in Catalog(url).list_bases()]


def connect_at(folder: str, start: float, times: int) -> list[str]:
    """Connect to new files at moments that other racers have agreed upon, too."""
    modes = []
    for i in range(times):
        engine = make_engine(parse_url(f"sqlite:///{folder}/{i}.db"))
        while time.time() < start + i * 0.02:
            pass
        with engine.connect() as connection:
            modes.append(str(connection.exec_driver_sql("PRAGMA journal_mode").scalar()))
        engine.dispose()
    return modes


def claim(url: str, worker: str) -> str | None:
    """Claim one job, and live on with it."""
    job = Catalog(url).claim_job(worker, 60)
    return None if job is None else job.id


def hold(url: str) -> str:
    """Write without an end: the answer comes from inside the transaction."""
    catalog = Catalog(url)
    held = catalog._writing()
    session = held.__enter__()
    session.connection().exec_driver_sql("UPDATE bases SET location = 'half-done'")
    kept.append(held)
    return "held"


kept: list[Any] = []
VERBS = {
    verb.__name__: verb
    for verb in (claim_all, connect_at, register, promote, resolve, upgrade, open_catalog, claim, hold)
}

for line in sys.stdin:
    request = json.loads(line)
    print(json.dumps(VERBS[request.pop("verb")](**request)), flush=True)
