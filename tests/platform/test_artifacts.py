"""The store on a local disk; on fsspec's memory filesystem, which renames by copying; and on a disk behind
fsspec's dir filesystem, which the store takes for a remote one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec
import pytest

from okavango.platform import bundle
from okavango.platform.artifacts import ArtifactStore
from okavango.platform.bundle import Manifest
from okavango.platform.errors import ConfigError, InputError, IntegrityError, NotFoundError, NotReadyError

FILES = {
    "decoder/adapter_config.json": b"{}",
    "decoder/adapter_model.safetensors": b"weights" * 1000,
    "projectors/image.safetensors": b"head",
}


def make_bundle(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    for name, data in (FILES if files is None else files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    bundle.seal(folder, Manifest(components={"decoder": "d"}))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "source")


@pytest.fixture
def digest(source: Path) -> str:
    return bundle.read_manifest(source).digest


@pytest.fixture(params=["local", "memory", "dir"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param != "memory":
        (tmp_path / "store").mkdir()
        yield {"local": f"{tmp_path}/store", "dir": f"dir::file://{tmp_path}/store"}[request.param]
        return
    place = f"memory://{uuid.uuid4().hex}/bundles"
    yield place
    memory = fsspec.filesystem("memory")
    if memory.exists(place):
        memory.rm(place, recursive=True)


@pytest.fixture
def open_store(url: str, tmp_path: Path) -> Callable[[], ArtifactStore]:
    """Another process's view of the same store and cache."""
    return lambda: ArtifactStore(url, tmp_path / "cache")


@pytest.fixture
def store(open_store: Callable[[], ArtifactStore]) -> ArtifactStore:
    return open_store()


def stored(url: str) -> tuple[Any, str]:
    filesystem, root = fsspec.core.url_to_fs(url)
    return filesystem, root


def test_a_bundle_comes_back_as_it_was(store: ArtifactStore, source: Path, digest: str) -> None:
    assert not store.exists(digest)
    assert store.put(source) == digest
    assert store.exists(digest)
    folder = store.fetch(digest)
    assert bundle.folder_sha256(folder) == bundle.folder_sha256(source)
    assert store.fetch(digest) == folder


def test_what_is_stored_is_a_copy(store: ArtifactStore, source: Path, digest: str) -> None:
    store.put(source)
    shutil.rmtree(source)
    assert bundle.verify(store.fetch(digest), digest).digest == digest


def test_putting_again_changes_nothing(store: ArtifactStore, url: str, source: Path, digest: str) -> None:
    store.put(source)
    filesystem, root = stored(url)
    before = sorted(filesystem.find(root))
    assert store.put(source) == digest
    assert (
        sorted(filesystem.find(root))
        == before
        == sorted(f"{root}/{digest}/{n}" for n in [*FILES, "manifest.json"])
    )


def test_an_unknown_bundle(store: ArtifactStore) -> None:
    with pytest.raises(NotFoundError, match="0000"):
        store.fetch("0" * 64)


@pytest.mark.parametrize(
    "digest", ["", "..", "../source", "A" * 64, "0" * 63, "0" * 64 + "\n", "0" * 64 + "/.."]
)
def test_only_digests_are_looked_up(store: ArtifactStore, digest: str) -> None:
    with pytest.raises(InputError):
        store.fetch(digest)
    with pytest.raises(InputError):
        store.exists(digest)


@pytest.mark.parametrize("damage", ["altered", "missing", "stray", "unsealed"])
def test_only_whole_bundles_are_stored(
    store: ArtifactStore, url: str, source: Path, digest: str, damage: str
) -> None:
    weights = source / "decoder/adapter_model.safetensors"
    match damage:
        case "altered":
            weights.write_bytes(b"other")
        case "missing":
            weights.unlink()
        case "stray":
            (source / "notes.txt").touch()
        case "unsealed":
            (source / bundle.MANIFEST).unlink()
    with pytest.raises(IntegrityError):
        store.put(source)
    assert not store.exists(digest)
    filesystem, root = stored(url)
    assert not filesystem.exists(root) or filesystem.find(root) == []


@pytest.mark.parametrize("damage", ["altered", "missing", "manifest"])
def test_a_damaged_bundle_is_not_handed_out(
    open_store: Callable[[], ArtifactStore], url: str, source: Path, digest: str, damage: str
) -> None:
    open_store().put(source)
    filesystem, root = stored(url)
    weights = f"{root}/{digest}/decoder/adapter_model.safetensors"
    match damage:
        case "altered":
            filesystem.pipe_file(weights, b"other")
        case "missing":
            filesystem.rm(weights)
        case "manifest":
            filesystem.pipe_file(f"{root}/{digest}/manifest.json", b'{"format": 1')
    store = open_store()
    for _ in range(2):  # a failure is not remembered as a success
        with pytest.raises(IntegrityError, match="publish the bundle again"):
            store.fetch(digest)


def test_publishing_again_after_deleting_the_damage(
    open_store: Callable[[], ArtifactStore], url: str, source: Path, digest: str
) -> None:
    """What the error's remedy says works; so does a deletion that was broken off."""
    open_store().put(source)
    filesystem, root = stored(url)
    filesystem.rm(f"{root}/{digest}/manifest.json")
    store = open_store()
    with pytest.raises((NotFoundError, IntegrityError)):
        store.fetch(digest)
    assert store.put(source) == digest
    assert bundle.verify(store.fetch(digest), digest).digest == digest


LIMITED = """
import resource, signal, sys
from pathlib import Path
from okavango.platform.artifacts import ArtifactStore

action, url, cache, source = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
if action == "killed":
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
ArtifactStore(url, Path(cache)).put(Path(source))
"""


