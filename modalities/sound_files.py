"""Sound files: what kind the bytes are, and whether all is there that they promise.

libsndfile decodes them (modalities/sound.py), but it guesses lengths, and does not say what it leaves out: an
MP3 of variable bit rate that carries no length comes back shortened, of chained Ogg streams only the first,
and of a file that was cut what is left. So each kind is walked here first, by its own headers.
"""

# Formats: RFC 9639 (FLAC), RFC 3533 (Ogg), RFC 7845 (Opus in Ogg), ISO/IEC 11172-3 and 13818-3 (MP3)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from okavango.platform.errors import MediaError

Kind = Literal["WAV", "MP3", "FLAC", "OGG"]
REMEDY = "send WAV, MP3, FLAC, or Ogg with Vorbis or Opus"
_INTEGERS, _FLOATS, _A_LAW, _MU_LAW, _EXTENSIBLE = 1, 3, 6, 7, 0xFFFE
_WAV_CODECS = (_INTEGERS, _FLOATS, _A_LAW, _MU_LAW)
# What programs write that cannot go back to the header of a WAV that they stream; no such length is accepted.
_UNKNOWN_LENGTH = 0x7FFF0000
_OGG_CODECS = (b"\x01vorbis", b"OpusHead")
_MP3_KBPS = {
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MP3_TAG_KBPS_INDEX = 5  # a frame that has room for a Xing header at every sampling rate
_MP3_TRAILERS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN")


@dataclass(frozen=True)
class SoundBytes:
    """What libsndfile is given.

    Attributes:
        promised: frames by the file's own header, where `data` says nothing of them, so that all are decoded.
    """

    kind: Kind
    data: bytes
    promised: int | None = None


@dataclass(frozen=True)
class Mp3Frame:
    """`mpeg`: 1, or 2 for MPEG-2 and its extension to lower rates. `size`: in bytes, with the header."""

    mpeg: int
    rate: int
    mono: bool
    size: int

    @property
    def stream(self) -> tuple[int, int, bool]:
        """What may not change from frame to frame."""
        return self.mpeg, self.rate, self.mono

    @property
    def side_bytes(self) -> int:
        if self.mpeg == 1:
            return 17 if self.mono else 32
        return 9 if self.mono else 17


def check_whole(data: bytes) -> SoundBytes:
    """The bytes of one sound of a kind that is accepted, such that libsndfile decodes all of it.

    Raises:
        MediaError: they are of another kind, damaged, or cut off.
    """
    data = _without_id3(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return _wav(data)
    if data[:4] == b"fLaC":
        return _flac(data)
    if data[:4] == b"OggS":
        return _ogg(data)
    data = data.lstrip(b"\0")
    if mp3_frame(data, 0):
        return _mp3(data)
    raise MediaError("not a WAV, MP3, FLAC or Ogg sound, or one whose header is damaged", remedy=REMEDY)


def mp3_frame(data: bytes, at: int) -> Mp3Frame | None:
    """The MP3 frame whose header stands there; None if none does."""
    head = int.from_bytes(data[at : at + 4])
    if len(data) < at + 4 or head >> 21 != 0x7FF or head >> 17 & 3 != 1:  # sync; layer III
        return None
    version, kbps_index, rate_index = head >> 19 & 3, head >> 12 & 15, head >> 10 & 3
    if version == 1 or kbps_index in (0, 15) or rate_index == 3:  # reserved values, and free bit rates
        return None
    mpeg = 1 if version == 3 else 2
    rate = (44100, 48000, 32000)[rate_index] >> (0, 1, 2)[(3, 2, 0).index(version)]
    size = 72_000 * (3 - mpeg) * _MP3_KBPS[mpeg][kbps_index] // rate + (head >> 9 & 1)
    return Mp3Frame(mpeg, rate, head >> 6 & 3 == 3, size)


def _without_id3(data: bytes) -> bytes:
    while data[:3] == b"ID3" and len(data) >= 10:
        footer = 10 if data[5] & 0x10 else 0
        size = sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
        if 10 + size + footer >= len(data):
            raise cut_off("its ID3 tag is longer than the file")
        data = data[10 + size + footer :]
    return data


def _wav(data: bytes) -> SoundBytes:
    form: bytes | None = None
    for name, start, size in _chunks(data):
        if name == b"fmt ":
            form = data[start : start + size]
            _check_wav_form(form)
        elif name == b"data" and form is not None:
            if size < _UNKNOWN_LENGTH and start + size > len(data):
                raise cut_off(f"it promises {size:,} bytes of sound and has {len(data) - start:,}")
            _check_eight_bits(form, data[start : start + min(size, 1 << 20)])
            return SoundBytes("WAV", data)
    raise MediaError("the WAV file has no sound in it, or its header is damaged")


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and size of each chunk, which may be longer than the file."""
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        yield data[at : at + 4], at + 8, size
        at += 8 + size + size % 2


def _check_wav_form(form: bytes) -> None:
    if len(form) < 16:
        raise MediaError("the WAV file's header is damaged")
    codec, channels, _, _, block, bits = (
        int.from_bytes(form[start:end], "little")
        for start, end in ((0, 2), (2, 4), (4, 8), (8, 12), (12, 14), (14, 16))
    )
    if codec == _EXTENSIBLE and len(form) >= 26:
        codec = int.from_bytes(form[24:26], "little")
    if codec not in _WAV_CODECS:
        raise MediaError(
            f"the WAV file's encoding {codec} is not supported", remedy="send integers or floats"
        )
    if block * 8 != channels * bits:
        raise MediaError(
            f"the WAV file says {bits} bits and {channels} channels, and {block} bytes for all of them"
        )


def _check_eight_bits(form: bytes, sound: bytes) -> None:
    """Raises MediaError where samples of 16 bits lie in a file that says one channel of 8.

    Then every second byte is the upper half of a small number with a sign, near 0 or 255: full scale of an
    unsigned byte, which true sounds of 8 bits do not reach half of the time, in every second sample only.
    """
    if form[:4] != b"\x01\x00\x01\x00" or form[14:16] != b"\x08\x00" or len(sound) < 200:
        return
    lower, upper = (_share_at_the_ends(sound[start::2]) for start in (0, 1))
    if upper > 0.5 and upper > lower + 0.2:
        raise MediaError("the WAV file says 8 bits, and holds samples of 16", remedy="correct its header")


def _share_at_the_ends(samples: bytes) -> float:
    ends = bytes((*range(32), *range(224, 256)))
    return 1 - len(samples.translate(None, ends)) / len(samples)


def _flac(data: bytes) -> SoundBytes:
    """With its number of frames blanked, since libsndfile would stop at a wrong one."""
    if len(data) < 42 or data[4] & 0x7F != 0 or data[5:8] != b"\0\0\x22":
        raise MediaError("the FLAC file's header is damaged")
    promised = (data[21] & 15) << 32 | int.from_bytes(data[22:26])
    return SoundBytes("FLAC", data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:], promised or None)


def _ogg(data: bytes) -> SoundBytes:
    """One stream of whole pages: libsndfile would leave out what follows the first."""
    for at, starts_stream in _pages(data):
        if starts_stream and at:
            raise MediaError("the Ogg file holds several streams", remedy="send each on its own")
    if not data.startswith(_OGG_CODECS, 28):
        raise MediaError("the Ogg file holds neither Vorbis nor Opus", remedy=REMEDY)
    return SoundBytes("OGG", data)


def _pages(data: bytes) -> Iterator[tuple[int, bool]]:
    """Where each page starts, and whether a stream starts there. Raises MediaError."""
    at = granule = 0
    while at < len(data):
        table = at + 27
        if data[at : at + 5] != b"OggS\0" or len(data) < table or len(data) < table + data[table - 1]:
            raise cut_off(f"no whole Ogg page starts at byte {at:,}")
        yield at, bool(data[at + 5] & 2)
        reached = int.from_bytes(data[at + 6 : at + 14], "little", signed=True)  # -1: no packet ends here
        if -1 < reached < granule:
            raise MediaError(f"the Ogg page at byte {at:,} goes back in time", remedy="encode it anew")
        granule = max(granule, reached)
        at = table + data[table - 1] + sum(data[table : table + data[table - 1]])
    if at > len(data):
        raise cut_off("its last Ogg page is not whole")


def _mp3(data: bytes) -> SoundBytes:
    """With a header that says how many frames there are, since libsndfile would guess and stop there."""
    first = mp3_frame(data, 0)
    assert first is not None
    count, end = _count_mp3(data, first)
    claimed = _claimed(data, first)
    if claimed is None:
        return SoundBytes("MP3", _xing(data, first, count) + data[:end])
    if claimed > count:  # some programs count the header's own frame, too
        raise cut_off(f"it promises {claimed:,} MP3 frames and has {count - 1:,}")
    if claimed == count - 1:
        return SoundBytes("MP3", data[:end])
    return SoundBytes("MP3", _xing(data, first, count - 1) + data[first.size : end])


def _count_mp3(data: bytes, first: Mp3Frame) -> tuple[int, int]:
    """Frames, and the byte after the last."""
    at = count = 0
    while frame := mp3_frame(data, at):
        if frame.stream != first.stream:
            raise MediaError(
                f"the MP3 file changes its sampling rate or channels at byte {at:,}", remedy="encode it anew"
            )
        if at + frame.size > len(data):
            raise cut_off("its last MP3 frame is not whole")
        at, count = at + frame.size, count + 1
    if data[at:].strip(b"\0") and not data.startswith(_MP3_TRAILERS, at):
        raise MediaError(f"the MP3 file is truncated or damaged: no frame at byte {at:,}")
    return count, at


def _claimed(data: bytes, first: Mp3Frame) -> int | None:
    """How many frames a Xing header says that follow; 0 if it doesn't; None where there is no such header."""
    tag = 4 + first.side_bytes
    if data[tag : tag + 4] not in (b"Xing", b"Info"):
        return None
    return int.from_bytes(data[tag + 8 : tag + 12]) if data[tag + 7] & 1 else 0


def _xing(data: bytes, first: Mp3Frame, count: int) -> bytes:
    """A frame that sounds like nothing and says that `count` frames follow."""
    head = bytes([0xFF, data[1] | 1, _MP3_TAG_KBPS_INDEX << 4 | data[2] & 0x0C, data[3]])
    body = head + bytes(first.side_bytes) + b"Xing" + (1).to_bytes(4) + count.to_bytes(4)
    frame = mp3_frame(head, 0)
    assert frame is not None
    return body.ljust(frame.size, b"\0")


def cut_off(reason: str) -> MediaError:
    """For what ends before it should."""
    return MediaError(f"the sound is truncated or damaged: {reason}", remedy="send the whole file")
