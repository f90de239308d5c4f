"""What every part of the catalog stands on: a database at the right revision, a clock, transactions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import URL, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from okavango.platform.catalog import migrate
from okavango.platform.catalog.database import (
    database_errors,
    is_sqlite,
    make_engine,
    parse_url,
    reader_of,
    writer_of,
)
from okavango.platform.catalog.schema import Row
from okavango.platform.errors import InputError

Clock = Callable[[], datetime]
AnyRow = TypeVar("AnyRow", bound=Row)


def utc_now() -> datetime:
    return datetime.now(UTC)


class Transactions:
    """Opens a database and hands out sessions.

    SQLite: the folder is made and the file brought to the newest revision. PostgreSQL is shared, so it is
    upgraded only when someone says so.

    Args:
        clock: aware UTC time; leases are measured by it, so workers of one queue need clocks that agree to
            within a fraction of a lease.

    Raises:
        ConfigError: a URL that the catalog cannot use, or its driver is missing.
        ConflictError: the database stands at another revision than this okavango.
        NotReadyError: the database does not answer.
    """

    def __init__(self, url: str, clock: Clock = utc_now) -> None:
        self._url: URL = parse_url(url)
        self._clock = clock
        self._engine = make_engine(self._url)
        self._reader, self._writer = reader_of(self._engine), writer_of(self._engine)
        self._reach_head()

    def close(self) -> None:
        """Give the connections back. The catalog opens new ones if it is used again."""
        self._engine.dispose()

    def _now(self) -> datetime:
        return self._clock().astimezone(UTC)

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        """One view of the database: what others write meanwhile does not show."""
        with database_errors(self._url), Session(self._reader) as session:
            yield session

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        """One transaction: all of it or nothing. On SQLite it is the only writer meanwhile."""
        with database_errors(self._url), Session(self._writer) as session, session.begin():
            yield session

    def _ensure(self, session: Session, row: AnyRow) -> AnyRow:
        """The stored row of that primary key, locked; `row` itself where there was none.

        Two writers that bring the same new key meet in the database, and both get the row of the first.
        """
        table = type(row).__table__
        insert = sqlite.insert if is_sqlite(self._url) else postgresql.insert
        values = {name: getattr(row, name) for name in table.columns.keys()}  # noqa: SIM118 - not a dict
        session.execute(insert(type(row)).values(values).on_conflict_do_nothing())
        keys = [column == values[column.name] for column in table.primary_key]
        return session.scalars(select(type(row)).where(*keys).with_for_update()).one()

    def _lock(self, session: Session, what: str) -> None:
        """Keep other transactions that say the same from going on until this one ends. On SQLite there is
        one writer anyway."""
        if not is_sqlite(self._url):
            session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(what, 0))))

    def _reach_head(self) -> None:
        with database_errors(self._url), self._engine.connect() as connection:
            if not is_sqlite(self._url):
                migrate.require_head(connection)
                return
            is_behind = migrate.current(connection) != migrate.head()
        if is_behind:
            migrate.upgrade(self._url.render_as_string(hide_password=False))


def lookup(session: Session, kind: type[AnyRow], key: Any, *, lock: bool = False) -> AnyRow | None:
    """The row of a primary key. None, too, for text that no database can hold: keys come from requests."""
    texts = [part for part in (key if isinstance(key, tuple) else (key,)) if isinstance(part, str)]
    if any(not _is_storable(text) for text in texts):
        return None
    return session.get(kind, key, with_for_update=lock)


def _is_storable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def as_json(value: Mapping[str, Any], field: str) -> dict[str, Any]:
    """A copy that every database can keep.

    Raises:
        InputError: it holds something that is not JSON, NaN and infinity among them.
    """
    try:
        copy: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
        return copy
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot be kept as JSON: {error}", where=field) from error
