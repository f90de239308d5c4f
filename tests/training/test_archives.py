"""Archives are real ones, good and bad."""

import gzip
import io
import json
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from okavango.modalities.tiny_bundle import picture_bytes
from okavango.platform.errors import DataError
from okavango.training import archives
from okavango.training.archives import ArchiveLimits, unpack
from okavango.training.check import check_dataset
from okavango.training.dataset import open_dataset

PICTURE = picture_bytes(1)
ROW = {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}
LINE = json.dumps(ROW | {"image": "images/1.png"}).encode() + b"\n"
GOOD = {"shop/train.jsonl": LINE, "shop/images/1.png": PICTURE, "shop/README.md": b"# Shop"}

Pack = Callable[[Path, dict[str, bytes]], Path]


def as_zip(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "data.zip"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")  # about names that stand twice
        for name, data in files.items():
            archive.writestr(name.rstrip("*"), data)
    return path


def as_tar(folder: Path, files: dict[str, bytes], kind: str = "gz") -> Path:
    path = folder / f"data.tar.{kind}"
    with tarfile.open(path, f"w:{kind}") as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name.rstrip("*"))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


both = pytest.mark.parametrize("pack", [as_zip, as_tar])


def refused(path: Path, cache: Path, text: str, limits: ArchiveLimits | None = None) -> None:
    with pytest.raises(DataError, match=text) as caught:
        unpack(path, cache, limits)
    assert str(caught.value.where).startswith(str(path))
    assert not [each for each in cache.rglob("*") if each.suffix not in (".lock",)]


@both
def test_rows_and_media_of_an_archive(tmp_path: Path, pack: Pack) -> None:
    path = pack(tmp_path, {**GOOD, "__MACOSX/shop/._train.jsonl": b"x", "shop/.DS_Store": b"x"})
    dataset = open_dataset(path, cache=tmp_path / "cache", allow_files=False)
    assert str(dataset.path) == f"{path}#shop/train.jsonl"
    assert dataset.row(0).messages[0].media[0].data == PICTURE
    report = check_dataset(path, cache=tmp_path / "cache")
    assert report.ok
    assert report.path == dataset.path
    [folder] = [each for each in (tmp_path / "cache" / "archives").iterdir() if each.is_dir()]
    assert sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file()) == sorted(
        GOOD
    )


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_tars_are_known_by_how_they_begin(tmp_path: Path, kind: str) -> None:
    upload = as_tar(tmp_path, GOOD, kind).rename(tmp_path / "file-1")
    assert len(open_dataset(upload, cache=tmp_path / "cache", allow_files=False)) == 1


def test_an_archive_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_zip(tmp_path, GOOD)
    folder = unpack(path, tmp_path / "cache")
    monkeypatch.setattr(archives, "_Unpacking", None)
    assert unpack(path, tmp_path / "cache") == folder


@both
def test_faults_name_the_file_in_the_archive(tmp_path: Path, pack: Pack) -> None:
    path = pack(tmp_path, {"rows.jsonl": LINE + b"{\n"})
    report = check_dataset(path, cache=tmp_path / "cache")
    assert [str(fault).split(": ")[0] for fault in report.faults] == [
        f"{path}#rows.jsonl:{i}" for i in (1, 2)
    ]
    assert "there is no file 'images/1.png'" in report.faults[0].text


@both
def test_one_of_several_data_files_is_named(tmp_path: Path, pack: Pack) -> None:
    path = pack(tmp_path, {"test.jsonl": LINE * 2, "train.jsonl": LINE, "images/1.png": PICTURE})
    with pytest.raises(DataError, match=r"holds several data files \(name one: .*#test\.jsonl; there are"):
        open_dataset(path, cache=tmp_path / "cache")
    assert len(open_dataset(Path(f"{path}#test.jsonl"), cache=tmp_path / "cache")) == 2
    for part in ("gone.jsonl", "../data.zip", "images"):
        with pytest.raises(DataError, match="holds no file"):
            open_dataset(Path(f"{path}#{part}"), cache=tmp_path / "cache")
    with pytest.raises(DataError, match="holds no data file"):
        open_dataset(pack(tmp_path, {"README.md": b"x"}), cache=tmp_path / "cache")


