"""Bases and datasets: what adapters are made over, and from."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import select
from sqlalchemy.orm import Session

from okavango.platform.catalog.names import check_name, near
from okavango.platform.catalog.records import BaseRecord, DatasetRecord
from okavango.platform.catalog.schema import AdapterRow, BaseRow, DatasetRow
from okavango.platform.catalog.transactions import Transactions, as_json, lookup
from okavango.platform.errors import ConflictError, InputError, NotFoundError


class Assets(Transactions):
    """Said again, what is known already changes nothing: callers need not ask first."""

    """What the catalog knows of bases and datasets."""

    def put_base(self, name: str, digest: str, components: Mapping[str, str], location: str) -> BaseRecord:
        """Record a base. Said twice it changes nothing; with another digest the name moves to that.

        Versions keep the digest that they were registered with, so none of them changes its meaning.

        Raises:
            InputError: the name breaks the rule.
            ConflictError: an adapter has that name.
        """
        check_name(name, "base")
        kept = as_json(components, "components")
        with self._writing() as session:
            if lookup(session, AdapterRow, name) is not None:
                raise ConflictError(
                    "an adapter has that name", where=f"base {name!r}", remedy="choose another"
                )
            now = self._now()
            fresh = BaseRow(
                name=name, digest=digest, components=kept, location=location, created_at=now, updated_at=now
            )
            row = self._ensure(session, fresh)
            if (row.digest, row.components, row.location) != (digest, kept, location):
                row.digest, row.components, row.location, row.updated_at = digest, kept, location, now
            return _base(row)

    def get_base(self, name: str) -> BaseRecord:
        """Raises NotFoundError, with the nearest base named."""
        with self._reading() as session:
            return _base(find_base(session, name))

    def list_bases(self) -> tuple[BaseRecord, ...]:
        with self._reading() as session:
            return tuple(map(_base, session.scalars(select(BaseRow).order_by(BaseRow.name))))

    def put_dataset(self, name: str, digest: str, location: str, rows: int) -> DatasetRecord:
        """Record a dataset. Its digest is its identity: the same bytes elsewhere are the same dataset, moved.

        Raises:
            InputError: a negative number of rows.
        """
        if rows < 0:
            raise InputError(f"{rows} rows", where=f"dataset {name!r}")
        with self._writing() as session:
            fresh = DatasetRow(name=name, digest=digest, location=location, rows=rows, created_at=self._now())
            row = self._ensure(session, fresh)
            row.name, row.location, row.rows = name, location, rows
            return _dataset(row)

    def get_dataset(self, digest: str) -> DatasetRecord:
        """Raises NotFoundError."""
        with self._reading() as session:
            row = lookup(session, DatasetRow, digest)
            if row is None:
                raise NotFoundError("no such dataset", where=f"dataset {digest[:12]}")
            return _dataset(row)


def find_base(session: Session, name: str) -> BaseRow:
    row = lookup(session, BaseRow, name)
    if row is None:
        known = session.scalars(select(BaseRow.name))
        raise NotFoundError(
            "no such base",
            where=f"base {name!r}",
            remedy=near(name, known, "there is none yet: `okavango base build starter` makes one"),
        )
    return row


def _base(row: BaseRow) -> BaseRecord:
    return BaseRecord(
        name=row.name,
        digest=row.digest,
        components=dict(row.components),
        location=row.location,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def _dataset(row: DatasetRow) -> DatasetRecord:
    return DatasetRecord(
        name=row.name,
        digest=row.digest,
        location=row.location,
        rows=row.rows,
        created_at=row.created_at,
    )
