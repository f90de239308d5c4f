"""Databases for the tests that need one: files of SQLite, and a throw-away PostgreSQL that is real."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from okavango.platform.catalog import migrate
from okavango.platform.catalog.store import Catalog


@dataclass
class Postgres:
    """A server of this session, reached through a socket in `folder` only."""

    folder: Path

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@/{database}?host={self.folder}"

    def run(self, statement: str) -> None:
        with psycopg.connect(
            host=str(self.folder), user="postgres", dbname="postgres", autocommit=True
        ) as raw:
            raw.execute(statement)  # type: ignore[call-overload]  # the names are ours

    def create(self, template: str = "template1") -> str:
        """The name of a new database, a copy of another."""
        name = f"t_{uuid.uuid4().hex}"
        self.run(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name


def find_postgres() -> Path:
    """The folder of initdb and pg_ctl. Debian keeps them off the PATH."""
    on_path = shutil.which("initdb")
    if on_path is not None:
        return Path(on_path).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    if not versions:
        pytest.fail("PostgreSQL is not installed: apt-get install postgresql", pytrace=False)
    return versions[-1].parent


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A cluster in a temporary folder. A short one: the path of a socket has at most 107 characters."""
    programs = find_postgres()
    folder = Path(tempfile.mkdtemp(prefix="okv-"))
    # PostgreSQL refuses to run as root; Debian's package brings a user for it.
    user = "postgres" if os.geteuid() == 0 else os.geteuid()
    shutil.chown(folder, user)

    def call(program: str, *arguments: str) -> None:
        command = [str(programs / program), *arguments]
        # Into a file: a pipe would stay open in the server, and be waited for.
        with (folder / "output").open("a+") as output:
            done = subprocess.run(command, cwd=folder, user=user, stdout=output, stderr=output)
            output.seek(0)
            assert done.returncode == 0, output.read()

    data = str(folder / "data")
    # Nothing here outlives the session, so nothing waits for the disk; nor does it listen on TCP.
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c max_connections=50"
    try:
        call(
            "initdb", "--pgdata", data, "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync"
        )
        call("pg_ctl", "--pgdata", data, "--wait", "--options", options, "start")
        yield Postgres(folder)
        call("pg_ctl", "--pgdata", data, "--wait", "--mode=immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def postgres_url(postgres: Postgres) -> Iterator[str]:
    """A database without tables."""
    name = postgres.create()
    yield postgres.url(name)
    postgres.run(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgres_template(postgres: Postgres) -> str:
    """A database at the newest revision, to be copied: much faster than to migrate one for every test."""
    name = postgres.create()
    migrate.upgrade(postgres.url(name))
    return name


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without tables, on each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/empty.db"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def catalog_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database that a catalog can open, on each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/catalog.db"
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    name = postgres.create(request.getfixturevalue("postgres_template"))
    yield postgres.url(name)
    postgres.run(f"DROP DATABASE {name} WITH (FORCE)")


@dataclass
class Clock:
    """Time that passes when the test says so."""

    now: datetime = field(default=datetime(2026, 1, 1, tzinfo=UTC))

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def catalog(catalog_url: str, clock: Callable[[], datetime]) -> Iterator[Catalog]:
    """An empty catalog on each kind of database, by the test's clock."""
    opened = Catalog(catalog_url, clock)
    yield opened
    opened.close()
