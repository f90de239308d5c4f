"""The speech example: recorded telephone prompts with what is said in them, split by sentence.

They are Debian's package asterisk-core-sounds-en-wav, one voice at 8 kHz, and the list of texts that its
companion asterisk-core-sounds-en documents them with. That list was written for people who program telephone
systems: it is inconsistent in case and numbers, and describes noises in brackets. Here it becomes words in
lower case, as they are heard; a prompt whose words the text does not tell is left out.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from okavango.modalities.sound import sound_seconds
from okavango.platform.errors import MediaError, NotFoundError
from okavango.training.examples import (
    README,
    Choice,
    Source,
    Written,
    split_of,
    stable_hash,
    write_rows,
    write_whole,
)
from okavango.training.scores import spoken

QUESTIONS = (
    "Write down what is said.",
    "What is said here?",
    "Transcribe this recording.",
    "What does the voice say?",
    "Write the words of this prompt.",
)
MOST_SECONDS = 30.0  # the window of Whisper's encoders; three are longer
_SOURCE = Source("asterisk-core-sounds-en-wav", "prompts", "sounds/**/*.wav")
_DOCUMENT = "core-sounds-en.txt"
# As the packages install them below /, and as the recordings' own archive unpacks.
_TEXTS = (_DOCUMENT, f"{_DOCUMENT}.gz", f"usr/share/doc/asterisk-core-sounds-en/{_DOCUMENT}.gz")
_SOUNDS = ("", "usr/share/asterisk/sounds/en_US_f_Allison")
_PACKAGES = "asterisk-core-sounds-en-wav asterisk-core-sounds-en"
_REMEDY = (
    f"on Debian or Ubuntu: sudo apt-get install {_PACKAGES}; or, without root or where documentation is not "
    f"installed: apt-get download {_PACKAGES}, dpkg -x each into one folder, and name that with --source"
)
_NO_SPEECH = re.compile(r"\[.*\]|<.*>|\(.*\)")
_ASIDE = re.compile(r"\[[^]]*\]|\([^)]*\)")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGITS = {str(digit): word for digit, word in enumerate(_NUMBERS)}
_SIGNS = {"*": " star ", "#": " pound "}
# Misspelt in the list; and words that it also writes without the hyphen.
_SPELT = {
    "represenatives": "representatives",
    "umute": "unmute",
    "witheld": "withheld",
    "fourtieth": "fortieth",
    "exclaimation-point": "exclamation point",
    "thru": "through",
    "re-record": "rerecord",
    "re-enter": "reenter",
    "de-activated": "deactivated",
    "un-indentified": "unidentified",
}
_WORD = re.compile(r"[\w'-]+")
_README = """# Recorded telephone prompts with their words

{total:,} recordings at 8 kHz, {seconds:,.0f} s in all, split so that no sentence is in two files.
Recordings and texts: © 2003-2010 Allison Smith, with financial contributions by Digium, Inc.; licensed under
CC-BY-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/), the recordings unchanged from Debian's package
asterisk-core-sounds-en-wav. The texts are changed: in lower case, without punctuation, digits as words,
misspellings corrected.

{skipped} prompts are not in:

{reasons}
"""


@dataclass(frozen=True)
class Prompt:
    """`key`: its file's name in the package, without the ending. `words`: what is said."""

    key: str
    words: str
    path: Path
    seconds: float

    @property
    def split(self) -> str:
        """By the words: the same sentence is recorded up to three times."""
        return split_of(self.words)

    @property
    def question(self) -> str:
        return QUESTIONS[stable_hash("question", self.key) % len(QUESTIONS)]


def write_prompts(
    folder: Path, choice: Choice | None = None, *, source: Path = Path("/"), force: bool = False
) -> Written:
    """Write sounds and JSONL files into `folder`. A folder without `dataset.json` is not whole.

    Args:
        source: where the packages lie unpacked: `/` as Debian installs them.
        force: replace what has the same names in the folder, and leave the rest.

    Raises:
        ConflictError: the folder holds something else.
        NotFoundError: the packages are not there.
        MediaError: a recording is damaged.
    """
    choice = choice or Choice()
    return write_whole(folder, _SOURCE, choice, lambda draft: _fill(draft, source, choice), force=force)


