"""Alembic, run from code: no ini file, and the scripts are found inside the installed package."""

from __future__ import annotations

import io
from importlib.resources import files
from typing import Any

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import ResolutionError
from alembic.util import CommandError
from sqlalchemy import Connection, text

from okavango.platform.catalog.database import (
    database_errors,
    is_sqlite,
    make_engine,
    parse_url,
    shown,
    writer_of,
)
from okavango.platform.catalog.schema import Row
from okavango.platform.errors import ConflictError, IntegrityError

# Two hosts that upgrade one PostgreSQL at the same time: the second waits and finds nothing to do.
_UPGRADE_LOCK = 0x0CA7A106


def head() -> str:
    """The newest revision that this installation knows."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None, "migrations/versions is empty"
    return revision


def current(connection: Connection) -> str | None:
    """The revision that a database stands at; None for one that has no catalog yet."""
    return MigrationContext.configure(connection).get_current_revision()


def upgrade(url: str, revision: str = "head") -> None:
    """Bring a database to a revision, in one transaction.

    Raises:
        ConflictError: the database was made by a newer okavango.
        IntegrityError: a migration left references that lead nowhere; nothing was changed.
    """
    _run(url, command.upgrade, revision)


def downgrade(url: str, revision: str) -> None:
    """As upgrade, the other way."""
    _run(url, command.downgrade, revision)


def check(url: str) -> None:
    """Look, and change nothing.

    Raises:
        ConflictError: the database is not at the newest revision.
        IntegrityError: its tables are not those of the schema.
    """
    parsed = parse_url(url)
    with database_errors(parsed), make_engine(parsed, migrating=True).connect() as connection:
        require_head(connection)
        context = MigrationContext.configure(connection, opts=COMPARE)
        found = [str(change) for change in compare_metadata(context, Row.metadata)]
    if found:
        raise IntegrityError(f"the tables differ from the schema: {'; '.join(found)}", where=shown(parsed))


def require_head(connection: Connection) -> None:
    """Raises ConflictError unless the database is at the newest revision."""
    found = current(connection)
    if found != head():
        raise ConflictError(
            f"the catalog is at revision {found or 'none'}, this okavango needs {head()}",
            where=shown(connection.engine.url),
            remedy="run `okavango db upgrade`",
        )


COMPARE: dict[str, Any] = {"compare_type": True, "compare_server_default": True}
"""How Alembic compares tables with the schema, here and in migrations/env.py."""


def _run(url: str, step: Any, revision: str) -> None:
    parsed = parse_url(url)
    engine = writer_of(make_engine(parsed, migrating=True))
    with database_errors(parsed), engine.begin() as connection:
        if not is_sqlite(parsed):
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK})
        config = _config()
        config.attributes["connection"] = connection
        try:
            step(config, revision)
        except CommandError as error:
            raise _unknown_revision(error) from error
        _check_references(connection)


def _config() -> Config:
    config = Config(stdout=io.StringIO())
    config.set_main_option("script_location", str(files("okavango.migrations")).replace("%", "%%"))
    return config


def _unknown_revision(error: CommandError) -> Exception:
    if isinstance(error.__cause__, ResolutionError):
        return ConflictError(
            "the catalog was made by a newer okavango", remedy="upgrade okavango, or use another catalog"
        )
    return error


def _check_references(connection: Connection) -> None:
    """Foreign keys are off while SQLite migrates; what they would have caught is caught here."""
    if connection.dialect.name != "sqlite":
        return
    broken = connection.execute(text("PRAGMA foreign_key_check")).fetchall()
    if broken:
        raise IntegrityError(f"{len(broken)} references lead nowhere after the migration", where=broken[0][0])
