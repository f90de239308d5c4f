"""What a request's `model` stands for: the bare base, or one verified adapter version of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from okavango.modalities.base import Base
from okavango.modalities.head_files import head_specs
from okavango.modalities.projector import HeadSpec
from okavango.platform.bundle import read_manifest, read_system
from okavango.platform.catalog.names import near
from okavango.platform.catalog.records import AdapterRecord, VersionRecord
from okavango.platform.catalog.states import SERVABLE
from okavango.platform.catalog.store import Catalog
from okavango.platform.errors import ConflictError, InputError, NotFoundError
from okavango.serving.types import AdapterRef, AdapterSource
from okavango.web.verifier import Verifier, belongs_to


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class OtherBaseError(InputError):
    code = "adapter_of_another_base"


@dataclass(frozen=True)
class Model:
    """What answers.

    Attributes:
        adapter: None means the bare base.
        system: the prompt that the adapter brings.
        heads: shapes of the projection heads that it brings, by modality.
    """

    base: Base
    adapter: AdapterRef | None = None
    system: str | None = None
    heads: Mapping[str, HeadSpec] = field(default_factory=dict)

    @property
    def ref(self) -> str:
        """Base or adapter@version, for people and logs."""
        return str(self.adapter) if self.adapter else self.base.name

    @property
    def digest(self) -> str:
        return self.adapter.digest if self.adapter else self.base.digest


@dataclass(frozen=True)
class ListedModel:
    """A name that requests may use now. `version` None means the bare base."""

    id: str
    created: datetime
    version: VersionRecord | None = None


class Models:
    """Resolves names through the catalog, once a request.

    Args:
        patience_seconds: how long a request waits for a version that is not verified yet.
    """

    def __init__(
        self,
        base: Base,
        catalog: Catalog,
        source: AdapterSource,
        verifier: Verifier,
        *,
        patience_seconds: float,
    ) -> None:
        self._base = base
        self._catalog = catalog
        self._source = source
        self._verifier = verifier
        self._patience_seconds = patience_seconds

    @property
    def base_name(self) -> str:
        return self._base.name

    async def resolve(self, name: str) -> Model:
        """The base, "emoji", "emoji@3" or "emoji@prod" → what answers.

        Raises:
            ModelNotFoundError: there is no such model, adapter, version or alias.
            OtherBaseError: the version was made over another base.
            ConflictError: the version was refused, or is retired.
            NotReadyError: it could not be verified in time.
        """
        if name == self._base.name:
            return Model(self._base)
        version = await asyncio.to_thread(self.find, name)
        if version.state == "registered":
            version = await self._verifier.verified(version, self._patience_seconds)
        check_servable(version)
        return await asyncio.to_thread(self._model, version)

    def listed(self) -> tuple[ListedModel, ...]:
        """The base, then by adapter: its bare name, its versions, its aliases."""
        base = ListedModel(self._base.name, self._catalog.get_base(self._base.name).created_at)
        adapters = self._catalog.list_adapters()
        return (base, *(model for adapter in adapters for model in self._names(adapter)))

    def _names(self, adapter: AdapterRecord) -> Iterator[ListedModel]:
        usable = {v.version: v for v in adapter.versions if v.state in SERVABLE and belongs_to(v, self._base)}
        if not usable:
            return
        named = self._catalog.resolve(adapter.name)
        if named.version in usable:
            yield ListedModel(adapter.name, adapter.created_at, named)
        for version in usable.values():
            yield ListedModel(version.ref, version.created_at, version)
        for alias in adapter.aliases:
            if alias.version in usable:
                yield ListedModel(f"{adapter.name}@{alias.name}", alias.updated_at, usable[alias.version])

    def find(self, name: str) -> VersionRecord:
        """The version of this base that a name stands for now, whatever its state.

        Raises:
            ModelNotFoundError, OtherBaseError: as `resolve` does.
        """
        try:
            version = self._catalog.resolve(name)
        except InputError as error:
            raise ModelNotFoundError(error.message, where="model", remedy=error.remedy) from error
        except NotFoundError as error:
            raise self._not_found(name, error) from error
        if not belongs_to(version, self._base):
            raise self._of_another_base(version)
        return version

    def _not_found(self, name: str, error: NotFoundError) -> ModelNotFoundError:
        """An unknown adapter is an unknown model: bases are models, too, and only one of them is served."""
        if error.message != "no such adapter":
            return ModelNotFoundError(f"{error.message}: {error.where}", where="model", remedy=error.remedy)
        if name in {base.name for base in self._catalog.list_bases()}:
            message = f"base {name!r} is not served here; this server runs base {self._base.name!r}"
            return ModelNotFoundError(message, where="model", remedy=f"okavango serve --base {name}")
        known = [self._base.name, *(adapter.name for adapter in self._catalog.list_adapters())]
        remedy = near(name.partition("@")[0], known, "")
        return ModelNotFoundError(f"the model {name!r} does not exist", where="model", remedy=remedy)

    def _of_another_base(self, version: VersionRecord) -> OtherBaseError:
        name, digest = next(
            (name, digest)
            for name, digest in version.components.items()
            if self._base.components.get(name) != digest
        )
        ours = self._base.components.get(name)
        return OtherBaseError(
            f"{version.ref} was made over base {version.base!r} ({name} {digest[:12]}), and this server runs "
            f"base {self._base.name!r} ({f'{name} {ours[:12]}' if ours else f'no {name}'})",
            where="model",
            remedy=f"okavango serve --base {version.base}, or train it over {self._base.name!r}",
        )

    def _model(self, version: VersionRecord) -> Model:
        ref = AdapterRef(version.adapter, version.version, version.digest)
        folder = self._source.fetch(version.digest)
        return Model(self._base, ref, read_system(folder), head_specs(folder, read_manifest(folder)))


def check_servable(version: VersionRecord) -> None:
    """Raises ConflictError unless the version takes requests."""
    if version.state in SERVABLE:
        return
    reason = f": {version.error}" if version.error else ""
    raise ConflictError(
        f"{version.ref} is {version.state} and takes no requests{reason}",
        where="model",
        remedy="name another version; `okavango adapters list` shows them",
    )
