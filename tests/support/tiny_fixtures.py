"""The tiny base, and random adapters for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from okavango.modalities.base import Base
from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tiny_bundle import write_tiny_bundle
from okavango.platform.bundle import read_manifest

RANKS = (4, 8, 16)


class Bundles:
    """Sealed bundles by name, and an AdapterSource over them."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.digests = {name: read_manifest(folder).digest for name, folder in folders.items()}

    def fetch(self, digest: str) -> Path:
        return next(self.folders[name] for name, found in self.digests.items() if found == digest)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def tiny_bundles(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """One bundle a rank, each with its own image head: r4, r8, r16."""
    folder = tmp_path_factory.mktemp("bundles")
    for rank in RANKS:
        write_tiny_bundle(folder / f"r{rank}", tiny_base, seed=rank, rank=rank)
    return Bundles({f"r{rank}": folder / f"r{rank}" for rank in RANKS})