def list_prompts(source: Path) -> tuple[list[Prompt], Counter[str]]:
    """The prompts whose words are known, and how many others there are by reason.

    Raises:
        NotFoundError, MediaError: as write_prompts.
    """
    texts = dict(_texts(_first(source, _TEXTS, "").read_bytes()))
    sounds = _first(source, _SOUNDS, f"{next(iter(texts), 'activated')}.wav")
    prompts, left_out = [], Counter[str]()
    for key, text in texts.items():
        found = _prompt(sounds / f"{key}.wav", key, text)
        if isinstance(found, Prompt):
            prompts.append(found)
        else:
            left_out[found] += 1
    return prompts, left_out


def words_of(text: str) -> str | None:
    """What is said by a line of the list; None if it does not tell.

    Letters and digits stuck together, and numbers of several digits, may be said in several ways.
    """
    if _NO_SPEECH.fullmatch(text):
        return None
    text = _WORD.sub(lambda word: _SPELT.get(word[0].lower(), word[0]), _ASIDE.sub(" ", text))
    text = "".join(_SIGNS.get(char, char) for char in text)
    words = [_DIGITS.get(word, word) for word in spoken(re.sub(r"(?<=\w)\.(?=\w)", "", text)).split()]
    return None if any(re.search(r"\d", word) for word in words) else " ".join(words) or None


def _texts(document: bytes) -> Iterator[tuple[str, str]]:
    if document[:2] == b"\x1f\x8b":
        document = gzip.decompress(document)
    for line in document.decode().splitlines():
        key, colon, text = line.partition(":")
        if colon and not line.startswith(";"):
            yield key.strip(), text.strip()


def _first(source: Path, places: tuple[str, ...], inside: str) -> Path:
    found = next((source / place for place in places if (source / place / inside).exists()), None)
    if found is None:
        what = inside or _DOCUMENT
        raise NotFoundError(f"the recorded prompts ({what}) are not there", where=str(source), remedy=_REMEDY)
    return found


def _prompt(path: Path, key: str, text: str) -> Prompt | str:
    """A prompt, or why it is none."""
    if not path.is_file():
        return "without a recording"
    if _NO_SPEECH.fullmatch(text):
        return "without speech"
    words = words_of(text)
    if words is None:
        return "with numbers or names that can be said in several ways"
    try:
        seconds = sound_seconds(path.read_bytes())
    except MediaError as error:
        raise MediaError(error.message, where=str(path), remedy=error.remedy) from error
    return Prompt(key, words, path, seconds) if seconds <= MOST_SECONDS else f"over {MOST_SECONDS:g} s"


def _fill(folder: Path, source: Path, choice: Choice) -> Written:
    prompts, left_out = list_prompts(source)
    prompts = choice.of(prompts, lambda each: each.key)
    for each in prompts:
        copy = folder / _sound(each)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(each.path.read_bytes())
    written = Written(write_rows(((each.split, _row(each)) for each in prompts), folder), left_out.total())
    about = {"total": len(prompts), "seconds": sum(each.seconds for each in prompts)}
    reasons = "\n".join(f"- {count} {reason}" for reason, count in sorted(left_out.items()))
    readme = _README.format(**about, skipped=left_out.total(), reasons=reasons)
    (folder / README).write_text(readme, encoding="utf-8")
    return written


def _sound(prompt: Prompt) -> str:
    return f"sounds/{prompt.key}.wav"


def _row(prompt: Prompt) -> dict[str, object]:
    sound = {"type": "input_audio", "input_audio": {"data": _sound(prompt), "format": "wav"}}
    user = {"role": "user", "content": [sound, {"type": "text", "text": prompt.question}]}
    return {"messages": [user, {"role": "assistant", "content": prompt.words}]}
