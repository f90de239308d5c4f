"""What the training page fetches beside Gradio: uploads in, media of held-out rows out, each by its owner."""

from __future__ import annotations

import hashlib
import json
import wave
from collections.abc import Callable
from io import BytesIO
from typing import Any

import httpx
import pytest
from PIL import Image
from server_fixtures import RunningServer, data_url
from training_fixtures import picture_row

from okavango.modalities.tiny_bundle import picture_bytes
from okavango.web.studio.job_media import JobMedia

ROWS = "".join(json.dumps(picture_row(data_url(picture_bytes(i)), "x")) + "\n" for i in range(3)).encode()
DIGESTS = [hashlib.sha256(picture_bytes(i)).hexdigest() for i in range(3)]


@pytest.fixture
def studio(make_server: Callable[..., RunningServer]) -> RunningServer:
    return make_server(keys="one,two", studio=True)


def upload(server: RunningServer, data: bytes = ROWS, key: str = "one", **headers: str) -> httpx.Response:
    return httpx.post(
        f"{server.url}/studio/uploads",
        files={"file": ("rows.jsonl", data)},
        data={"purpose": "fine-tune"},
        auth=("anyone", key),
        headers=headers,
    )


def medium(server: RunningServer, job: str, line: int, digest: str, key: str = "one") -> httpx.Response:
    return server.get(f"/studio/media/{job}/{line}/{digest}", auth=("anyone", key))


def job_over(server: RunningServer, file: str | None, **changes: Any) -> str:
    asked = {"model": "tiny", "training_file": file, "validation_file": file} | changes
    return server.client("one").fine_tuning.jobs.create(**asked).id


def test_uploads_are_those_of_the_api(studio: RunningServer) -> None:
    made = upload(studio).json()
    [found] = studio.client("one").files.list()
    assert (found.id, found.filename, found.bytes) == (made["id"], "rows.jsonl", len(ROWS))
    assert not list(studio.client("two").files.list())
    assert upload(studio, b"").json()["error"]["message"] == "file: is empty"


def test_uploads_need_a_key_and_the_page_itself(studio: RunningServer) -> None:
    assert upload(studio, key="three").status_code == 401
    assert upload(studio, origin="http://elsewhere.example").status_code == 403
    assert not list(studio.client("one").files.list())


def test_media_of_held_out_rows_are_shown_to_the_job_s_owner(studio: RunningServer) -> None:
    job = job_over(studio, upload(studio).json()["id"])
    found = medium(studio, job, 2, DIGESTS[1])
    assert (found.status_code, found.headers["content-type"]) == (200, "image/png")
    assert "private" in found.headers["cache-control"]
    assert Image.open(BytesIO(found.content)).size == Image.open(BytesIO(picture_bytes(1))).size
    for line, digest in ((1, DIGESTS[1]), (0, DIGESTS[2]), (9, DIGESTS[1]), (2, "ab" * 32)):
        assert medium(studio, job, line, digest).status_code == 404
    assert medium(studio, job, 2, DIGESTS[1], key="two").status_code == 404


def test_media_of_a_share_that_is_held_out_are_those_of_its_rows(studio: RunningServer) -> None:
    asked = {"validation_file": None, "extra_body": {"okavango": {"hold_out": 0.5}}}
    job = job_over(studio, upload(studio).json()["id"], **asked)
    for line, digest in enumerate(DIGESTS, 1):
        assert medium(studio, job, line, digest).status_code == 200


def test_sounds_are_given_back_as_they_came(studio: RunningServer) -> None:
    sound = BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(b"\1\0" * 1600)
    data = sound.getvalue()
    part = {"type": "input_audio", "input_audio": {"data": data_url(data, "audio/wav"), "format": "wav"}}
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]
    job_id = job_over(studio, upload(studio, json.dumps({"messages": turns}).encode()).json()["id"])
    digest = hashlib.sha256(data).hexdigest()
    job = studio.services.catalog.get_job(job_id)
    assert JobMedia(studio.services).tag(job, 1, digest, "/m").startswith("<audio controls")
    found = medium(studio, job_id, 1, digest)
    assert (found.content, found.headers["content-type"]) == (data, "audio/wav")


def test_a_job_that_holds_nothing_out_shows_nothing(studio: RunningServer) -> None:
    job = job_over(studio, upload(studio).json()["id"], validation_file=None)
    assert medium(studio, job, 1, DIGESTS[0]).status_code == 404


def test_media_whose_file_was_deleted_leave_words(studio: RunningServer) -> None:
    file = upload(studio).json()["id"]
    job_id = job_over(studio, file)
    studio.client("one").fine_tuning.jobs.cancel(job_id)
    job = studio.services.catalog.get_job(job_id)
    media = JobMedia(studio.services)
    assert f'src="/m/{job_id}/1/{DIGESTS[0]}"' in media.tag(job, 1, DIGESTS[0], "/m")
    studio.client("one").files.delete(file)
    assert "no longer there" in JobMedia(studio.services).tag(job, 1, DIGESTS[0], "/m")
