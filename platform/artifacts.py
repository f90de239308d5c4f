"""The artifact store: sealed bundles under their digests, on a local disk or any filesystem of fsspec.

A bundle is there whole or not at all. On a local disk it is written under a temporary name and renamed.
Object stores cannot rename a folder, so there the manifest comes last: what has no manifest does not exist.

    <store>/<digest>/...           a bundle
    <store>/.partial-<random>/     left by a writer that was killed; never read
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from okavango.platform import bundle
from okavango.platform.errors import (
    ConfigError,
    InputError,
    IntegrityError,
    NotFoundError,
    NotReadyError,
    OkavangoError,
)

_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


class ArtifactStore:
    """Safe to share between threads, processes and hosts: the same digest is always the same bytes.

    Args:
        url: a folder, or an fsspec URL such as s3://bucket/prefix.
        cache: where bundles of a store that is not a local disk are kept.

    Raises:
        ConfigError: no filesystem for that URL.
    """

    def __init__(self, url: str, cache: Path) -> None:
        self._url = url
        self._cache = cache
        self._fs, root = open_filesystem(url)
        self._root = root.rstrip("/")
        self._local = Path(self._root) if "file" in protocols(self._fs) else None
        self._verified: set[str] = set()

    def put(self, folder: Path) -> str:
        """Store a sealed bundle and return its digest. A bundle that is there already is left as it is.

        Raises:
            IntegrityError: the folder is not a whole bundle; nothing was stored.
            NotReadyError: the store cannot be written.
        """
        digest = bundle.read_manifest(folder).digest
        with self._storage_errors():
            if not self.exists(digest):
                self._put_local(folder, digest) if self._local else self._put_remote(folder, digest)
        return digest

    def exists(self, digest: str) -> bool:
        """Whether the store has a bundle, whole as far as a look tells.

        Raises:
            InputError: not a digest.
            NotReadyError: the store cannot be read.
        """
        with self._storage_errors():
            # Another host may have put it there since this one looked.
            self._fs.invalidate_cache()
            return bool(self._fs.exists(f"{self._path(digest)}/{bundle.MANIFEST}"))

    def fetch(self, digest: str) -> Path:
        """A local folder with the bundle, every file checked against its digest once in this process.

        The folder is the store's own, or the cache's: read it, never write to it.

        Raises:
            InputError: not a digest.
            NotFoundError: the store has no such bundle.
            IntegrityError: what the store has is torn or altered.
            NotReadyError: the store cannot be read.
        """
        path = self._path(digest)
        folder = Path(path) if self._local else self._cache / digest
        if digest in self._verified and folder.is_dir():
            return folder
        with self._storage_errors(), _remedy(f"delete {path} and publish the bundle again"):
            self._verify_local(folder, digest) if self._local else self._verify_cached(folder, digest)
        self._verified.add(digest)
        return folder

    def _put_local(self, folder: Path, digest: str) -> None:
        assert self._local is not None
        with _complete_folder(self._local / digest) as partial:
            shutil.copytree(folder, partial)
            # The copy is checked, not the source, for that is what will be read.
            bundle.verify(partial, digest)

    def _put_remote(self, folder: Path, digest: str) -> None:
        manifest = bundle.verify(folder, digest)
        path = self._path(digest)
        for name in manifest.files:
            self._upload(folder / name, f"{path}/{name}")
        self._upload(folder / bundle.MANIFEST, f"{path}/{bundle.MANIFEST}")

    def _upload(self, source: Path, target: str) -> None:
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        # Where a file appears as it is being written, it does so under another name.
        partial = f"{target}.partial-{uuid.uuid4().hex}"
        self._fs.put_file(str(source), partial)
        self._fs.mv(partial, target)

    def _verify_local(self, folder: Path, digest: str) -> None:
        if not folder.is_dir():
            raise self._missing(digest)
        bundle.verify(folder, digest)

    def _verify_cached(self, folder: Path, digest: str) -> None:
        """A damaged copy in the cache is no loss: it is fetched again."""
        if folder.is_dir():
            try:
                bundle.verify(folder, digest)
                return
            except IntegrityError:
                shutil.rmtree(folder)
        if not self.exists(digest):
            raise self._missing(digest)
        with _complete_folder(folder) as partial:
            self._download(self._path(digest), partial, digest)

    def _download(self, path: str, folder: Path, digest: str) -> None:
        folder.mkdir()
        self._fs.get_file(f"{path}/{bundle.MANIFEST}", str(folder / bundle.MANIFEST))
        manifest = bundle.read_manifest(folder)
        for name in manifest.files:
            _check_inside(name)
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._fs.get_file(f"{path}/{name}", str(target))
            except FileNotFoundError as error:
                raise IntegrityError("is missing from the bundle", where=f"{path}/{name}") from error
        bundle.verify(folder, digest)

    def _path(self, digest: str) -> str:
        if not _DIGEST.fullmatch(digest):
            raise InputError("is not a bundle's digest (64 hexadecimal digits)", where=repr(digest))
        return f"{self._root}/{digest}"

    def _missing(self, digest: str) -> NotFoundError:
        return NotFoundError("no such bundle in the artifact store", where=f"{self._url}: {digest[:12]}")

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Drivers of object stores raise classes of their own besides OSError, as without credentials."""
        try:
            yield
        except OkavangoError:
            raise
        except Exception as error:
            if self._local and not isinstance(error, OSError):
                raise
            raise NotReadyError(
                f"the artifact store cannot be used: {error}",
                where=self._url,
                remedy="check its space and rights, and OKAVANGO_ARTIFACTS_URL",
            ) from error


@contextmanager
def _complete_folder(target: Path) -> Iterator[Path]:
    """A path for a folder that becomes `target` when the block ends well, and else leaves nothing behind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".partial-{uuid.uuid4().hex}"
    try:
        yield partial
        _flush(partial)
        _rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError:
        # Another writer of the same digest was first, or someone damaged what is there.
        if not target.is_dir():
            raise
        if not (target / bundle.MANIFEST).is_file():
            shutil.rmtree(target)
            partial.rename(target)


def _flush(folder: Path) -> None:
    """To the disk before the rename: or after a power cut, a whole-looking folder could hold empty files."""
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_inside(name: str) -> None:
    """A manifest from elsewhere must not write outside its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise IntegrityError("is not a path inside the bundle", where=name)


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem for a folder or URL, and the path in it. Raises ConfigError where there is none."""
    from fsspec.core import url_to_fs

    try:
        filesystem, root = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"no filesystem for the artifact store: {error}", where=url, remedy="set OKAVANGO_ARTIFACTS_URL"
        ) from error
    return filesystem, root


def protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


@contextmanager
def _remedy(text: str) -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        error.remedy = error.remedy or text
        raise
