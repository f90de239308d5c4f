"""Sounds and pictures through OpenAI's own client: mixed, refused, counted, and loaded only on demand."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
from PIL import Image
from server_fixtures import ENGINE, RunningServer, data_url, make_site, wait_until

from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tiny_bundle import picture_bytes, sound_bytes, write_tiny_bundle
from okavango.web.services import ServeOptions

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 10}
MODELS = ("both", "plain", "sees")
PICTURE, SOUND = picture_bytes(5), sound_bytes(6, 1.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A base that sees and hears, an adapter that leaves its encoders alone, and one that does not."""
    folder = tmp_path_factory.mktemp("media")
    base = write_tiny_base(folder / "base", audio=True, name="both")
    site = make_site(folder, base)
    write_tiny_bundle(folder / "plain", base, seed=3, rank=4, head=False)
    write_tiny_bundle(folder / "sees", base, seed=4, rank=8, encoder=True)
    for name in ("plain", "sees"):
        site.publish(name, folder / name)
    running = RunningServer(site, ServeOptions(engine=ENGINE))
    wait_until(lambda: not running.services.catalog.versions("registered"))
    yield running
    running.stop()


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return server.client()


def heard(data: bytes, form: str = "wav") -> dict[str, Any]:
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(data).decode(), "format": form},
    }


def seen(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def asked(*parts: str | dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def loaded(server: RunningServer, modality: str) -> float:
    return server.metric(f'okavango_encoder_loaded{{modality="{modality}"}}')


def test_encoders_come_with_their_first_medium(server: RunningServer, client: openai.OpenAI) -> None:
    """The first test of this file: what others leave loaded would hide it."""
    for model in MODELS:
        client.chat.completions.create(model=model, messages=asked("only text"), **GREEDY)
    assert (loaded(server, "image"), loaded(server, "audio")) == (0, 0)
    client.chat.completions.create(model="plain", messages=asked(seen(PICTURE), "what?"), **GREEDY)
    assert (loaded(server, "image"), loaded(server, "audio")) == (1, 0)
    client.chat.completions.create(model="plain", messages=asked(heard(SOUND), "what?"), **GREEDY)
    assert (loaded(server, "image"), loaded(server, "audio")) == (1, 1)


def test_mixed_requests_are_answered_as_one_by_one(client: openai.OpenAI) -> None:
    conversations = [
        asked("Only text."),
        asked(heard(SOUND), "What is said?"),
        asked(seen(PICTURE), "What is this?"),
        asked("First ", seen(PICTURE), " then ", heard(SOUND), " and ", seen(picture_bytes(9)), "?"),
    ]
    cases = [(model, messages) for messages in conversations for model in MODELS]

    def ask(case: tuple[str, list[dict[str, Any]]]) -> str | None:
        model, messages = case
        answer = client.chat.completions.create(model=model, messages=messages, **GREEDY)  # type: ignore[call-overload]
        return answer.choices[0].message.content

    alone = [ask(case) for case in cases]
    with ThreadPoolExecutor(len(cases)) as threads:
        assert list(threads.map(ask, cases)) == alone
    assert len(set(alone)) == len(alone)


@pytest.mark.parametrize(("form", "kind"), [("wav", "WAV"), ("flac", "FLAC"), ("ogg", "OGG"), ("mp3", "MP3")])
def test_every_format_is_heard(client: openai.OpenAI, form: str, kind: str) -> None:
    samples, rate = soundfile.read(io.BytesIO(SOUND))
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind)
    messages = asked(heard(buffer.getvalue(), form), "?")
    answer = client.chat.completions.create(model="both", messages=messages, **GREEDY)  # type: ignore[call-overload]
    # 1.1 s at a token each 200 ms; an MP3 is a little longer
    assert answer.usage.prompt_tokens_details.audio_tokens in (6, 7)
    assert answer.usage.prompt_tokens_details.image_tokens == 0


def test_usage_tells_what_no_encoder_had_to_see(client: openai.OpenAI) -> None:
    messages = asked(heard(sound_bytes(31)), seen(picture_bytes(32)), "?")
    counts = []
    for model in ("both", "plain"):
        answer = client.chat.completions.create(model=model, messages=messages, **GREEDY)  # type: ignore[call-overload]
        counts.append(answer.usage.prompt_tokens_details.features_cached)
        assert answer.okavango["features_cached"] == counts[-1]
    assert counts == [0, 2]


def hour() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(3600 * 2000, np.int16), 2000 * 2, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def bomb() -> bytes:
    """30,000 × 30,000 pixels that are all the same, in a few kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")


def long_wav() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(
        buffer, np.zeros(8000 * 3600, np.uint8).astype(np.int16), 8000, format="WAV", subtype="ULAW"
    )
    return buffer.getvalue()


def truncated_mp3() -> bytes:
    buffer = io.BytesIO()
    samples, rate = soundfile.read(io.BytesIO(sound_bytes(3, 2.0)))
    soundfile.write(buffer, samples, rate, format="MP3")
    return buffer.getvalue()[:-300]


def lying_wav() -> bytes:
    """16-bit samples whose header says 8 bits."""
    data = bytearray(sound_bytes(3, 0.5))
    assert struct.unpack_from("<H", data, 34) == (16,)
    struct.pack_into("<H", data, 34, 8)
    return bytes(data)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: heard(hour()), "600"),
        (lambda: heard(long_wav()), "limit"),
        (lambda: heard(truncated_mp3(), "mp3"), ""),
        (lambda: heard(lying_wav()), ""),
        (lambda: heard(b""), ""),
        (lambda: heard(b"no sound at all"), ""),
        (lambda: heard(SOUND, "aiff"), "one of wav, mp3, flac, ogg"),
        (lambda: {"type": "input_audio", "input_audio": {"data": "https://x/y.wav"}}, "only data URLs"),
        (lambda: {"type": "input_audio", "input_audio": {"data": data_url(SOUND)}}, "audio/"),
        (lambda: {"type": "input_audio", "input_audio": {"format": "wav"}}, "missing"),
        (lambda: seen(bomb()), "too many pixels"),
    ],
    ids=[
        "an hour of FLAC",
        "an hour of WAV",
        "a cut MP3",
        "8 bits that are 16",
        "nothing",
        "noise",
        "AIFF",
        "an address",
        "a picture's type",
        "no data",
        "a bomb",
    ],
)
def test_what_is_not_accepted_is_one_clear_error(
    server: RunningServer, client: openai.OpenAI, part: Any, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="both", messages=asked(part(), "?"), **GREEDY)  # type: ignore[call-overload]
    body = raised.value.body
    assert isinstance(body, dict)
    assert message in body["message"]
    assert str(body["param"]).startswith("messages[0].content[0]")
    assert client.chat.completions.create(model="both", messages=asked("still there?"), **GREEDY).choices


def test_a_picture_of_one_pixel_is_seen(client: openai.OpenAI) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), "red").save(buffer, "PNG")
    messages = asked(seen(buffer.getvalue()), "?")
    answer = client.chat.completions.create(model="sees", messages=messages, **GREEDY)  # type: ignore[call-overload]
    assert answer.usage.prompt_tokens_details.image_tokens == 4
