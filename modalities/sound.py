"""Sounds: bytes → samples at 16 kHz.

Decoding is strict about what it accepts, since the bytes come from strangers: lengths are checked before
anything is decompressed, and again while it is, block by block. The length that a header gives is exactly
that of what is decoded, or nothing is, so that a prompt can be laid out before. Libraries are imported only
when they are used: the engine serves text without them, and decoding needs no torch.
"""

# Shapes: F frames at the file's own rate, K channels, S samples at RATE

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING

from okavango.modalities.content import Limits
from okavango.modalities.sound_files import REMEDY, SoundBytes, check_whole, cut_off
from okavango.platform.errors import MediaError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from soundfile import SoundFile

RATE = 16_000  # Hz
LEAST_RATE, MOST_RATE = 4_000, 384_000
MOST_CHANNELS = 8
MOST_A_SECOND = 384_000  # numbers: silence of many channels is few bytes, and takes long to decode
_BLOCK = 1 << 16  # numbers that are decoded at a time
# Full scale is 1. Lossy decoders overshoot a little; integers that were stored as floats, by far.
_LOUDEST = 16.0
_ENCODINGS = {
    "WAV": ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"),
    "FLAC": ("PCM_S8", "PCM_16", "PCM_24"),
    "OGG": ("VORBIS", "OPUS"),
    "MP3": ("MPEG_LAYER_III",),
}


def decode_sound(data: bytes, limits: Limits | None = None) -> NDArray[np.float32]:
    """The sound in `data` as samples [S] at 16 kHz, full scale 1: channels averaged, `sound_samples` of them.

    Raises:
        MediaError: empty, over a limit, of another format, truncated or damaged, or holds no numbers.
    """
    import numpy as np

    limits = limits or Limits()
    found = _check(data, limits)
    with _opened(found, limits) as file:
        pieces = list(_resampled(_blocks(file, _promised(found, file), limits), file.samplerate))
    return np.concatenate(pieces)


def sound_samples(data: bytes, limits: Limits | None = None) -> int:
    """How many samples decode_sound gives, if it gives any: by the header alone, save for a FLAC file that
    was streamed and says no length, which is decoded.

    Raises:
        MediaError: the header is not accepted.
    """
    limits = limits or Limits()
    found = _check(data, limits)
    with _opened(found, limits) as file:
        frames = _promised(found, file)
        if frames is None:
            frames = sum(len(block) for block in _blocks(file, None, limits))
        return _samples_of(frames, file.samplerate)


def sound_seconds(data: bytes, limits: Limits | None = None) -> float:
    """`sound_samples` in seconds. Raises MediaError."""
    return sound_samples(data, limits) / RATE


def _samples_of(frames: int, rate: int) -> int:
    return -(-frames * RATE // rate)


def _check(data: bytes, limits: Limits) -> SoundBytes:
    if not data:
        raise MediaError("the sound is empty (0 bytes)")
    if len(data) > limits.media_bytes:
        raise MediaError(
            f"the sound has {len(data):,} bytes, over the limit of {limits.media_bytes:,}",
            remedy="send a shorter or more strongly compressed one",
        )
    return check_whole(data)


@contextmanager
def _opened(found: SoundBytes, limits: Limits) -> Iterator[SoundFile]:
    """Raises MediaError for what libsndfile or this module does not accept, now or while it is read."""
    from soundfile import LibsndfileError, SoundFile

    class Stream(SoundFile):
        def seekable(self) -> bool:
            """No: soundfile would seek after each read, to where it is, which changes what MP3 decodes to."""
            return False

    try:
        with Stream(BytesIO(found.data)) as file:
            _check_form(file, found.kind)
            _check_length(_promised(found, file), file.samplerate, limits)
            yield file
    except LibsndfileError as error:
        reason = error.error_string.rstrip(".")
        raise MediaError(f"the {found.kind} file is truncated or damaged: {reason}") from error


def _check_form(file: SoundFile, kind: str) -> None:
    form = "WAV" if file.format == "WAVEX" else file.format
    if form != kind or file.subtype not in _ENCODINGS[kind]:
        raise MediaError(f"the {kind} file's encoding {file.subtype} is not supported", remedy=REMEDY)
    if not 1 <= file.channels <= MOST_CHANNELS:
        raise MediaError(
            f"the sound has {file.channels} channels, over the limit of {MOST_CHANNELS}",
            remedy="mix them down",
        )
    if not LEAST_RATE <= file.samplerate <= MOST_RATE:
        raise MediaError(
            f"the sound is sampled at {file.samplerate:,} Hz, not at {LEAST_RATE:,} to {MOST_RATE:,}",
            remedy=f"resample it, best to {RATE:,} Hz",
        )
    if file.channels * file.samplerate > MOST_A_SECOND:
        raise MediaError(
            f"the sound has {file.channels} channels at {file.samplerate:,} Hz, over the limit of "
            f"{MOST_A_SECOND:,} samples a second",
            remedy="mix them down",
        )


def _promised(found: SoundBytes, file: SoundFile) -> int | None:
    """Frames by the file's header; None if it does not say."""
    return found.promised if found.kind == "FLAC" else file.frames


def _check_length(frames: int | None, rate: int, limits: Limits) -> None:
    if frames == 0:
        raise MediaError("the sound holds no samples")
    if frames is not None and frames > limits.audio_seconds * rate:
        raise MediaError(
            f"the sound lasts {frames / rate:,.1f} s, over the limit of {limits.audio_seconds:,g} s",
            remedy="cut it into pieces",
        )


def _blocks(file: SoundFile, promised: int | None, limits: Limits) -> Iterator[NDArray[np.float32]]:
    """Channels averaged, [F] a block. Raises MediaError, at the end if there are not `promised` frames."""
    done = 0
    while len(block := file.read(_BLOCK // file.channels, dtype="float32", always_2d=True)):
        done += len(block)
        if promised is None:
            _check_length(done, file.samplerate, limits)
        elif done > promised:
            break
        yield _averaged(block)
    if promised is None:
        _check_length(done, file.samplerate, limits)
    elif done != promised:
        has = "more" if done > promised else f"{done / file.samplerate:,.2f} s"
        raise cut_off(f"it promises {promised / file.samplerate:,.2f} s and has {has}")


def _averaged(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """[F, K] → [F]. Raises MediaError for what is no number, or far beyond full scale."""
    import numpy as np

    if not np.isfinite(block).all():
        raise MediaError("the sound holds samples that are infinite or no numbers")
    loudest = float(np.abs(block).max())
    if loudest > _LOUDEST:
        raise MediaError(
            f"the sound reaches {loudest:,.4g} where full scale is 1", remedy="scale its samples to ±1"
        )
    return block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)


def _resampled(blocks: Iterator[NDArray[np.float32]], rate: int) -> Iterator[NDArray[np.float32]]:
    """[F] in blocks → [S] in blocks. soxr's own count may differ by a sample: cut, or filled with zeros."""
    if rate == RATE:
        yield from blocks
        return
    import numpy as np
    import soxr

    stream = soxr.ResampleStream(rate, RATE, 1, dtype="float32")
    frames = given = 0
    for block in blocks:
        frames += len(block)
        piece = stream.resample_chunk(block)[: _samples_of(frames, rate) - given]
        given += len(piece)
        yield piece
    rest = stream.resample_chunk(np.zeros(0, np.float32), last=True)
    missing = _samples_of(frames, rate) - given
    yield np.pad(rest[:missing], (0, max(0, missing - len(rest))))