@pytest.mark.parametrize(("action", "message"), [("killed", ""), ("refused", "File too large")])
def test_a_writer_that_ends_inside_a_file_leaves_nothing(tmp_path: Path, action: str, message: str) -> None:
    """The system kills it, or refuses to write on, in the middle of the weights."""
    source = make_bundle(tmp_path / "source", {**FILES, "decoder/adapter_model.safetensors": b"w" * 300_000})
    digest = bundle.read_manifest(source).digest
    store = ArtifactStore(str(tmp_path / "store"), tmp_path / "cache")
    command = [
        sys.executable,
        "-c",
        LIMITED,
        action,
        str(tmp_path / "store"),
        str(tmp_path / "cache"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (-signal.SIGXFSZ if action == "killed" else 1), done.stderr
    assert message in done.stderr
    assert not store.exists(digest)
    with pytest.raises(NotFoundError):
        store.fetch(digest)
    left = [path.name for path in (tmp_path / "store").iterdir()]
    assert all(name.startswith(".partial-") for name in left)
    assert len(left) == (1 if action == "killed" else 0)
    store.put(source)
    assert bundle.verify(store.fetch(digest), digest).digest == digest


@pytest.mark.parametrize("step", ["put_file", "mv"])
@pytest.mark.parametrize("done", range(len(FILES) + 1))
def test_an_upload_that_ends_anywhere_leaves_nothing_whole(
    tmp_path: Path, source: Path, digest: str, monkeypatch: pytest.MonkeyPatch, step: str, done: int
) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    store = ArtifactStore(url, tmp_path / "cache")
    memory = fsspec.filesystem("memory")
    real, calls = getattr(memory, step), itertools.count()

    def stop(*arguments: Any, **options: Any) -> Any:
        if next(calls) == done:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(memory, step, stop)
        with pytest.raises(KeyboardInterrupt):
            store.put(source)
    assert not store.exists(digest)
    with pytest.raises(NotFoundError):
        store.fetch(digest)
    store.put(source)
    assert bundle.verify(store.fetch(digest), digest).digest == digest
    memory.rm(url, recursive=True)


def test_a_torn_copy_in_the_cache_is_fetched_again(tmp_path: Path, source: Path, digest: str) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    store = ArtifactStore(url, tmp_path / "cache")
    store.put(source)
    weights = store.fetch(digest) / "decoder/adapter_model.safetensors"
    weights.write_bytes(b"torn")
    folder = ArtifactStore(url, tmp_path / "cache").fetch(digest)
    assert weights.read_bytes() == FILES["decoder/adapter_model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == [digest]
    # Once it is in the cache, the store itself is not needed.
    fsspec.filesystem("memory").rm(url, recursive=True)
    assert ArtifactStore(url, tmp_path / "cache").fetch(digest) == folder


# Not in memory: there, the readers of a file share one position in it.
@pytest.mark.parametrize("url", ["local", "dir"], indirect=True)
def test_many_writers_and_readers_of_one_bundle(
    open_store: Callable[[], ArtifactStore], source: Path, digest: str
) -> None:
    def put_and_fetch(store: ArtifactStore) -> Path:
        assert store.put(source) == digest
        return store.fetch(digest)

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(put_and_fetch, [open_store() for _ in range(8)]))
    (folder,) = folders
    bundle.verify(folder, digest)
    assert [path.name for path in folder.parent.iterdir()] == [digest]


def test_a_manifest_does_not_reach_outside(tmp_path: Path) -> None:
    """A bundle of a store that others may write, with a name that climbs out of the cache."""
    url = f"memory://{uuid.uuid4().hex}"
    for name in ("../../outside", "/outside", "a/../../outside"):
        evil = Manifest(components={}, files={name: hashlib.sha256(b"evil").hexdigest()})
        filesystem, root = stored(url)
        filesystem.pipe_file(f"{root}/{evil.digest}/manifest.json", json.dumps(asdict(evil)).encode())
        filesystem.pipe_file(f"{root}/outside", b"evil")
        with pytest.raises(IntegrityError, match="not a path inside"):
            ArtifactStore(url, tmp_path / "a" / "cache").fetch(evil.digest)
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "s3-compatible-thing://x"])
def test_a_url_without_a_filesystem(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="OKAVANGO_ARTIFACTS_URL"):
        ArtifactStore(url, tmp_path)


def test_a_store_that_cannot_be_written(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotReadyError, match="OKAVANGO_ARTIFACTS_URL"):
        ArtifactStore(f"{tmp_path}/file/store", tmp_path / "cache").put(source)


def test_a_store_at_a_file_url(tmp_path: Path, source: Path, digest: str) -> None:
    """No copy in the cache: what lies on the local disk is read where it lies."""
    store = ArtifactStore(f"file://{tmp_path}/store", tmp_path / "cache")
    store.put(source)
    assert store.fetch(digest) == tmp_path / "store" / digest
    assert not (tmp_path / "cache").exists()


def test_a_driver_that_raises_a_class_of_its_own(
    tmp_path: Path, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As botocore does without credentials."""

    class NoCredentialsError(Exception):
        pass

    def fail(*_: Any, **__: Any) -> bool:
        raise NoCredentialsError("unable to locate credentials")

    store = ArtifactStore(f"memory://{uuid.uuid4().hex}", tmp_path / "cache")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "exists", fail)
    with pytest.raises(NotReadyError, match="unable to locate credentials"):
        store.fetch(digest)
    with pytest.raises(NotReadyError, match="OKAVANGO_ARTIFACTS_URL"):
        store.exists(digest)
