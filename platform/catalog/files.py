"""Uploaded files: who has brought what. Their bytes lie in the artifact store."""

from __future__ import annotations

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from okavango.platform.catalog.names import near
from okavango.platform.catalog.records import FileRecord
from okavango.platform.catalog.schema import FileRow
from okavango.platform.catalog.transactions import Transactions, lookup
from okavango.platform.errors import ConflictError, NotFoundError


class Files(Transactions):
    """Files belong to who uploaded them."""

    def put_file(
        self,
        file_id: str,
        name: str,
        purpose: str,
        size: int,
        digest: str,
        *,
        principal: str = "local",
        quota_bytes: int | None = None,
    ) -> FileRecord:
        """Record a file whose bytes are in the store.

        Args:
            quota_bytes: of all files of the principal, this one included.

        Raises:
            ConflictError: over the quota.
        """
        now = self._now()
        row = FileRow(
            id=file_id,
            name=name,
            purpose=purpose,
            bytes=size,
            digest=digest,
            principal=principal,
            created_at=now,
        )
        with self._writing() as session:
            if quota_bytes is not None:
                self._lock(session, f"files of {principal}")
                used = _used(session, principal)
                if used + size > quota_bytes:
                    raise ConflictError(
                        f"{size:,} bytes beside {used:,} are over the quota of {quota_bytes:,}",
                        where="file",
                        remedy="delete files that are no longer needed",
                    )
            session.add(row)
            return _record(row)

    def file_bytes(self, principal: str) -> int:
        """What a principal's files have together."""
        with self._reading() as session:
            return _used(session, principal)

    def get_file(self, file_id: str, *, principal: str | None = None) -> FileRecord:
        """Raises NotFoundError, also where it is another principal's than the one given."""
        with self._reading() as session:
            return _record(_find(session, file_id, principal))

    def list_files(
        self,
        *,
        principal: str | None = None,
        purpose: str | None = None,
        after: str | None = None,
        newest_first: bool = True,
        limit: int = 10_000,
    ) -> tuple[FileRecord, ...]:
        """Files of a principal and purpose, those that come after another in this order.

        Raises:
            NotFoundError: no such file as `after`.
        """
        query = select(FileRow).limit(limit)
        for column, value in ((FileRow.principal, principal), (FileRow.purpose, purpose)):
            query = query if value is None else query.where(column == value)
        order = (FileRow.created_at, FileRow.id)
        query = query.order_by(*(column.desc() for column in order) if newest_first else order)
        with self._reading() as session:
            if after is not None:
                last = _find(session, after, principal)
                at, key = last.created_at, last.id
                older = or_(FileRow.created_at < at, and_(FileRow.created_at == at, FileRow.id < key))
                newer = or_(FileRow.created_at > at, and_(FileRow.created_at == at, FileRow.id > key))
                query = query.where(older if newest_first else newer)
            return tuple(map(_record, session.scalars(query)))

    def delete_file(self, file_id: str, *, principal: str | None = None) -> FileRecord:
        """Forget a file. Its bytes are the caller's to remove.

        Raises:
            NotFoundError: as get_file.
        """
        with self._writing() as session:
            row = _find(session, file_id, principal)
            session.delete(row)
            return _record(row)


def _used(session: Session, principal: str) -> int:
    return int(session.scalar(select(func.sum(FileRow.bytes)).where(FileRow.principal == principal)) or 0)


def _find(session: Session, file_id: str, principal: str | None) -> FileRow:
    row = lookup(session, FileRow, file_id)
    if row is None or principal not in (None, row.principal):
        own = select(FileRow.id) if principal is None else select(FileRow.id).filter_by(principal=principal)
        remedy = near(file_id, session.scalars(own), "no file was uploaded yet")
        raise NotFoundError("no such file", where=file_id, remedy=remedy)
    return row


def _record(row: FileRow) -> FileRecord:
    return FileRecord(
        id=row.id,
        name=row.name,
        purpose=row.purpose,
        bytes=row.bytes,
        digest=row.digest,
        principal=row.principal,
        created_at=row.created_at,
    )
