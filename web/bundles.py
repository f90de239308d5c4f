"""The artifact store as engine, models and verifier see it: what the catalog names ought to be there."""

from __future__ import annotations

from pathlib import Path

from okavango.platform.artifacts import ArtifactStore
from okavango.platform.errors import NotFoundError, NotReadyError


class Bundles:
    """Fetches bundles of versions that the catalog knows, so that a missing one is the server's fault."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def fetch(self, digest: str) -> Path:
        """A local folder that holds the verified bundle.

        Raises:
            IntegrityError: what the store has is torn or altered.
            NotReadyError: the store cannot be read, or has lost the bundle.
        """
        try:
            return self._store.fetch(digest)
        except NotFoundError as error:
            raise NotReadyError(
                f"the bundle {digest[:12]} of this version is missing from the artifact store",
                where=error.where,
                remedy="put it back, or move the alias to another version",
            ) from error
