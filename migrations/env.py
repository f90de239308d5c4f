"""Alembic's entry. The connection comes from okavango.platform.catalog.migrate, which also holds the lock
and the transaction. Called by the `alembic` command itself (to write a new revision), it connects as the
settings say.
"""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from sqlalchemy import Connection

from okavango.platform.catalog.database import make_engine, parse_url, writer_of
from okavango.platform.catalog.migrate import COMPARE
from okavango.platform.catalog.schema import Row, UtcDateTime
from okavango.platform.config import load_settings


def render_item(kind: str, item: Any, _: Any) -> str | Literal[False]:
    """A new revision spells our own type out: what it does must not change when the schema's code does."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    return False


def migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Row.metadata,
        render_item=render_item,
        render_as_batch=True,  # SQLite cannot alter most of a table in place, so Alembic copies it
        **COMPARE,
    )
    with context.begin_transaction():
        context.run_migrations()


def main() -> None:
    connection = context.config.attributes.get("connection")
    if connection is not None:
        migrate(connection)
        return
    engine = writer_of(make_engine(parse_url(load_settings().database), migrating=True))
    with engine.begin() as own:
        migrate(own)


main()
