"""A data file of the training page: checked when it is chosen, and no longer than somebody waits for it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from server_fixtures import RunningServer
from training_fixtures import text_row

from okavango.web.studio import data_picker
from okavango.web.studio.data_picker import Checked, DataPicker
from okavango.web.studio.job_form import JobForm

ROW = json.dumps(text_row("hi", "there")).encode()


def visit(session: str = "page") -> Any:
    """What Gradio tells an event of its page."""
    return SimpleNamespace(session_hash=session, request=SimpleNamespace(scope={"state": {}}))


@pytest.fixture
def picker(server: RunningServer) -> DataPicker:
    with gr.Blocks():
        return DataPicker(server.services, "Examples", "", "/studio/uploads", "data")


async def looks(picker: DataPicker, file: str | None) -> list[tuple[Any, Any]]:
    return [look async for look in picker._check(file, visit())]


def upload(server: RunningServer, data: bytes) -> str:
    return server.client().files.create(file=("rows.jsonl", data), purpose="fine-tune").id


def test_a_file_that_is_chosen_is_checked(server: RunningServer, picker: DataPicker) -> None:
    good, faulty = upload(server, ROW), upload(server, b"{")
    cases = ((good, True, "No faults"), (faulty, False, "1 fault"), ("file-0", False, "No such file"))
    for file, ok, said in cases:
        report, checked = asyncio.run(looks(picker, file))[-1]
        assert (checked, said in report) == (Checked(file, ok), True)
    assert asyncio.run(looks(picker, None)) == [("", Checked())]


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A check that only ends when it is told to; the event is set when it has."""
    ended = threading.Event()

    def check(asked: Any, principal: str, services: Any, progress: Callable[[int], None]) -> None:
        try:
            while not ended.wait(0.01):
                progress(123_000)
        finally:
            ended.set()

    monkeypatch.setattr(data_picker, "check_upload", check)
    monkeypatch.setattr(data_picker, "LOOK_SECONDS", 0.02)
    return ended


def test_a_check_that_nobody_waits_for_ends(picker: DataPicker, endless: threading.Event) -> None:
    async def leave() -> str:
        checking = picker._check("file-1", visit())
        await anext(checking)
        report, _ = await anext(checking)
        assert not endless.is_set()
        await checking.aclose()
        await asyncio.to_thread(endless.wait, 10)
        return str(report)

    assert "123 kB read" in asyncio.run(leave())
    assert endless.is_set()


def test_a_later_choice_takes_the_place_of_a_check(picker: DataPicker, endless: threading.Event) -> None:
    async def choose_again() -> list[Any]:
        first = picker._check("file-1", visit())
        await anext(first)
        assert await looks(picker, None) == [("", Checked())]
        return [look async for look in first]

    assert asyncio.run(choose_again()) == []
    assert endless.wait(10)


def test_no_job_starts_with_files_that_were_not_found_good(server: RunningServer) -> None:
    with gr.Blocks():
        form = JobForm(server.services, "/studio/uploads")
    file = upload(server, ROW)
    good, before = Checked(file, True), len(server.services.catalog.list_jobs())
    for data, held_out, checked, held_out_checked, said in (
        ("", "", Checked(), Checked(), "Choose examples"),
        (file, "", Checked("file-1", True), Checked(), "being checked"),
        (file, "", Checked(file, False), Checked(), "have faults"),
        (file, "file-2", good, Checked("file-2", False), "have faults"),
    ):
        message, job = form.started(visit(), data, held_out, checked, held_out_checked)
        assert (job, said in message) == (None, True)
    assert len(server.services.catalog.list_jobs()) == before
