import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile

from okavango.modalities.content import Limits
from okavango.modalities.sound import RATE, decode_sound, sound_samples, sound_seconds
from okavango.modalities.sound_files import mp3_frame
from okavango.platform.errors import MediaError

FORMS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "vorbis": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
WAV_KINDS = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
RATES = (8_000, 11_025, 16_000, 22_050, 44_100, 48_000)
OPUS_RATES = (8_000, 16_000, 48_000)
EVERY_RATE = [(form, rate) for form in FORMS for rate in (OPUS_RATES if form == "opus" else RATES)]


def sine(seconds: float, rate: int, channels: int = 1, hertz: float = 440) -> np.ndarray:
    """[F, K], the first channel loudest, so that leaving one out shows."""
    wave = 0.4 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.stack([wave / (1 + channel) for channel in range(channels)], axis=1)


def encoded(samples: np.ndarray, rate: int, form: str = "wav", subtype: str | None = None) -> bytes:
    buffer = BytesIO()
    container, codec = FORMS[form]
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype or codec)
    return buffer.getvalue()


def wav(sound: bytes, *, bits: int = 16, rate: int = 16_000, channels: int = 1, **other: int) -> bytes:
    """A WAV file as its arguments say; `codec`, `block` (bytes a frame) and `size` (of the sound) may lie."""
    block = other.get("block", channels * bits // 8)
    form = struct.pack("<HHIIHH", other.get("codec", 1), channels, rate, rate * block % 2**32, block, bits)
    chunks = (
        b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", other.get("size", len(sound)))
    )
    return b"RIFF" + struct.pack("<I", 4 + len(chunks) + len(sound)) + b"WAVE" + chunks + sound


def mp3_frames(data: bytes) -> list[bytes]:
    frames, at = [], 0
    while frame := mp3_frame(data, at):
        frames.append(data[at : at + frame.size])
        at += frame.size
    return frames


def without_length(flac: bytes) -> bytes:
    """As a program writes it that streams."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


def loudness(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(samples**2)))


@pytest.mark.parametrize(("form", "rate"), EVERY_RATE)
@pytest.mark.parametrize("seconds", [0.002, 0.3337, 2.5])
def test_a_sound_keeps_its_wave_and_its_length_is_known_beforehand(
    form: str, rate: int, seconds: float
) -> None:
    wave = sine(seconds, rate)
    data = encoded(wave, rate, form)
    found = decode_sound(data)
    assert (found.dtype, found.ndim) == (np.float32, 1)
    assert len(found) == sound_samples(data) == -(-len(wave) * RATE // rate)
    assert sound_seconds(data) == len(found) / RATE
    if seconds > 0.1:
        middle = slice(800, len(found) - 800)  # what is resampled rings at the ends, and codecs fade in
        near = {"wav": 0.002, "flac": 0.002}.get(form, 0.08)
        assert np.abs(found - sine(len(found) / RATE, RATE)[:, 0])[middle].max() < near


@pytest.mark.parametrize("form", FORMS)
def test_channels_are_averaged(form: str) -> None:
    found = decode_sound(encoded(sine(1, 48_000, 2), 48_000, form))
    assert np.abs(found - 0.75 * sine(1, RATE)[:, 0])[800:-800].max() < 0.03


@pytest.mark.parametrize("subtype", WAV_KINDS)
def test_every_kind_of_wav_is_the_same_sound(subtype: str) -> None:
    wave = sine(0.5, RATE)
    found = decode_sound(encoded(wave, RATE, subtype=subtype))
    assert np.abs(found - wave[:, 0]).max() < 0.03


def test_a_tone_above_what_16_khz_can_hold_is_filtered_and_does_not_fold_down() -> None:
    found = decode_sound(encoded(sine(1, 48_000, hertz=10_000), 48_000))
    assert loudness(found[800:-800]) < 1e-3


@pytest.mark.parametrize("rate", [4_000, 384_000])
def test_rates_at_both_ends_are_resampled(rate: int) -> None:
    found = decode_sound(encoded(sine(0.5, rate), rate))
    assert np.abs(found - sine(0.5, RATE)[:, 0])[800:-800].max() < 0.005


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "empty"),
        (b"\0", "not a WAV"),
        (b"hello, this is no sound", "not a WAV"),
        (b"ID3\x04\0\0\0\0\0\x05hello", "ID3 tag is longer"),
        (b"\xff\xfb\x90\x64", "not whole"),
        (wav(b""), "no samples|has no sound"),
        (wav(bytes(3200), channels=0, block=2), "0 channels"),
        (wav(bytes(3200), channels=0), "damaged|channels"),
        (wav(bytes(3200), channels=9), "9 channels, over the limit of 8"),
        (wav(bytes(3200), channels=8, rate=48_001), "8 channels at 48,001 Hz, over the limit of 384,000"),
        (wav(bytes(3200), rate=0), "damaged|0 Hz"),
        (wav(bytes(3200), rate=3_999), "3,999 Hz"),
        (wav(bytes(3200), rate=384_001), "384,001 Hz"),
        (wav(bytes(3200), rate=0xFFFFFFFF), "damaged|Hz"),
        (wav(bytes(3200), bits=8, block=2), "8 bits and 1 channels, and 2 bytes"),
        (wav(bytes(3200), codec=2), "encoding 2 is not supported"),
        (wav(bytes(3200), codec=0x55), "encoding 85 is not supported"),
        (wav(bytes(3200), size=3201), "promises 3,201 bytes of sound and has 3,200"),
        (wav(bytes(3200))[:36], "has no sound"),
        (wav(bytes(3200))[:20], "has no sound|damaged"),
        (encoded(sine(0.1, 8_000), 8_000).replace(b"RIFF", b"RIFX"), "not a WAV"),
    ],
)
def test_what_is_no_sound_is_refused(data: bytes, text: str) -> None:
    for function in (decode_sound, sound_samples):
        with pytest.raises(MediaError, match=text):
            function(data)


@pytest.mark.parametrize("container", ["AIFF", "AU", "CAF", "W64", "RF64"])
def test_other_containers_are_refused_before_libsndfile_sees_them(container: str) -> None:
    buffer = BytesIO()
    soundfile.write(buffer, sine(0.1, 8_000), 8_000, format=container, subtype="PCM_16")
    with pytest.raises(MediaError, match=r"not a WAV.*send WAV, MP3"):
        decode_sound(buffer.getvalue())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(value: float) -> None:
    wave = sine(0.5, 44_100).astype(np.float32)
    wave[9_000] = value
    with pytest.raises(MediaError, match="no numbers"):
        decode_sound(encoded(wave, 44_100, subtype="FLOAT"))


def test_integers_stored_as_floats_are_refused_and_a_little_beyond_full_scale_is_not() -> None:
    wave = sine(0.5, RATE)
    with pytest.raises(MediaError, match=r"reaches 1.311e\+04 where full scale is 1"):
        decode_sound(encoded(wave * 32768, RATE, subtype="FLOAT"))
    assert np.abs(decode_sound(encoded(wave * 4, RATE, subtype="FLOAT"))).max() == pytest.approx(
        1.6, abs=0.01
    )


def test_16_bits_in_a_wav_that_says_8_are_refused_and_real_8_bits_are_not() -> None:
    noise = np.random.default_rng(0).standard_normal(16_000) * 0.1
    words = (noise * 32767).astype("<i2").tobytes()
    with pytest.raises(MediaError, match="says 8 bits, and holds samples of 16"):
        decode_sound(wav(words, bits=8))
    assert loudness(decode_sound(wav(words))) == pytest.approx(0.1, abs=0.01)
    for level in (0.01, 0.3, 10):
        true = np.clip(noise / 0.1 * level * 128 + 128, 0, 255).astype(np.uint8).tobytes()
        assert len(decode_sound(wav(true, bits=8))) == 16_000


@pytest.mark.parametrize("size", [0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_a_wav_that_was_streamed_is_taken_to_its_end(size: int) -> None:
    assert len(decode_sound(wav(bytes(3200), size=size))) == 1600


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
def test_truncated_sounds_are_refused(form: str, share: float) -> None:
    data = encoded(sine(2, 48_000), 48_000, form)
    with pytest.raises(MediaError, match=r"truncated or damaged|header"):
        decode_sound(data[: int(len(data) * share)])


def test_an_mp3_that_is_cut_between_frames_is_refused_by_what_it_promises() -> None:
    frames = mp3_frames(encoded(sine(2, 44_100), 44_100, "mp3"))
    with pytest.raises(MediaError, match=rf"promises {len(frames) - 1} MP3 frames and has {len(frames) - 3}"):
        sound_samples(b"".join(frames[:-2]))


def test_an_mp3_without_a_length_is_heard_to_its_end() -> None:
    """libsndfile guesses from the first frame's size, and stops there without a word."""
    quiet, loud = sine(1, 44_100) / 100, np.random.default_rng(0).standard_normal((88_200, 1)) / 5
    whole = encoded(np.concatenate([quiet, quiet, loud]), 44_100, "mp3")
    frames = mp3_frames(whole)[1:]
    bare = b"".join(frames)
    assert soundfile.info(BytesIO(bare)).frames != 1152 * len(frames)
    found = decode_sound(bare)
    heard = 1152 * len(frames) - 529  # less the decoder's delay
    assert len(found) == sound_samples(bare) == -(-heard * RATE // 44_100)
    assert loudness(found[-16_000:]) > 0.1


def test_mp3s_one_after_another_are_all_heard() -> None:
    data = encoded(sine(1, 44_100), 44_100, "mp3")
    found = decode_sound(data + data)
    assert len(found) > 32_000
    assert loudness(found[-12_000:-4_000]) == pytest.approx(loudness(found[4_000:12_000]), rel=0.02)


def test_an_mp3_that_changes_its_rate_or_breaks_off_is_refused() -> None:
    first, other = encoded(sine(1, 44_100), 44_100, "mp3"), encoded(sine(1, 22_050), 22_050, "mp3")
    with pytest.raises(MediaError, match=f"changes its sampling rate or channels at byte {len(first):,}"):
        decode_sound(first + other)
    frames = mp3_frames(first)
    with pytest.raises(MediaError, match="no frame at byte"):
        decode_sound(b"".join(frames[:9]) + b"what is this" + b"".join(frames[9:]))


def test_tags_around_an_mp3_change_nothing() -> None:
    data = encoded(sine(1, 44_100), 44_100, "mp3")
    picture = b"ID3\x04\0\0" + bytes([0, 6, 0x1A, 0]) + b"\xff\xfb" * (((6 << 14) + (0x1A << 7)) // 2)
    tagged = picture + bytes(100) + data + b"TAG" + b"x" * 125
    assert np.array_equal(decode_sound(tagged), decode_sound(data))


@pytest.mark.parametrize(("claimed", "text"), [(10**8, "promises"), (3, None)])
def test_an_mp3_whose_header_lies_is_refused_or_heard_whole(claimed: int, text: str | None) -> None:
    data = encoded(sine(2, 44_100), 44_100, "mp3")
    at = max(data.find(b"Xing"), data.find(b"Info")) + 8
    lying = data[:at] + claimed.to_bytes(4) + data[at + 4 :]
    if text is None:
        assert abs(len(decode_sound(lying)) - 32_000) < 3 * 1152
    else:
        with pytest.raises(MediaError, match=text):
            sound_samples(lying)


def test_a_flac_that_was_streamed_has_its_length_counted() -> None:
    data = encoded(sine(3, 44_100), 44_100, "flac")
    assert sound_samples(without_length(data)) == 48_000
    assert np.array_equal(decode_sound(without_length(data)), decode_sound(data))


@pytest.mark.parametrize("frames", [1, 44_099, 44_101, 100_000])
def test_a_flac_whose_header_lies_is_refused(frames: int) -> None:
    data = encoded(sine(1, 44_100), 44_100, "flac")
    lying = data[:22] + frames.to_bytes(4) + data[26:]
    with pytest.raises(MediaError, match=r"truncated or damaged: it promises \d\.\d\d s and has"):
        decode_sound(lying)


def test_ogg_streams_one_after_another_or_of_another_kind_are_refused() -> None:
    """libsndfile plays the first and leaves out the rest."""
    first, second = (encoded(sine(1, 48_000), 48_000, form) for form in ("vorbis", "opus"))
    for data in (first + first, first + second):
        with pytest.raises(MediaError, match="several streams"):
            sound_samples(data)
    with pytest.raises(MediaError, match="neither Vorbis nor Opus"):
        sound_samples(first.replace(b"\x01vorbis", b"\x01theora"))


@pytest.mark.parametrize("form", FORMS)
def test_what_lasts_too_long_is_refused_by_its_header(form: str) -> None:
    data = encoded(sine(2.5, 8_000), 8_000, form)
    for function in (decode_sound, sound_samples):
        with pytest.raises(MediaError, match=r"lasts 2\.5 s, over the limit of 2 s \(cut it into pieces\)"):
            function(data, Limits(audio_seconds=2))
    assert len(decode_sound(data, Limits(audio_seconds=2.5))) == 40_000


def test_an_hour_is_refused_by_the_limit_whatever_its_bytes_may_be() -> None:
    hour = wav(bytes(3600 * 8_000), bits=8, rate=8_000)
    with pytest.raises(MediaError, match="28,800,044 bytes, over the limit of 20,971,520"):
        decode_sound(hour)
    with pytest.raises(MediaError, match=r"lasts 3,600\.0 s, over the limit of 600 s"):
        decode_sound(hour, Limits(media_bytes=1 << 30))


def test_hours_of_silence_in_few_bytes_are_refused_in_little_memory() -> None:
    bomb = encoded(np.zeros((2 * 3600 * 48_000, 1), np.int16), 48_000, "flac")
    assert len(bomb) < 2_000_000
    for data in (bomb, without_length(bomb)):
        for function in (decode_sound, sound_samples):
            tracemalloc.start()
            with pytest.raises(MediaError, match="over the limit of 600 s"):
                function(data)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 64 << 20  # 600 s of samples are 37 MiB


def flipped(data: bytes, luck: random.Random) -> bytes:
    changed, reach = bytearray(data), luck.choice([64, 400, len(data)])
    for _ in range(luck.choice([1, 2, 20])):
        changed[luck.randrange(min(reach, len(data)))] = luck.choice([0, 255, luck.randrange(256)])
    return bytes(changed)


def cut(data: bytes, luck: random.Random) -> bytes:
    return data[: luck.randrange(len(data))]


def without_a_piece(data: bytes, luck: random.Random) -> bytes:
    at = luck.randrange(len(data))
    return data[:at] + data[at + luck.randrange(300) :]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", [flipped, cut, without_a_piece])
def test_damage_gives_samples_or_a_media_error(
    form: str, damage: Callable[[bytes, random.Random], bytes]
) -> None:
    luck = random.Random(0)
    whole = [encoded(sine(0.3, rate, channels), rate, form) for rate, channels in ((8_000, 1), (48_000, 2))]
    refused = 0
    for _ in range(150):
        data = damage(luck.choice(whole), luck)
        try:
            found = decode_sound(data)
        except MediaError:
            refused += 1
        else:
            assert len(found) == sound_samples(data)
            assert np.isfinite(found).all()
    assert refused > 10


def test_decoding_needs_no_model_library_and_importing_it_no_library_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.flac").write_bytes(encoded(sine(0.5, 44_100), 44_100, "flac"))
    code = (
        "import sys, pathlib; from okavango.modalities.sound import decode_sound;"
        "print({'numpy', 'soundfile', 'soxr'} & set(sys.modules));"
        "decode_sound(pathlib.Path(sys.argv[1]).read_bytes());"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "a.flac")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "set()\nset()\n"
