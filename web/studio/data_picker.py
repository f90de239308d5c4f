"""One of a job's data files: uploaded or chosen from earlier uploads, and checked at once."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from okavango.platform.catalog.records import FileRecord
from okavango.platform.errors import OkavangoError
from okavango.web.api.datasets import CheckRequest, check_upload
from okavango.web.services import Services
from okavango.web.studio import reports
from okavango.web.studio.events import DIRECT, QUEUED
from okavango.web.studio.markup import fault
from okavango.web.studio.principals import principal_of
from okavango.web.studio.theme import text_of
from okavango.web.studio.units import size
from okavango.web.studio.wording import explain

log = logging.getLogger("okavango.web.studio")

LOOK_SECONDS = 0.3
_MOST_FAULTS = 100
_MOST_FILES = 200

Update = Any


@dataclass(frozen=True)
class Checked:
    """What the page knows of a file: whether a job may learn from it."""

    file: str = ""
    ok: bool = False


class _Abandoned(Exception):  # noqa: N818 - nothing went wrong
    """Nobody waits for a check any more."""


class DataPicker:
    """Builds its components where it is made.

    Args:
        to: where uploads are sent.
        brief: as reports.report.

    Attributes:
        file: the chosen file's id, or nothing.
        checked: a Checked of that file, once it was read.
    """

    def __init__(
        self, services: Services, label: str, info: str, to: str, elem_id: str, *, brief: bool = False
    ) -> None:
        self._services = services
        self._brief = brief
        self._current: dict[str, object] = {}
        self.file = gr.Dropdown(
            [],
            value=None,
            label=label,
            info=info,
            allow_custom_value=True,  # a file may have been uploaded a second ago, by another program
            elem_id=elem_id,
        )
        self.zone = gr.HTML(
            _zone(to, services.options.upload_bytes, f"{elem_id}-file"),
            js_on_load=text_of("upload.js"),
            apply_default_css=False,
            elem_id=f"{elem_id}-zone",
        )
        self.report = gr.HTML(apply_default_css=False, elem_id=f"{elem_id}-report")
        self.checked = gr.State(Checked())

    def listen(self, then: Callable[[], tuple[Callable[..., Update], list[Any], list[Any]]]) -> None:
        """Answer events. What `then` gives (function, inputs, outputs) follows each change of `checked`."""
        self.zone.uploaded(self._choose, None, [self.file], **DIRECT)
        self.file.focus(self.refresh, None, [self.file], **DIRECT)
        function, inputs, outputs = then()
        self.file.change(
            self._check, [self.file], [self.report, self.checked], concurrency_limit=None, **QUEUED
        ).then(function, inputs, outputs, **DIRECT)

    def refresh(self, request: gr.Request) -> Update:
        """The caller's files as they are now."""
        return gr.update(choices=self._files(principal_of(request)))

    def _choose(self, request: gr.Request, event: gr.EventData) -> Update:
        return gr.update(choices=self._files(principal_of(request)), value=str(event._data["id"]))

    def _files(self, principal: str) -> list[tuple[str, str]]:
        found = self._services.catalog.list_files(principal=principal, purpose="fine-tune", limit=_MOST_FILES)
        return [("none", ""), *((_label(file), file.id) for file in found)]

    async def _check(
        self, file_id: str | None, request: gr.Request
    ) -> AsyncGenerator[tuple[Update, Update], None]:
        """The report as it comes to be. A later choice of the same page, or its end, ends the check."""
        session, own = str(request.session_hash), object()
        self._current[session] = own
        if not file_id:
            yield "", Checked()
            return
        done, gone = [0], threading.Event()

        def progress(so_far: int) -> None:
            done[0] = so_far
            if gone.is_set():
                raise _Abandoned

        work = asyncio.create_task(asyncio.to_thread(self._read, file_id, principal_of(request), progress))
        try:
            yield reports.checking(0), Checked()
            while not (await asyncio.wait([work], timeout=LOOK_SECONDS))[0]:
                if self._current.get(session) is not own:
                    return
                yield reports.checking(done[0]), gr.skip()
            if self._current.get(session) is own:
                yield work.result()
        finally:
            gone.set()
            work.add_done_callback(_forget)
            if self._current.get(session) is own:
                del self._current[session]

    def _read(self, file_id: str, principal: str, progress: Callable[[int], None]) -> tuple[str, Checked]:
        asked = CheckRequest(file=file_id, max_faults=_MOST_FAULTS)
        try:
            found = check_upload(asked, principal, self._services, progress)
        except OkavangoError as error:
            return fault(explain(error, file_id)), Checked(file_id)
        except _Abandoned:
            raise
        except Exception as error:
            log.exception("the check of %s failed", file_id)
            return fault(explain(error, file_id)), Checked(file_id)
        return reports.report(found, brief=self._brief), Checked(file_id, found["ok"])


def _forget(work: asyncio.Task[Any]) -> None:
    """Take note of how a task ended that nobody waits for."""
    if not work.cancelled():
        work.exception()


def _label(file: FileRecord) -> str:
    return f"{file.name} · {size(file.bytes)} · {file.created_at:%d %b %H:%M}"


def _zone(to: str, limit: int, name: str) -> str:
    return (
        f'<label class="okv-zone" data-to="{escape(to)}"><input type="file" id="{escape(name)}">'
        f"<span><b>Choose a file</b> or drop it here</span>"
        '<small class="okv-muted">JSONL, JSON, parquet, CSV, or a zip or tar of them with media; '
        f'up to {size(limit)}</small></label><div class="okv-upload-status" role="status"></div>'
    )
