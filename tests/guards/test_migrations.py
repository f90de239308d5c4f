"""The migrations lead to the schema, and back, on both databases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text

from okavango.platform.catalog import migrate
from okavango.platform.catalog.database import make_engine, parse_url
from okavango.platform.catalog.schema import Row
from okavango.platform.catalog.store import Catalog
from okavango.platform.errors import ConflictError, IntegrityError


def engine_of(url: str) -> Engine:
    return make_engine(parse_url(url), migrating=True)


def described(connection: Connection) -> dict[str, Any]:
    """Every table with all that it consists of: Alembic's own comparison leaves out check constraints."""
    found = inspect(connection)

    def ordered(rows: Any) -> list[str]:
        return sorted(str(sorted(row.items(), key=lambda item: item[0])) for row in rows)

    return {
        table: {
            "columns": ordered(
                {
                    "name": c["name"],
                    "type": str(c["type"]),
                    "nullable": c["nullable"],
                    "default": c["default"],
                }
                for c in found.get_columns(table)
            ),
            "primary key": ordered([found.get_pk_constraint(table)]),
            "foreign keys": ordered(found.get_foreign_keys(table)),
            "unique": ordered(found.get_unique_constraints(table)),
            "checks": ordered(found.get_check_constraints(table)),
            "indexes": ordered(found.get_indexes(table)),
        }
        for table in found.get_table_names()
        if table != "alembic_version"
    }


def test_upgrade_leads_to_the_schema(empty_url: str) -> None:
    migrate.upgrade(empty_url)
    migrate.check(empty_url)
    engine = engine_of(empty_url)
    with engine.connect() as connection:
        migrated = described(connection)
    migrate.downgrade(empty_url, "base")
    with engine.begin() as connection:
        Row.metadata.create_all(connection)
        assert migrated == described(connection)


def test_downgrade_leaves_nothing(empty_url: str) -> None:
    migrate.upgrade(empty_url)
    migrate.downgrade(empty_url, "base")
    with engine_of(empty_url).connect() as connection:
        assert described(connection) == {}
        assert migrate.current(connection) is None
    migrate.upgrade(empty_url)
    migrate.check(empty_url)


def test_every_step_down_and_up_again(empty_url: str) -> None:
    migrate.upgrade(empty_url)
    for script in ScriptDirectory.from_config(migrate._config()).walk_revisions():
        below = str(script.down_revision or "base")
        migrate.downgrade(empty_url, below)
        migrate.upgrade(empty_url, script.revision)
        migrate.downgrade(empty_url, below)
    migrate.upgrade(empty_url)
    migrate.check(empty_url)


def test_there_is_one_head() -> None:
    assert len(ScriptDirectory.from_config(migrate._config()).get_heads()) == 1


def test_check_sees_a_difference(empty_url: str) -> None:
    migrate.upgrade(empty_url)
    with engine_of(empty_url).begin() as connection:
        connection.execute(text("ALTER TABLE jobs ADD COLUMN stray INTEGER"))
    with pytest.raises(IntegrityError, match="stray"):
        migrate.check(empty_url)


def test_check_names_the_way_out_of_an_old_database(empty_url: str) -> None:
    with pytest.raises(ConflictError, match="okavango db upgrade"):
        migrate.check(empty_url)


def test_a_database_of_a_newer_okavango_is_refused(empty_url: str) -> None:
    migrate.upgrade(empty_url)
    with engine_of(empty_url).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConflictError, match="newer okavango"):
        migrate.upgrade(empty_url)


def test_a_failed_step_leaves_the_database_as_it_was(empty_url: str) -> None:
    """The step is all one transaction, tables included."""
    with engine_of(empty_url).begin() as connection:
        connection.execute(text("CREATE TABLE aliases (name TEXT)"))  # the last table that 0001 makes
    with pytest.raises(Exception, match="already exists"):
        migrate.upgrade(empty_url)
    with engine_of(empty_url).connect() as connection:
        assert set(inspect(connection).get_table_names()) == {"aliases"}


def test_every_revision_imports_nothing_of_ours(root: Path) -> None:
    """The schema moves on; a step that used it would change with it."""
    for path in (root / "migrations/versions").glob("0*.py"):
        assert "okavango" not in path.read_text(), path.name


def test_what_is_there_survives_the_training_service(empty_url: str) -> None:
    """A job that a version points to, from before there were priorities."""
    migrate.upgrade(empty_url, "0001")
    now = "2026-01-01 00:00:00+00:00"
    with engine_of(empty_url).begin() as connection:
        for statement in (
            f"INSERT INTO bases VALUES ('b', 'd', '{{}}', '/b', '{now}', '{now}')",
            "INSERT INTO jobs (id, kind, name, spec, state, principal, attempts, cancel_requested, "
            "created_at, updated_at) VALUES "
            f"('j', 'train', 'a', '{{}}', 'queued', 'p', 1, false, '{now}', '{now}')",
            f"INSERT INTO adapters VALUES ('a', 'b', '{now}')",
            "INSERT INTO adapter_versions (adapter, number, digest, base, base_digest, components, "
            "modalities, lineage, metrics, state, principal, job_id, created_at, updated_at) VALUES "
            f"('a', 1, 'x', 'b', 'd', '{{}}', '[]', '{{}}', '{{}}', 'ready', 'p', 'j', '{now}', '{now}')",
        ):
            connection.execute(text(statement))
    migrate.upgrade(empty_url)
    catalog = Catalog(empty_url)
    (job,) = catalog.list_jobs()
    assert (job.id, job.priority, job.losses, job.labels, job.pause_requested) == ("j", 0, 0, {}, False)
    assert catalog.resolve("a@1").job_id == "j"
    catalog.close()
    migrate.downgrade(empty_url, "0001")
    with engine_of(empty_url).connect() as connection:
        assert connection.execute(text("SELECT id, state FROM jobs")).all() == [("j", "queued")]
