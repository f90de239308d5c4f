import gzip
import json
import wave
from pathlib import Path

import pytest
from typer.testing import CliRunner

from okavango.platform.errors import ConflictError, MediaError, NotFoundError
from okavango.training.commands import data
from okavango.training.examples import SPLITS, Choice
from okavango.training.prompts import list_prompts, words_of, write_prompts

SPOKEN = {
    **{f"letters/{chr(code)}": chr(code) for code in range(ord("a"), ord("z") + 1)},
    "auth-thankyou": "Thank you.",
    "privacy-thankyou": "Thank you!",
    "other/thankyou": "...thank you",
    "vm-forward": "Press 1 to enter an extension,  press # to stop",
    "vm-Old": "old",
}
OTHERS = {
    "beep": "[this is a simple beep tone]",
    "confbridge-join": "<beep ascending>",
    "silence/1": "(1 second of silence)",
    "demo-instruct": "dial 500",
    "demo-long": "Too long.",
    "not-recorded": "Not recorded.",
}


def record(path: Path, seconds: float, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(level.to_bytes(2, "little") * round(8000 * seconds))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Laid out as the packages install themselves."""
    texts = SPOKEN | OTHERS
    document = "; Core Sounds\n\n" + "".join(f"{key}: {text}\n" for key, text in texts.items())
    folder = tmp_path / "root/usr/share/doc/asterisk-core-sounds-en"
    folder.mkdir(parents=True)
    (folder / "core-sounds-en.txt.gz").write_bytes(gzip.compress(document.encode()))
    sounds = tmp_path / "root/usr/share/asterisk/sounds/en_US_f_Allison"
    for level, key in enumerate(texts):
        if key != "not-recorded":
            record(sounds / f"{key}.wav", 30.01 if key == "demo-long" else 0.1, level)
    return tmp_path / "root"


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    """By split: sound → words."""
    found: dict[str, dict[str, str]] = {}
    for split in SPLITS:
        rows = [json.loads(line)["messages"] for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        found[split] = {user["content"][0]["input_audio"]["data"]: answer["content"] for user, answer in rows}
        for user, _ in rows:
            sound, text = user["content"]
            assert (sound["type"], sound["input_audio"]["format"], text["type"]) == (
                "input_audio",
                "wav",
                "text",
            )
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dataset_holds_what_is_said_and_says_what_it_leaves_out(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    written = write_prompts(folder, source=source)
    words = {sound: text for rows in rows_of(folder).values() for sound, text in rows.items()}
    assert words.keys() == {f"sounds/{key}.wav" for key in SPOKEN}
    assert words["sounds/vm-forward.wav"] == "press one to enter an extension press pound to stop"
    assert words["sounds/letters/q.wav"] == "q"
    assert (sum(written.rows.values()), written.skipped, written.existed) == (len(SPOKEN), len(OTHERS), False)
    for key in SPOKEN:
        original = source / f"usr/share/asterisk/sounds/en_US_f_Allison/{key}.wav"
        assert (folder / f"sounds/{key}.wav").read_bytes() == original.read_bytes()
    readme = (folder / "README.md").read_text()
    for text in (
        "CC-BY-SA 3.0",
        "Allison Smith",
        f"{len(SPOKEN)} recordings",
        "- 3 without speech",
        "- 1 over 30 s",
    ):
        assert text in readme


def test_no_sentence_is_in_two_splits(source: Path, tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts", source=source)
    rows = rows_of(tmp_path / "prompts")
    texts = [text for split in rows.values() for text in set(split.values())]
    assert len(texts) == len(set(texts))
    thanks = [split for split, found in rows.items() for text in found.values() if text == "thank you"]
    assert thanks == [thanks[0]] * 3
    assert all(rows.values())


def test_the_same_choice_gives_the_same_bytes_and_a_smaller_one_is_part_of_it(
    source: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        write_prompts(tmp_path / name, Choice(12), source=source)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    write_prompts(tmp_path / "less", Choice(5), source=source)
    write_prompts(tmp_path / "other", Choice(12, seed=1), source=source)
    less, more, other = (rows_of(tmp_path / name) for name in ("less", "a", "other"))
    assert sum(map(len, less.values())) == 5
    assert all(less[split].items() <= more[split].items() for split in SPLITS)
    assert more != other


def test_a_whole_dataset_is_left_alone_without_its_source_and_another_is_refused(
    source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "prompts"
    first = write_prompts(folder, source=source)
    again = write_prompts(folder, source=tmp_path / "nothing")
    assert (again.rows, again.existed) == (first.rows, True)
    with pytest.raises(ConflictError, match="another choice of prompts"):
        write_prompts(folder, Choice(3), source=source)
    (folder / "sounds/letters/q.wav").unlink()
    with pytest.raises(ConflictError, match="a changed dataset"):
        write_prompts(folder, source=source)
    (folder / "mine.txt").write_text("mine")
    write_prompts(folder, source=source, force=True)
    assert (folder / "sounds/letters/q.wav").is_file()
    assert (folder / "mine.txt").read_text() == "mine"


def test_what_is_missing_is_named_with_the_command_that_brings_it(source: Path, tmp_path: Path) -> None:
    command = "sudo apt-get install asterisk-core-sounds-en-wav asterisk-core-sounds-en"
    with pytest.raises(NotFoundError, match=command):
        write_prompts(tmp_path / "prompts", source=tmp_path / "nothing")
    (source / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz").unlink()
    with pytest.raises(NotFoundError, match=r"core-sounds-en\.txt\) are not there.*--source"):
        write_prompts(tmp_path / "prompts", source=source)
    assert not (tmp_path / "prompts").exists()


def test_the_recordings_own_archive_does_as_well(source: Path, tmp_path: Path) -> None:
    flat = source / "usr/share/asterisk/sounds/en_US_f_Allison"
    packed = source / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    (flat / "core-sounds-en.txt").write_bytes(gzip.decompress(packed.read_bytes()))
    assert [each.key for each in list_prompts(flat)[0]] == [each.key for each in list_prompts(source)[0]]


def test_a_damaged_recording_is_named(source: Path, tmp_path: Path) -> None:
    path = source / "usr/share/asterisk/sounds/en_US_f_Allison/letters/q.wav"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(MediaError, match=r"q\.wav: the sound is truncated"):
        write_prompts(tmp_path / "prompts", source=source)
    assert not (tmp_path / "prompts").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Please try again.  Goodbye!", "please try again goodbye"),
        ("...to lock, or unlock the conference.", "to lock or unlock the conference"),
        ("I'm sorry, that's not valid", "i'm sorry that's not valid"),
        ('Change to a polite "don\'t call" menu', "change to a polite don't call menu"),
        ("Call-Forward on Busy.", "call forward on busy"),
        ("To re-record it.", "to rerecord it"),
        ("fourtieth", "fortieth"),
        ("exclaimation-point [!]", "exclamation point"),
        ("Un-indentified or witheld", "unidentified or withheld"),
        ("press * or #, or 0", "press star or pound or zero"),
        ("A.M.", "am"),
        ("M I S D N", "m i s d n"),
        ("dash [-]", "dash"),
        ("At the tone. (simple tone sound plays)", "at the tone"),
        ("[sound of monkeys screaming]", None),
        ("<beep decending>", None),
        ("(2 seconds of silence)", None),
        ("H.323", None),
        ("3D audio disabled", None),
        ("dial 500", None),
        ("at least a 28.8 kilobit modem", None),
        ("...", None),
    ],
)
def test_words_are_those_that_are_heard(text: str, words: str | None) -> None:
    assert words_of(text) == words


def test_the_prompts_command_says_what_it_wrote(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    command = ["prompts", str(folder), "--source", str(source), "--limit", "9"]
    first = CliRunner().invoke(data, command)
    assert first.exit_code == 0
    assert first.stdout.startswith(f"Wrote: {folder} (")
    assert "6 prompts were left out" in first.stdout
    again = CliRunner().invoke(data, command)
    assert again.stdout == first.stdout.splitlines()[0].replace("Wrote", "Is there already") + "\n"
    assert CliRunner().invoke(data, command[:-2]).exit_code != 0
