"""What the training service keeps beside bundles in the artifact store, so that workers of any host find it.

    <store>/files/<id>              an uploaded file
    <store>/jobs/<job>/<name>/      a folder that a job wants to find again, as its last checkpoint

Files are written under another name and renamed; of a folder on an object store, the file named last comes
last, and a folder without it does not exist.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from okavango.platform.artifacts import open_filesystem, protocols
from okavango.platform.bundle import file_sha256
from okavango.platform.errors import IntegrityError, NotReadyError, OkavangoError


class Stored:
    """Safe to share between threads and processes.

    Args:
        url: the artifact store's.
        cache: where files of a store that is not a local disk are kept.
    """

    def __init__(self, url: str, cache: Path) -> None:
        self._url = url
        self._cache = cache
        self._fs, root = open_filesystem(url)
        self._root = root.rstrip("/")
        self._is_local = "file" in protocols(self._fs)

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """A path for a file on its way in: on the store's own disk if it has one. Gone after the block."""
        folder = Path(self._root) / "files" if self._is_local else self._cache
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f".partial-{uuid.uuid4().hex}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def put_file(self, file_id: str, path: Path) -> None:
        """Keep a file, which is moved there where that can be. Raises NotReadyError: it cannot be written."""
        with self._errors():
            if self._is_local:
                path.rename(self._file(file_id))
            else:
                self._upload(path, self._file(file_id))

    def fetch_file(self, file_id: str, digest: str) -> Path:
        """Where the file lies on this host, for reading.

        Raises:
            IntegrityError: it is gone, or is not what was uploaded.
            NotReadyError: the store does not answer.
        """
        with self._errors():
            path = Path(self._file(file_id)) if self._is_local else self._cache / file_id
            if not self._is_local and not path.exists():
                self._download(self._file(file_id), path)
            if not path.exists() or file_sha256(path) != digest:
                raise IntegrityError("is not what was uploaded", where=file_id, remedy="upload it again")
            return path

    def remove_file(self, file_id: str) -> None:
        """Said of a file that is not there, it changes nothing."""
        with self._errors():
            if self._fs.exists(self._file(file_id)):
                self._fs.rm_file(self._file(file_id))
        if not self._is_local:
            (self._cache / file_id).unlink(missing_ok=True)

    def put_folder(self, job_id: str, folder: Path, last: str) -> None:
        """Keep a copy of a job's folder under its own name; of its files, `last` is written last."""
        target = f"{self._job(job_id)}/{folder.name}"
        with self._errors():
            for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
                self._upload(path, f"{target}/{path.name}")

    def list_folders(self, job_id: str, last: str) -> tuple[str, ...]:
        """Names of a job's folders that are whole, in order."""
        with self._errors():
            self._fs.invalidate_cache()
            found = self._fs.glob(f"{self._job(job_id)}/*/{last}")
            return tuple(sorted(str(path).split("/")[-2] for path in found))

    def get_folder(self, job_id: str, name: str, target: Path) -> None:
        """Copy a job's folder to `target`, which is there whole or not at all."""
        partial = target.with_name(f".partial-{uuid.uuid4().hex}")
        with self._errors():
            try:
                partial.mkdir(parents=True)
                for path in self._fs.ls(f"{self._job(job_id)}/{name}", detail=False):
                    self._fs.get_file(path, str(partial / str(path).rsplit("/", 1)[-1]))
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def remove_folders(self, job_id: str, names: Sequence[str] | None = None) -> None:
        """Remove a job's folders: those named, or all."""
        job = self._job(job_id)
        with self._errors():
            for path in [job] if names is None else [f"{job}/{name}" for name in names]:
                if self._fs.exists(path):
                    self._fs.rm(path, recursive=True)

    def _upload(self, source: Path, target: str) -> None:
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        partial = f"{target}.partial-{uuid.uuid4().hex}"
        self._fs.put_file(str(source), partial)
        self._fs.mv(partial, target)

    def _download(self, source: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".partial-{uuid.uuid4().hex}")
        try:
            if self._fs.exists(source):
                self._fs.get_file(source, str(partial))
                partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)

    def _file(self, file_id: str) -> str:
        return f"{self._root}/files/{file_id}"

    def _job(self, job_id: str) -> str:
        return f"{self._root}/jobs/{job_id}"

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Drivers of object stores raise classes of their own besides OSError."""
        try:
            yield
        except OkavangoError:
            raise
        except Exception as error:
            if self._is_local and not isinstance(error, OSError):
                raise
            raise NotReadyError(
                f"the artifact store cannot be used: {error}",
                where=self._url,
                remedy="check its space and rights, and OKAVANGO_ARTIFACTS_URL",
            ) from error


def new_file_id() -> str:
    return f"file-{uuid.uuid4().hex[:24]}"


def is_file_id(text: str) -> bool:
    """Whether a text has the form of an uploaded file's id, and so is no path."""
    head, _, tail = text.partition("-")
    return head == "file" and len(tail) == 24 and all(c in "0123456789abcdef" for c in tail)
