"""Files, jobs and events through OpenAI's own client, with a real worker and by hand."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_fixtures import ENGINE, RunningServer, data_url, make_site, wait_until
from training_fixtures import NAMES, picture_row

from okavango.modalities.base import Base
from okavango.modalities.tiny_bundle import picture_bytes
from okavango.training.service import WorkerOptions
from okavango.web.services import ServeOptions

QUICK: dict[str, Any] = {
    "steps": 4,
    "precision": "float32",
    "lora": {"r": 4, "alpha": 8},
    "align": {"steps": 3},
    "views": 0,
    "max_new_tokens": 4,
}


def rows() -> bytes:
    """Pictures as data URLs with their names."""
    found = [picture_row(data_url(picture_bytes(i)), name) for i, name in enumerate(NAMES)]
    return "".join(json.dumps(row) + "\n" for row in found).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_base: Base) -> Iterator[RunningServer]:
    """Without a worker: what is queued stays there."""
    site = make_site(tmp_path_factory.mktemp("jobs"), tiny_base)
    running = RunningServer(site, ServeOptions(engine=ENGINE, most_open_jobs=30))
    yield running
    running.stop()


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def uploaded(server: RunningServer) -> str:
    return server.client().files.create(file=("data.jsonl", rows()), purpose="fine-tune").id


def refused(call: Callable[[], Any]) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    return caught.value


def test_a_file_is_kept_listed_read_and_deleted(client: openai.OpenAI) -> None:
    made = client.files.create(file=("pets of ünï.jsonl", rows()), purpose="fine-tune")
    assert (made.filename, made.bytes, made.purpose, made.status) == (
        "pets of ünï.jsonl",
        len(rows()),
        "fine-tune",
        "processed",
    )
    assert client.files.retrieve(made.id) == made
    assert made.id in [each.id for each in client.files.list(purpose="fine-tune")]
    assert made.id not in [each.id for each in client.files.list(purpose="vision")]
    assert client.files.content(made.id).read() == rows()
    assert client.files.delete(made.id).deleted
    assert refused(lambda: client.files.retrieve(made.id)).status_code == 404


def test_lists_come_in_pages(client: openai.OpenAI) -> None:
    ids = [client.files.create(file=(f"{i}.png", b"x"), purpose="vision").id for i in range(5)]
    assert [each.id for each in client.files.list(purpose="vision", limit=2)] == ids[::-1]
    assert [each.id for each in client.files.list(purpose="vision", limit=3, order="asc")] == ids


@pytest.mark.parametrize(
    ("file", "purpose", "said"),
    [
        (("a.jsonl", b""), "fine-tune", "file: is empty"),
        (("a.jsonl", b"x"), "assistants", "purpose: is 'assistants'"),
    ],
)
def test_files_that_are_refused(client: openai.OpenAI, file: Any, purpose: Any, said: str) -> None:
    assert said in refused(lambda: client.files.create(file=file, purpose=purpose)).message


def test_a_form_that_is_none(server: RunningServer) -> None:
    found = server.post("/v1/files", {"file": "x"})
    assert (found.status_code, found.json()["error"]["code"]) == (415, "unsupported_media_type")
    torn = httpx.post(
        f"{server.url}/v1/files", content=b"--x\r\nContent-", headers={"content-type": "multipart/form-data"}
    )
    assert torn.status_code == 400


def test_limits_of_size_and_quota(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(upload_bytes=5000, file_quota_bytes=6000)
    client = server.client()
    assert refused(lambda: client.files.create(file=b"x" * 6000, purpose="fine-tune")).status_code == 413
    kept = client.files.create(file=b"x" * 4000, purpose="fine-tune")
    over = refused(lambda: client.files.create(file=b"x" * 3000, purpose="fine-tune"))
    assert (over.status_code, "over the quota of 6,000" in over.message) == (409, True)
    assert [each.id for each in client.files.list()] == [kept.id]
    stored = [path.name for path in Path(server.site.settings.artifacts, "files").iterdir()]
    assert stored == [kept.id]


def test_others_files_and_jobs_are_not_there(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(keys="one,two")
    one, two = server.client("one"), server.client("two")
    file = one.files.create(file=rows(), purpose="fine-tune")
    job = one.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert not list(two.files.list())
    assert not list(two.fine_tuning.jobs.list())
    for call in (
        lambda: two.files.content(file.id),
        lambda: two.files.delete(file.id),
        lambda: two.fine_tuning.jobs.retrieve(job.id),
        lambda: two.fine_tuning.jobs.cancel(job.id),
        lambda: two.fine_tuning.jobs.list_events(job.id),
        lambda: two.fine_tuning.jobs.create(model="tiny", training_file=file.id),
    ):
        assert refused(call).status_code == 404


def test_a_job_says_what_was_asked(client: openai.OpenAI, uploaded: str) -> None:
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=uploaded,
        validation_file=uploaded,
        suffix="My Titles!",
        seed=7,
        metadata={"team": "shop"},
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
            },
        },
        extra_body={"okavango": {"lora": {"r": 4}, "priority": 3}},
    )
    assert (job.status, job.model, job.seed, job.metadata) == ("queued", "tiny", 7, {"team": "shop"})
    assert (job.training_file, job.validation_file) == (uploaded, uploaded)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 4)
    own: Any = job.okavango  # type: ignore[attr-defined]
    assert (own["name"], own["priority"]) == ("my-titles", 3)
    assert (own["spec"]["lora"]["r"], own["spec"]["lr"], own["spec"]["head"]["lr"]) == (4, 5e-4, 2.5e-4)
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    assert refused(lambda: client.files.delete(uploaded)).status_code == 409


def test_a_waiting_job_is_paused_resumed_and_cancelled(client: openai.OpenAI, uploaded: str) -> None:
    jobs = client.fine_tuning.jobs
    job = jobs.create(model="tiny", training_file=uploaded)
    assert jobs.pause(job.id).status == "paused"
    assert jobs.resume(job.id).status == "queued"
    assert jobs.cancel(job.id).status == "cancelled"
    assert [event.message for event in jobs.list_events(job.id, limit=2)] == [
        "cancelled",
        "queued",
        "paused",
        "queued",
    ]
    for call in (jobs.pause, jobs.resume, jobs.cancel):
        assert refused(lambda call=call: call(job.id)).status_code == 409


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"model": "gpt-9"}, 404, "this server's base is tiny"),
        ({"training_file": "data.jsonl"}, 400, "not the id of an uploaded file"),
        ({"training_file": "file-" + "0" * 24}, 404, "no such file"),
        ({"suffix": "!!!"}, 400, "no letter or digit"),
        ({"method": {"type": "dpo"}}, 400, "'dpo' is not done here"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, 400, "there are none here"),
        ({"okavango": {"lora": {"rang": 4}}}, 400, "lora.rang: unknown key"),
        ({"okavango": {"lora": {"targets": ["nothing"]}}}, 400, "matches no layer"),
        ({"okavango": {"seed": 3}}, 400, "send seed"),
        ({"okavango": {"name": "tiny"}}, 400, "is the name of a base"),
        ({"okavango": {"priority": "high"}}, 400, "whole number"),
        ({"okavango": {"lr": 1}, "hyperparameters": {"learning_rate_multiplier": 2}}, 400, "set twice"),
        ({"okavango": {"steps": 3}, "hyperparameters": {"n_epochs": 2}}, 400, "steps and epochs"),
        ({"metadata": {"k" * 65: "v"}}, 400, "64 characters a key"),
        ({"n_epochs": 3}, 400, "no such field"),
    ],
)
def test_jobs_that_are_refused(
    server: RunningServer, uploaded: str, changes: dict[str, Any], status: int, said: str
) -> None:
    body = {"model": "tiny", "training_file": uploaded} | changes
    found = server.post("/v1/fine_tuning/jobs", body)
    assert (found.status_code, said in found.json()["error"]["message"]) == (status, True), found.text


def test_a_caller_has_so_many_jobs(make_server: Callable[..., RunningServer]) -> None:
    client = make_server(most_open_jobs=2).client()
    file = client.files.create(file=rows(), purpose="fine-tune").id
    first, _ = (client.fine_tuning.jobs.create(model="tiny", training_file=file) for _ in range(2))
    over = refused(lambda: client.fine_tuning.jobs.create(model="tiny", training_file=file))
    assert (over.status_code, over.response.headers["retry-after"]) == (429, "60")
    client.fine_tuning.jobs.cancel(first.id)
    client.fine_tuning.jobs.create(model="tiny", training_file=file)


def test_a_file_is_checked_before_a_job(server: RunningServer, client: openai.OpenAI, uploaded: str) -> None:
    good = server.post("/v1/datasets/check", {"file": uploaded}).json()
    assert (good["ok"], good["counts"]["rows"], good["file"]) == (True, len(NAMES), "data.jsonl")
    assert good["counts"]["tokens"] > 0
    assert (good["memory"]["rows"], good["memory"]["total"] > 0) == (len(NAMES), True)
    paths = json.dumps(picture_row("/etc/passwd", "no")) + "\n"
    bad = client.files.create(file=("bad.jsonl", (paths + "{").encode()), purpose="fine-tune").id
    found = server.post("/v1/datasets/check", {"file": bad}).json()
    assert [fault["line"] for fault in found["faults"]] == [1, 2]
    assert found["faults"][0]["file"] == "bad.jsonl"


def test_from_upload_to_answer(make_server: Callable[..., RunningServer]) -> None:
    """Everything at once: the server's own worker does the job, whose adapter answers right after."""
    server = make_server(worker=WorkerOptions(threads=1, poll_seconds=0.1))
    client = server.client()
    file = client.files.create(file=("data.jsonl", rows()), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file, validation_file=file, suffix="pets", extra_body={"okavango": QUICK}
    )
    lines = httpx.stream("GET", f"{server.url}/v1/fine_tuning/jobs/{job.id}/events?stream=true", timeout=120)
    with lines as answer:
        streamed = [line for line in answer.iter_lines() if line]
    events = [json.loads(line[6:]) for line in streamed if line.startswith("data: {")]
    assert streamed[-1] == "data: [DONE]"
    assert [event["okavango"]["number"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["message"] == "succeeded"
    losses = [e["data"] for e in events if e["type"] == "metrics" and "train_loss" in e["data"]]
    assert [data["step"] for data in losses] == [1, 2, 3, 4]
    again = server.get(
        f"/v1/fine_tuning/jobs/{job.id}/events",
        headers={"accept": "text/event-stream", "last-event-id": str(len(events) - 2)},
    )
    assert [line for line in again.text.splitlines() if line.startswith("id: ")] == [
        f"id: {len(events) - 1}",
        f"id: {len(events)}",
    ]
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.error) == ("succeeded", "pets@1", None)
    assert done.trained_tokens
    assert done.finished_at
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert (checkpoint.step_number, checkpoint.fine_tuned_model_checkpoint) == (4, "pets@1")
    _results_are_read(client, job.id, done.result_files)
    newest = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=3)]
    assert newest == [event["message"] for event in events[::-1]]
    answer = client.chat.completions.create(
        model=done.fine_tuned_model, messages=[{"role": "user", "content": "hi"}], max_tokens=3
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def _results_are_read(client: openai.OpenAI, job: str, files: list[str]) -> None:
    (file,) = files
    described = client.files.retrieve(file)
    assert (described.filename, described.purpose) == ("step_metrics.csv", "fine-tune-results")
    content = client.files.content(file).read()
    assert described.bytes == len(content)
    lines = list(csv.DictReader(io.StringIO(content.decode())))
    assert [line["step"] for line in lines] == ["1", "2", "3", "4"]
    assert all(float(line["train_loss"]) > 0 for line in lines)
    with pytest.raises(openai.ConflictError, match=f"{job}'s, and not kept apart"):
        client.files.delete(file)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(f"{file}0")


def test_a_stopping_server_gives_its_job_back(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(worker=WorkerOptions(threads=1, poll_seconds=0.1))
    client, catalog = server.client(), server.services.catalog
    file = client.files.create(file=("data.jsonl", rows()), purpose="fine-tune").id
    endless = {"okavango": QUICK | {"steps": 100_000}}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body=endless).id
    wait_until(lambda: bool(catalog.list_events(job, kind="metrics")), seconds=90)
    server.stop()
    assert catalog.get_job(job).state == "queued"
    assert list((server.site.settings.jobs / job / "checkpoints").glob("step-*"))


def archive(rows: list[dict[str, Any]], pictures: int) -> bytes:
    """A zip with train.jsonl, and pictures beside it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        for i in range(pictures):
            file.writestr(f"images/{i}.png", picture_bytes(i))
    return packed.getvalue()


def test_pictures_come_by_id_in_an_archive_or_in_the_rows(
    make_server: Callable[..., RunningServer],
) -> None:
    """Three ways to say the same: one job each learns the same adapter from them."""
    server = make_server(worker=WorkerOptions(threads=1, poll_seconds=0.1))
    client = server.client()
    ids = [
        client.files.create(file=(f"{i}.png", picture_bytes(i)), purpose="vision").id
        for i in range(len(NAMES))
    ]
    by_id = [picture_row(each, name) for each, name in zip(ids, NAMES, strict=True)]
    by_path = [picture_row(f"images/{i}.png", name) for i, name in enumerate(NAMES)]
    datas = {
        "rows.jsonl": rows(),
        "ids.jsonl": "".join(json.dumps(row) + "\n" for row in by_id).encode(),
        "all.zip": archive(by_path, len(NAMES)),
    }
    weights = []
    for name, data in datas.items():
        file = client.files.create(file=(name, data), purpose="fine-tune").id
        report = server.post("/v1/datasets/check", {"file": file}).json()
        assert (report["ok"], report["counts"]["distinct_media"]) == (True, len(NAMES)), report
        suffix = name.partition(".")[0]
        job = client.fine_tuning.jobs.create(
            model="tiny", training_file=file, suffix=suffix, extra_body={"okavango": QUICK}
        ).id
        wait_until(
            lambda job=job: client.fine_tuning.jobs.retrieve(job).status in ("succeeded", "failed"),
            seconds=90,
        )
        done = client.fine_tuning.jobs.retrieve(job)
        assert done.status == "succeeded", done.error
        folder = server.services.store.fetch(done.okavango["digest"])  # type: ignore[attr-defined]
        weights.append((folder / "decoder" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]


def test_faults_are_told_without_where_files_lie(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(worker=WorkerOptions(threads=1, poll_seconds=0.1))
    client = server.client()
    missing = "file-" + "0" * 24
    lines = [picture_row(missing, "a"), picture_row("/etc/hostname", "b"), picture_row("images/9.png", "c")]
    plain = "".join(json.dumps(row) + "\n" for row in lines).encode()
    for name, data in {"plain.jsonl": plain, "packed.zip": archive(lines, 1)}.items():
        file = client.files.create(file=(name, data), purpose="fine-tune").id
        report = server.post("/v1/datasets/check", {"file": file}).json()
        assert [fault["line"] for fault in report["faults"]] == [1, 2, 3]
        assert f"there is no uploaded file {missing}" in report["faults"][0]["text"]
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file).id
        wait_until(lambda job=job: client.fine_tuning.jobs.retrieve(job).status == "failed", seconds=90)
        error = client.fine_tuning.jobs.retrieve(job).error
        assert error is not None
        assert f"{name}" in error.message
        for text in (error.message, json.dumps(report)):
            assert str(server.site.settings.home) not in text
            assert str(server.site.settings.cache) not in text


def test_another_s_pictures_are_not_there(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(keys="one,two")
    one, two = server.client("one"), server.client("two")
    picture = one.files.create(file=("0.png", picture_bytes(0)), purpose="vision").id
    line = json.dumps(picture_row(picture, "a")).encode()
    for client, ok in ((one, True), (two, False)):
        file = client.files.create(file=("rows.jsonl", line), purpose="fine-tune").id
        headers = {"authorization": f"Bearer {client.api_key}"}
        assert server.post("/v1/datasets/check", {"file": file}, headers=headers).json()["ok"] == ok
