"""What leaves the catalog: frozen records, detached from the database. Times are aware and in UTC."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from okavango.platform.catalog.names import DEFAULT_ALIAS
from okavango.platform.catalog.states import SERVABLE


@dataclass(frozen=True)
class BaseRecord:
    """`components`: {component: digest}, such as decoder, encoders.image, projectors.image."""

    name: str
    digest: str
    components: dict[str, str]
    location: str
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class DatasetRecord:
    """A dataset is its digest; `name` and `location` say where it was last seen."""

    name: str
    digest: str
    location: str
    rows: int
    created_at: datetime


@dataclass(frozen=True)
class VersionRecord:
    """An immutable version of an adapter: only its state, verification and error ever change.

    Attributes:
        digest: of the adapter's bundle.
        base_digest: what the base's name stood for when the version was registered.
        components: {component: digest} that the bundle binds to.
        verification: what the gate measured, once the serving side has tried the bundle.
        error: why the version was refused.
    """

    adapter: str
    version: int
    digest: str
    base: str
    base_digest: str
    components: dict[str, str]
    modalities: tuple[str, ...]
    lineage: dict[str, Any]
    metrics: dict[str, Any]
    state: str
    verification: dict[str, Any] | None
    error: str | None
    principal: str
    job_id: str | None
    created_at: datetime
    updated_at: datetime

    @property
    def ref(self) -> str:
        return f"{self.adapter}@{self.version}"


@dataclass(frozen=True)
class AliasRecord:
    """`previous`: the version that the alias named before its last move, where a rollback leads."""

    adapter: str
    name: str
    version: int
    previous: int | None
    updated_at: datetime


@dataclass(frozen=True)
class AdapterRecord:
    """`versions` in ascending order; `aliases` by name."""

    name: str
    base: str
    created_at: datetime
    versions: tuple[VersionRecord, ...]
    aliases: tuple[AliasRecord, ...]

    @property
    def current(self) -> VersionRecord | None:
        """What the bare name stands for: the alias `prod` where that is set, else the newest version that is
        ready or bound, else the newest one registered. None where all were refused or are retired."""
        named = {alias.version for alias in self.aliases if alias.name == DEFAULT_ALIAS}
        for is_candidate in (
            lambda version: version.version in named,
            lambda version: version.state in SERVABLE,
            lambda version: version.state == "registered",
        ):
            for version in reversed(self.versions):
                if is_candidate(version):
                    return version
        return None


@dataclass(frozen=True)
class JobRecord:
    """A unit of leased work.

    Attributes:
        worker: who holds the job, or held it last.
        lease_until: when the job falls back to the queue unless its worker is heard of; None unless running.
        attempts: how often the job was claimed; losses: how often its worker died over it.
        labels: what its submitter wrote on it.
        priority: the higher ones go first.
        cancel_requested, pause_requested: the worker is to stop at its next heartbeat.
    """

    id: str
    kind: str
    name: str
    spec: dict[str, Any]
    labels: dict[str, str]
    state: str
    principal: str
    worker: str | None
    lease_until: datetime | None
    attempts: int
    losses: int
    priority: int
    cancel_requested: bool
    pause_requested: bool
    progress: dict[str, Any] | None
    result: dict[str, Any] | None
    error: str | None
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True)
class JobEventRecord:
    """Something that happened to a job; see catalog.events.Event. `number` counts from 1 within the job."""

    job_id: str
    number: int
    kind: str
    level: str
    message: str
    data: dict[str, Any] | None
    created_at: datetime


@dataclass(frozen=True)
class FileRecord:
    """An uploaded file. `digest`: sha256 of its bytes."""

    id: str
    name: str
    purpose: str
    bytes: int
    digest: str
    principal: str
    created_at: datetime
