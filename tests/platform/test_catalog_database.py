from __future__ import annotations

import sqlite3
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from okavango.platform.catalog import database
from okavango.platform.catalog.database import database_errors, make_engine, parse_url, shown
from okavango.platform.catalog.schema import BaseRow
from okavango.platform.catalog.store import Catalog, open_catalog
from okavango.platform.config import Settings
from okavango.platform.errors import BusyError, ConfigError, ConflictError, InputError, NotReadyError

SECRET = "postgresql+psycopg://ana:s3cret@db.example/okavango"


def test_settings_name_the_catalog(tmp_path: Path) -> None:
    """The folder need not be there, and what was written is there the next time."""
    settings = Settings(home=tmp_path / "new" / "home")
    open_catalog(settings).put_base("starter", "b1", {}, "/here")
    assert (tmp_path / "new" / "home" / "catalog.db").is_file()
    assert open_catalog(settings).get_base("starter").digest == "b1"


@pytest.mark.parametrize(
    "url", ["postgresql://ana@db/x", "postgres://ana@db/x", "postgresql+psycopg://ana@db/x"]
)
def test_postgresql_has_one_driver(url: str) -> None:
    assert parse_url(url).drivername == "postgresql+psycopg"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "catalog.db",
        "mysql://ana@db/x",
        "postgresql+psycopg2://ana@db/x",
        "sqlite://",
        "sqlite:///:memory:",
    ],
)
def test_urls_that_are_no_catalog(url: str) -> None:
    with pytest.raises(ConfigError):
        Catalog(url)


def test_no_message_holds_a_password() -> None:
    assert "s3cret" not in shown(parse_url(SECRET))
    with pytest.raises(ConfigError) as caught:
        Catalog(SECRET.replace("psycopg", "psycopg2"))
    assert "s3cret" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        Catalog("postgres s3cret")
    assert "s3cret" not in str(caught.value)


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"okavango\[postgres\]"):
        Catalog(SECRET)


def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    with pytest.raises(NotReadyError, match="OKAVANGO_DATABASE_URL"):
        Catalog(f"postgresql+psycopg://postgres@/okavango?host={tmp_path}")


def test_postgresql_is_not_upgraded_in_silence(postgres_url: str) -> None:
    with pytest.raises(ConflictError, match="okavango db upgrade"):
        Catalog(postgres_url)
    with make_engine(parse_url(postgres_url)).connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")) == 0


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    path.write_bytes(b"something else entirely" * 100)
    with pytest.raises(NotReadyError, match="not a database"):
        Catalog(f"sqlite:///{path}")
    assert path.read_bytes().startswith(b"something else")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="OKAVANGO_HOME"):
        Catalog(f"sqlite:///{tmp_path}/file/catalog.db")


def test_a_file_of_a_newer_okavango(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/catalog.db"
    Catalog(url).close()
    with sqlite3.connect(tmp_path / "catalog.db") as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ConflictError, match="newer okavango"):
        Catalog(url)


def test_how_sqlite_is_set_up(tmp_path: Path) -> None:
    with make_engine(parse_url(f"sqlite:///{tmp_path}/catalog.db")).connect() as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(text("PRAGMA foreign_keys")) == 1
        assert connection.scalar(text("PRAGMA busy_timeout")) == database.BUSY_SECONDS * 1000


def test_a_writer_that_waits_too_long_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    catalog = Catalog(f"sqlite:///{tmp_path}/catalog.db")
    raw = sqlite3.connect(tmp_path / "catalog.db", isolation_level=None)
    raw.execute("BEGIN IMMEDIATE")
    with pytest.raises(BusyError) as caught:
        catalog.put_base("starter", "b1", {}, "/here")
    assert caught.value.retry_after > 0
    raw.execute("ROLLBACK")
    assert catalog.put_base("starter", "b1", {}, "/here").digest == "b1"
    raw.close()


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO adapters (name, base, created_at) VALUES ('a', 'no such base', CURRENT_TIMESTAMP)",
        "UPDATE datasets SET rows = -1",
        "UPDATE adapter_versions SET state = 'splendid'",
        "UPDATE adapter_versions SET number = 0",
        "UPDATE jobs SET state = 'splendid'",
        "UPDATE jobs SET attempts = -1",
        "UPDATE aliases SET version = 7",
        "UPDATE adapter_versions SET digest = 'v1'",
    ],
)
def test_the_database_itself_refuses_nonsense(catalog: Catalog, register: Any, statement: str) -> None:
    register("emoji", "v1", state="ready")
    register("emoji", "v2")
    catalog.promote("emoji", 1)
    catalog.create_job("train", "emoji", {})
    catalog.put_dataset("train.jsonl", "d", "/here", 1)
    with pytest.raises(IntegrityError), catalog._writing() as session:
        session.execute(text(statement))


def test_a_failed_write_leaves_nothing(catalog: Catalog) -> None:
    class StopError(Exception):
        pass

    def write_and_stop() -> None:
        with catalog._writing() as session:
            now = datetime.now(UTC)
            session.add(
                BaseRow(name="b", digest="d", components={}, location="", created_at=now, updated_at=now)
            )
            session.flush()
            raise StopError

    with pytest.raises(StopError):
        write_and_stop()
    assert catalog.list_bases() == ()


def test_a_reader_sees_one_state(catalog: Catalog) -> None:
    """What is written meanwhile does not show in a reading that has begun."""
    with catalog._reading() as session:
        names = select(BaseRow.name)
        assert session.scalars(names).all() == []
        catalog.put_base("starter", "b1", {}, "/here")
        assert session.scalars(names).all() == []
    assert [base.name for base in catalog.list_bases()] == ["starter"]


def test_times_come_back_in_utc(catalog_url: str) -> None:
    """Whatever zone the clock has."""
    moment = datetime(2026, 7, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    catalog = Catalog(catalog_url, clock=lambda: moment)
    catalog.put_base("starter", "b1", {}, "/here")
    base = catalog.put_base("starter", "b2", {}, "/here")
    stored = Catalog(catalog_url).get_base("starter")
    assert base == stored
    assert stored.created_at == moment
    assert {base.created_at.tzinfo, base.updated_at.tzinfo, stored.created_at.tzinfo} == {UTC}


def test_a_closed_catalog_opens_again(catalog: Catalog) -> None:
    catalog.put_base("starter", "b1", {}, "/here")
    catalog.close()
    assert catalog.get_base("starter").digest == "b1"


def test_our_own_faults_are_not_the_databases(tmp_path: Path) -> None:
    url = parse_url(f"sqlite:///{tmp_path}/catalog.db")
    with pytest.raises(ValueError, match="ours") as caught, database_errors(url):
        raise ValueError("ours")
    assert not isinstance(caught.value, InputError)
