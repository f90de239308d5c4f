"""Sentences, and voices that say them: what stage one learns to hear from, beside recordings."""

from __future__ import annotations

import io
import random
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr

from okavango.modalities.sound import RATE
from okavango.training.scores import spoken as normal

_FORTUNES = Path("/usr/share/games/fortunes")
_BOOKS = (
    "fortunes",
    "wisdom",
    "work",
    "food",
    "love",
    "science",
    "literature",
    "pets",
    "people",
    "education",
    "sports",
)
_SENTENCE = re.compile(r"[A-Z][A-Za-z ,'-]{8,70}[.!?]")
_LONGEST_SECONDS = 6.0
# (program, voice): flite's are recorded people's, espeak-ng's are formants of many kinds
VOICES = [("flite", voice) for voice in ("slt", "rms", "awb", "kal16")] * 3 + [
    ("espeak-ng", f"{accent}+{kind}")
    for accent in ("en-us", "en-gb", "en-gb-x-rp")
    for kind in ("m1", "m3", "m7", "f1", "f2", "f4")
]


def sentences(count: int, seed: int, captions: Iterable[str]) -> list[str]:
    """So many different texts: sentences of fortunes, captions, and numbers, in a fixed order."""
    chance = random.Random(f"sentences {seed}")
    found = {
        " ".join(match.split()) for book in _BOOKS for match in _SENTENCE.findall(_read(_FORTUNES / book))
    }
    found |= set(captions)
    found |= {" ".join(chance.choices(_NUMBERS, k=chance.randint(1, 6))) for _ in range(count // 10)}
    said = sorted(text for text in found if 1 <= len(text.split()) <= 14)
    chance.shuffle(said)
    return said[:count]


def say_all(texts: Iterable[str], seed: int) -> Iterator[tuple[str, str, bytes]]:
    """(name, words, FLAC at 16 kHz) of each text that is said in six seconds, in a voice drawn for it."""
    with ThreadPoolExecutor(2) as threads:
        for name, text, data in threads.map(lambda item: _say(*item, seed), enumerate(texts)):
            if data is not None:
                yield name, normal(text), data


def _say(index: int, text: str, seed: int) -> tuple[str, str, bytes | None]:
    chance = random.Random(f"voice {seed} {text}")
    program, voice = chance.choice(VOICES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "said.wav"
        if program == "flite":
            stretch = ["--setf", f"duration_stretch={chance.uniform(0.85, 1.25):.2f}"]
            command = ["flite", "-voice", voice, *stretch, "-t", text, "-o", str(path)]
        else:
            manner = ["-s", str(chance.randint(130, 190)), "-p", str(chance.randint(30, 70))]
            command = ["espeak-ng", "-v", voice, *manner, "-w", str(path), text]
        subprocess.run(command, check=True, capture_output=True)
        samples, rate = soundfile.read(path, dtype="float32")
    if not len(samples) or len(samples) > _LONGEST_SECONDS * rate:
        return "", text, None
    altered = _alter(soxr.resample(samples, rate, RATE), chance)
    buffer = io.BytesIO()
    soundfile.write(buffer, altered, RATE, format="FLAC", subtype="PCM_16")
    return f"{index:05}", text, buffer.getvalue()


def _alter(samples: np.ndarray, chance: random.Random) -> np.ndarray:
    """Now and then through a telephone, with some noise, louder or softer."""
    if chance.random() < 0.4:
        samples = soxr.resample(soxr.resample(samples, RATE, 8000), 8000, RATE)
    noise = np.random.default_rng(chance.getrandbits(32)).standard_normal(len(samples)).astype(np.float32)
    samples = samples / max(1e-4, float(np.abs(samples).max())) * chance.uniform(0.2, 0.9)
    return np.clip(samples + noise * 10 ** chance.uniform(-4, -2.2), -1, 1)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").replace("\n", " ")


_NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "twenty",
    "thirty",
    "hundred",
]
