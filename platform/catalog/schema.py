"""The catalog's tables. migrations/ repeats them step by step, and tests/guards/test_migrations.py compares.

    bases ──< adapters ──< adapter_versions >── jobs ──< job_events
                      └──< aliases
    datasets    files

Rows never leave the catalog: records.py holds what does. Names are keys, for they never change; what they
stand for is written beside them as a digest.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    MetaData,
    UniqueConstraint,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator

from okavango.platform.catalog.states import JOB_STATES, VERSION_STATES

# Every constraint has a name: one without cannot be dropped by a later migration on every database.
NAMING = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
}

NullableJson = JSON(none_as_null=True)


class UtcDateTime(TypeDecorator[datetime]):
    """Aware datetimes in UTC on every database. SQLite keeps no zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        assert value.tzinfo is not None, "the catalog takes aware datetimes"
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def one_of(column: str, values: Iterable[str]) -> CheckConstraint:
    """A string enum: a later migration can widen a check constraint; a database's own enum, hardly."""
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


class Row(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it as a class attribute
        datetime: UtcDateTime,
        dict[str, Any]: JSON,
        dict[str, str]: JSON,
        list[str]: JSON,
    }


class BaseRow(Row):
    __tablename__ = "bases"

    name: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str]
    components: Mapped[dict[str, str]]
    location: Mapped[str]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class DatasetRow(Row):
    __tablename__ = "datasets"
    __table_args__ = (CheckConstraint("rows >= 0", name="rows"),)

    digest: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    location: Mapped[str]
    rows: Mapped[int]
    created_at: Mapped[datetime]


class AdapterRow(Row):
    __tablename__ = "adapters"

    name: Mapped[str] = mapped_column(primary_key=True)
    base: Mapped[str] = mapped_column(ForeignKey("bases.name"))
    created_at: Mapped[datetime]

    versions: Mapped[list[VersionRow]] = relationship(order_by="VersionRow.number", viewonly=True)
    aliases: Mapped[list[AliasRow]] = relationship(order_by="AliasRow.name", viewonly=True)


class VersionRow(Row):
    __tablename__ = "adapter_versions"
    __table_args__ = (
        UniqueConstraint("adapter", "digest"),
        CheckConstraint("number >= 1", name="number"),
        one_of("state", VERSION_STATES),
    )

    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[str]
    # What was true at registration; the base's name may stand for another digest later.
    base: Mapped[str]
    base_digest: Mapped[str]
    components: Mapped[dict[str, str]]
    modalities: Mapped[list[str]]
    lineage: Mapped[dict[str, Any]]
    metrics: Mapped[dict[str, Any]]
    state: Mapped[str]
    verification: Mapped[dict[str, Any] | None] = mapped_column(NullableJson)
    error: Mapped[str | None]
    principal: Mapped[str]
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class AliasRow(Row):
    __tablename__ = "aliases"
    __table_args__ = (
        # An alias names a version that exists, whoever writes it.
        ForeignKeyConstraint(["adapter", "version"], ["adapter_versions.adapter", "adapter_versions.number"]),
    )

    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int]
    previous: Mapped[int | None]
    updated_at: Mapped[datetime]


class JobRow(Row):
    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "state", "priority", "created_at"),  # the queue is read in this order
        CheckConstraint("attempts >= 0", name="attempts"),
        one_of("state", JOB_STATES),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    spec: Mapped[dict[str, Any]]
    labels: Mapped[dict[str, str] | None] = mapped_column(NullableJson)
    state: Mapped[str]
    principal: Mapped[str]
    worker: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    attempts: Mapped[int] = mapped_column(default=0)
    losses: Mapped[int] = mapped_column(default=0)
    priority: Mapped[int] = mapped_column(default=0)
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    pause_requested: Mapped[bool] = mapped_column(default=False)
    progress: Mapped[dict[str, Any] | None] = mapped_column(NullableJson)
    result: Mapped[dict[str, Any] | None] = mapped_column(NullableJson)
    error: Mapped[str | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class JobEventRow(Row):
    """Numbered from 1 in each job, without gaps."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str]
    level: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None] = mapped_column(NullableJson)
    created_at: Mapped[datetime]


class FileRow(Row):
    """An uploaded file. Its bytes lie in the artifact store, under its id."""

    __tablename__ = "files"
    __table_args__ = (Index(None, "principal", "created_at"), CheckConstraint("bytes >= 0", name="bytes"))

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str]
    principal: Mapped[str]
    created_at: Mapped[datetime]
