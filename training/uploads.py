"""Where a job's data lie on this host: files of this host, or what its principal has uploaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from okavango.platform.catalog.store import Catalog
from okavango.platform.errors import DataError, MediaError, NotFoundError
from okavango.platform.stored import Stored, is_file_id
from okavango.training.dataset import ReadUpload


@dataclass(frozen=True)
class Place:
    """Data on this host.

    Attributes:
        name: as its owner knows it.
        allow_files: whether its rows may name other files of this host.
        uploads: reads media that rows name by id.
    """

    path: Path
    name: str
    allow_files: bool = True
    uploads: ReadUpload | None = None

    def named(self, error: DataError) -> DataError:
        """The error without where the data lie, which is nobody's business but this host's."""

        def own(text: str) -> str:
            return text.replace(str(self.path), self.name)

        faults = tuple(map(own, error.faults))
        return DataError(
            own(error.message), faults, where=own(error.where) if error.where else None, remedy=error.remedy
        )


Locate = Callable[[Path], Place]


def here(path: Path) -> Place:
    """A file of this host."""
    return Place(path, str(path))


class Uploads:
    """What a principal has uploaded, fetched when it is needed."""

    def __init__(self, catalog: Catalog, stored: Stored, principal: str) -> None:
        self._catalog = catalog
        self._stored = stored
        self._principal = principal

    def locate(self, path: Path) -> Place:
        """A path, or a file by its id.

        Raises:
            NotFoundError: no such file of this principal.
            IntegrityError, NotReadyError: as Stored.fetch_file.
        """
        if not is_file_id(str(path)):
            return here(path)
        file = self._catalog.get_file(str(path), principal=self._principal)
        return Place(self._stored.fetch_file(file.id, file.digest), file.name, False, self.read)

    def read(self, file_id: str, most: int) -> bytes:
        """A medium. Raises MediaError: no such file of this principal, or it is larger than `most`."""
        try:
            file = self._catalog.get_file(file_id, principal=self._principal)
        except NotFoundError as error:
            raise MediaError(f"there is no uploaded file {file_id}") from error
        if file.bytes > most:
            raise MediaError(f"{file_id} has {file.bytes:,} bytes, over the limit of {most:,}")
        return self._stored.fetch_file(file.id, file.digest).read_bytes()
