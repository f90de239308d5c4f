"""Adapters, their immutable versions, and the aliases that move between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session, selectinload

from okavango.platform.catalog.assets import find_base
from okavango.platform.catalog.names import DEFAULT_ALIAS, check_alias, check_name, near, parse_ref
from okavango.platform.catalog.records import AdapterRecord, AliasRecord, VersionRecord
from okavango.platform.catalog.schema import AdapterRow, AliasRow, BaseRow, JobRow, VersionRow
from okavango.platform.catalog.states import SERVABLE, check_version_move
from okavango.platform.catalog.transactions import Transactions, as_json, lookup
from okavango.platform.errors import ConflictError, InputError, NotFoundError, NotReadyError


class Adapters(Transactions):
    """Every writer first locks the adapter's row: no two of them decide on the same state of one adapter."""

    def register_version(
        self,
        adapter: str,
        digest: str,
        *,
        base: str,
        components: Mapping[str, str],
        modalities: Sequence[str],
        lineage: Mapping[str, Any],
        metrics: Mapping[str, Any],
        principal: str = "local",
        job_id: str | None = None,
    ) -> VersionRecord:
        """Add a bundle as the adapter's next version. The same bundle again returns the version that it has.

        Raises:
            InputError: the name breaks the rule or is a base's, or a value is not JSON.
            NotFoundError: no such base or job.
            ConflictError: the adapter is one of another base.
        """
        check_name(adapter, "adapter")
        facts = {
            "digest": digest,
            "components": as_json(components, "components"),
            "modalities": list(modalities),
            "lineage": as_json(lineage, "lineage"),
            "metrics": as_json(metrics, "metrics"),
            "principal": principal,
            "job_id": job_id,
        }
        with self._writing() as session:
            base_row = find_base(session, base)
            owner = self._claim_name(session, adapter, base_row)
            known = session.scalar(select(VersionRow).filter_by(adapter=adapter, digest=digest))
            return _version(known or self._add_version(session, owner, base_row, facts))

    def set_version_state(
        self,
        adapter: str,
        version: int,
        state: str,
        *,
        verification: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> VersionRecord:
        """Record what the serving side found. Said twice it changes nothing but the verification.

        Raises:
            NotFoundError: no such version.
            ConflictError: the move is not legal, or an alias still names a version that is to retire.
        """
        kept = None if verification is None else as_json(verification, "verification")
        with self._writing() as session:
            row = _find_version(session, _find_adapter(session, adapter, lock=True), version)
            if row.state != state:
                check_version_move(row.state, state, f"{adapter}@{version}")
            if state == "retired":
                _refuse_if_named(session, row)
            row.state, row.error, row.updated_at = state, error, self._now()
            row.verification = row.verification if kept is None else kept
            return _version(row)

    def promote(self, adapter: str, version: int, alias: str = DEFAULT_ALIAS) -> AliasRecord:
        """Move an alias to a version, in one step. Naming the version that it has already changes nothing.

        Raises:
            InputError: not a name for an alias.
            NotFoundError: no such adapter or version.
            NotReadyError: the serving side has not verified the version yet.
            ConflictError: the version was refused or is retired.
        """
        check_alias(alias)
        with self._writing() as session:
            owner = _find_adapter(session, adapter, lock=True)
            _refuse_unservable(_find_version(session, owner, version))
            row = lookup(session, AliasRow, (adapter, alias))
            if row is None:
                row = AliasRow(adapter=adapter, name=alias, version=version, updated_at=self._now())
                session.add(row)
            elif row.version != version:
                row.previous, row.version, row.updated_at = row.version, version, self._now()
            return _alias(row)

    def resolve(self, ref: str) -> VersionRecord:
        """The version that "emoji", "emoji@3" or "emoji@prod" stands for now.

        AdapterRecord.current says what a bare name means.

        Raises:
            InputError: not a reference.
            NotFoundError: no such adapter, version or alias, with the nearest named; or no version of use.
        """
        parsed = parse_ref(ref)
        with self._reading() as session:
            owner = _find_adapter(session, parsed.adapter)
            if parsed.version is not None:
                return _version(_find_version(session, owner, parsed.version))
            alias = lookup(session, AliasRow, (owner.name, parsed.alias or DEFAULT_ALIAS))
            if alias is not None:
                return _version(_find_version(session, owner, alias.version))
            if parsed.alias is not None:
                raise _no_alias(owner, parsed.alias)
            return _current(owner)

    def get_adapter(self, name: str) -> AdapterRecord:
        """Raises NotFoundError, with the nearest adapter named."""
        with self._reading() as session:
            return _adapter(_find_adapter(session, name))

    def list_adapters(self) -> tuple[AdapterRecord, ...]:
        """All adapters by name, with their versions and aliases."""
        query = select(AdapterRow).order_by(AdapterRow.name)
        query = query.options(selectinload(AdapterRow.versions), selectinload(AdapterRow.aliases))
        with self._reading() as session:
            return tuple(map(_adapter, session.scalars(query)))

    def aliases(self, adapter: str) -> tuple[AliasRecord, ...]:
        """An adapter's aliases by name. Raises NotFoundError."""
        return self.get_adapter(adapter).aliases

    def versions(self, state: str | None = None) -> tuple[VersionRecord, ...]:
        """Versions of all adapters, oldest first; those in one state if that is given."""
        query = select(VersionRow).order_by(VersionRow.created_at, VersionRow.adapter, VersionRow.number)
        with self._reading() as session:
            return tuple(
                map(_version, session.scalars(query if state is None else query.filter_by(state=state)))
            )

    def _claim_name(self, session: Session, name: str, base: BaseRow) -> AdapterRow:
        """The adapter of that name, new or not, locked."""
        if lookup(session, BaseRow, name) is not None:
            raise InputError("is the name of a base", where=f"adapter {name!r}", remedy="choose another")
        row = self._ensure(session, AdapterRow(name=name, base=base.name, created_at=self._now()))
        if row.base != base.name:
            raise ConflictError(
                f"belongs to base {row.base!r}, not {base.name!r}",
                where=f"adapter {name!r}",
                remedy="choose another name",
            )
        return row

    def _add_version(
        self, session: Session, owner: AdapterRow, base: BaseRow, facts: dict[str, Any]
    ) -> VersionRow:
        job_id = facts["job_id"]
        if job_id is not None and lookup(session, JobRow, job_id) is None:
            raise NotFoundError("no such job", where=job_id)
        now = self._now()
        last = session.scalar(select(func.max(VersionRow.number)).filter_by(adapter=owner.name)) or 0
        row = VersionRow(
            adapter=owner.name,
            number=last + 1,
            base=base.name,
            base_digest=base.digest,
            state="registered",
            created_at=now,
            updated_at=now,
            **facts,
        )
        session.add(row)
        return row


def _find_adapter(session: Session, name: str, *, lock: bool = False) -> AdapterRow:
    row = lookup(session, AdapterRow, name, lock=lock)
    if row is None:
        remedy = near(name, session.scalars(select(AdapterRow.name)), "there is no adapter yet")
        raise NotFoundError("no such adapter", where=f"adapter {name!r}", remedy=remedy)
    return row


def _find_version(session: Session, owner: AdapterRow, number: int) -> VersionRow:
    row = lookup(session, VersionRow, (owner.name, number))
    if row is None:
        known = ", ".join(str(version.number) for version in owner.versions) or "none"
        raise NotFoundError("no such version", where=f"{owner.name}@{number}", remedy=f"versions: {known}")
    return row


def _no_alias(owner: AdapterRow, alias: str) -> NotFoundError:
    remedy = near(
        alias, (row.name for row in owner.aliases), "it has no alias: `okavango adapters promote` sets one"
    )
    return NotFoundError("no such alias", where=f"{owner.name}@{alias}", remedy=remedy)


def _current(owner: AdapterRow) -> VersionRecord:
    found = _adapter(owner).current
    if found is None:
        raise NotFoundError(
            "every version was refused or is retired",
            where=f"adapter {owner.name!r}",
            remedy=f"`okavango adapters show {owner.name}` says why",
        )
    return found


def _refuse_unservable(row: VersionRow) -> None:
    where = f"{row.adapter}@{row.number}"
    if row.state == "registered":
        raise NotReadyError(
            "is not verified yet",
            where=where,
            remedy="the server verifies new versions while it runs: start `okavango serve`",
        )
    if row.state not in SERVABLE:
        reason = f": {row.error}" if row.error else ""
        raise ConflictError(f"is {row.state} and cannot take traffic{reason}", where=where)


def _refuse_if_named(session: Session, row: VersionRow) -> None:
    names = session.scalars(select(AliasRow.name).filter_by(adapter=row.adapter, version=row.number)).all()
    if names:
        raise ConflictError(
            f"is what {', '.join(names)} names",
            where=f"{row.adapter}@{row.number}",
            remedy="promote another version first",
        )


def _adapter(row: AdapterRow) -> AdapterRecord:
    return AdapterRecord(
        name=row.name,
        base=row.base,
        created_at=row.created_at,
        versions=tuple(map(_version, row.versions)),
        aliases=tuple(map(_alias, row.aliases)),
    )


def _version(row: VersionRow) -> VersionRecord:
    return VersionRecord(
        adapter=row.adapter,
        version=row.number,
        digest=row.digest,
        base=row.base,
        base_digest=row.base_digest,
        components=dict(row.components),
        modalities=tuple(row.modalities),
        lineage=dict(row.lineage),
        metrics=dict(row.metrics),
        state=row.state,
        verification=row.verification,
        error=row.error,
        principal=row.principal,
        job_id=row.job_id,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def _alias(row: AliasRow) -> AliasRecord:
    return AliasRecord(
        adapter=row.adapter,
        name=row.name,
        version=row.version,
        previous=row.previous,
        updated_at=row.updated_at,
    )