@both
@pytest.mark.parametrize(
    "name", ["../out.jsonl", "/out.jsonl", "a/../../out", "a\\..\\out", "C:out", "a\nb", "n" * 2000]
)
def test_nothing_is_written_outside(tmp_path: Path, pack: Pack, name: str) -> None:
    refused(pack(tmp_path, {name: b"x"}), tmp_path / "cache", "outside its folder, or has an odd name")
    assert not (tmp_path / "out.jsonl").exists()


@both
def test_a_name_twice_and_a_file_that_is_a_folder(tmp_path: Path, pack: Pack) -> None:
    refused(pack(tmp_path, {"a": b"x", "a*": b"y"}), tmp_path / "cache", "stands twice")
    refused(pack(tmp_path, {"a": b"x", "a/b": b"y"}), tmp_path / "cache", "a file and a folder at once")


@both
@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (ArchiveLimits(files=2), "holds more than 2 files"),
        (ArchiveLimits(file_bytes=9), "has more than 9 bytes"),
        (ArchiveLimits(total_bytes=20), "becomes more than 20 bytes"),
    ],
)
def test_limits(tmp_path: Path, pack: Pack, limits: ArchiveLimits, text: str) -> None:
    files = {f"{i}.txt": b"x" * 8 for i in range(3)} | {"long.txt": b"x" * 10}
    unpack(pack(tmp_path, files), tmp_path / "good", ArchiveLimits(4, 10, 34))
    refused(pack(tmp_path, files), tmp_path / "cache", text, limits)


@both
def test_a_bomb_is_noticed_before_the_disk_is_full(tmp_path: Path, pack: Pack) -> None:
    path = pack(tmp_path, {"train.jsonl": bytes(40 << 20)})
    refused(path, tmp_path / "cache", "more than 200 times its size, as a decompression bomb")


def test_a_zip_that_lies_about_its_size(tmp_path: Path) -> None:
    """The directory says 10 bytes; more than that are in it."""
    path = as_zip(tmp_path, {"train.jsonl": b"x" * 5000})
    data = path.read_bytes().replace((5000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    path.write_bytes(data)
    refused(path, tmp_path / "cache", "is no whole archive")


def test_a_tar_whose_names_are_a_bomb(tmp_path: Path) -> None:
    """A header of attributes is read at once; one of 8 MiB packs into a few KiB."""
    path = tmp_path / "data.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a")
        member.pax_headers = {"comment": "x" * (8 << 20)}
        archive.addfile(member)
    refused(path, tmp_path / "cache", "a header of 8,389,120 bytes")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (tarfile.SYMTYPE, "is a link"),
        (tarfile.LNKTYPE, "is a link"),
        (tarfile.CHRTYPE, "is a device"),
        (tarfile.FIFOTYPE, "is a device"),
    ],
)
def test_a_tar_holds_plain_files_only(tmp_path: Path, kind: bytes, text: str) -> None:
    path = tmp_path / "data.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("train.jsonl")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    refused(path, tmp_path / "cache", text)


def test_a_zip_holds_plain_files_only(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    for mode, text in ((0o120777, "is a link"), (0o020666, "is a device")):
        info = zipfile.ZipInfo("train.jsonl")
        info.external_attr = mode << 16
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(info, "/etc/passwd")
        refused(path, tmp_path / "cache", text)


def test_an_encrypted_zip(tmp_path: Path) -> None:
    path = as_zip(tmp_path, {"train.jsonl": b"x"})
    data = bytearray(path.read_bytes())
    for magic, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + at] |= 1
    path.write_bytes(data)
    refused(path, tmp_path / "cache", "is encrypted")


@both
def test_a_torn_archive(tmp_path: Path, pack: Pack) -> None:
    path = pack(tmp_path, {"a.jsonl": bytes(range(256)) * 200})
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, tmp_path / "cache", "is no whole archive|is no zip and no tar")


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("data.zip", b"PK\x03\x04 nothing", "is no zip and no tar"),
        ("data.jsonl.gz", None, "is packed by gzip, but holds no tar"),
        ("data.tar.zst", b"\x28\xb5\x2f\xfd....", "zstd is read from Python 3.14 on|whole archive|no tar"),
    ],
)
def test_what_is_no_archive_says_so(tmp_path: Path, name: str, data: bytes | None, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(LINE) if data is None else data)
    refused(path, tmp_path / "cache", text)
