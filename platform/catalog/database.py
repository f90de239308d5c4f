"""Connections to the catalog's database: SQLite by default, PostgreSQL by URL."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DataError, IntegrityError, ProgrammingError
from sqlalchemy.pool import NullPool

from okavango.platform.errors import BusyError, ConfigError, NotReadyError

BUSY_SECONDS = 30.0
"""How long a writer waits for another before it gives up."""


def parse_url(url: str) -> URL:
    """A database URL that the catalog can use.

    Raises:
        ConfigError: not a URL, another database or driver, or SQLite without a file.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        # The URL is not repeated: it may hold a password.
        raise ConfigError(
            "is no database URL",
            where="OKAVANGO_DATABASE_URL",
            remedy="write sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE",
        ) from error
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise ConfigError(
            f"the catalog does not run on {parsed.drivername}",
            where=shown(parsed),
            remedy="use sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE",
        )
    if is_sqlite(parsed) and parsed.database in (None, "", ":memory:"):
        raise ConfigError(
            "a catalog in memory would be lost at exit", where=shown(parsed), remedy="name a file"
        )
    return parsed


def is_sqlite(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def shown(url: URL) -> str:
    """The URL for messages, without its password."""
    return url.render_as_string(hide_password=True)


def make_engine(url: URL, *, migrating: bool = False) -> Engine:
    """An engine whose transactions are real ones on SQLite, too.

    Args:
        migrating: leave SQLite's foreign keys off, for a migration may copy a table and drop the old one; and
            keep no connection afterwards.

    Raises:
        ConfigError: PostgreSQL's driver is not installed, or SQLite's folder cannot be made.
    """
    if not is_sqlite(url):
        return _postgres_engine(url, migrating)
    _make_parent(url)
    engine = create_engine(
        url, connect_args={"timeout": BUSY_SECONDS}, **({"poolclass": NullPool} if migrating else {})
    )
    event.listen(engine, "connect", lambda raw, _: _prepare_sqlite(raw, foreign_keys=not migrating))
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def reader_of(engine: Engine) -> Engine:
    """The same connections; each transaction sees one state of the database."""
    if is_sqlite(engine.url):
        return engine  # any transaction of SQLite does, in WAL mode
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def writer_of(engine: Engine) -> Engine:
    """The same connections; transactions that may write.

    On SQLite they take the write lock at once: a reader that turns into a writer midway cannot wait for
    another writer, and fails instead.
    """
    return engine.execution_options(writes=True)


@contextmanager
def database_errors(url: URL) -> Iterator[None]:
    """Turns a database that does not answer into our own errors.

    Raises:
        BusyError: another writer held the lock for too long.
        NotReadyError: the database cannot be reached or used.
    """
    try:
        yield
    except (IntegrityError, ProgrammingError, DataError):
        raise  # our own fault, not the database's
    except (DatabaseError, sqlite3.DatabaseError) as error:
        cause = error.orig if isinstance(error, DatabaseError) else error
        reason = str(cause).strip().splitlines()[0]
        if isinstance(cause, sqlite3.OperationalError) and "locked" in reason:
            raise BusyError("the catalog is locked by another writer", retry_after=1.0) from error
        raise NotReadyError(
            f"the catalog's database cannot be used: {reason}",
            where=shown(url),
            remedy="check that it runs, and OKAVANGO_DATABASE_URL",
        ) from error


def _postgres_engine(url: URL, migrating: bool) -> Engine:
    try:
        return create_engine(url, **({"poolclass": NullPool} if migrating else {"pool_pre_ping": True}))
    except ModuleNotFoundError as error:
        raise ConfigError(
            "PostgreSQL's driver is not installed",
            where=shown(url),
            remedy="pip install 'okavango[postgres]'",
        ) from error


def _make_parent(url: URL) -> None:
    folder = Path(str(url.database)).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the catalog's folder cannot be made: {error.strerror}",
            where=str(folder),
            remedy="set OKAVANGO_HOME to a folder that can be written",
        ) from error


def _prepare_sqlite(raw: Any, *, foreign_keys: bool) -> None:
    # The driver's own implicit BEGIN comes too late and too weak; _begin_sqlite says it.
    raw.isolation_level = None
    raw.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
    _use_wal(raw)


def _use_wal(raw: Any) -> None:
    """Readers beside a writer. The file remembers it; only its first openers may meet each other here."""
    deadline = time.monotonic() + BUSY_SECONDS
    while raw.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            raw.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            # SQLite does not wait for this lock by itself.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
