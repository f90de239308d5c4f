"""The training page: a form for a new job beside the jobs that there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from okavango.web.services import Services
from okavango.web.studio import picker
from okavango.web.studio.chat import ChatPage
from okavango.web.studio.events import DIRECT
from okavango.web.studio.job_board import JobBoard
from okavango.web.studio.job_form import JobForm
from okavango.web.studio.job_media import JobMedia
from okavango.web.studio.routes import MEDIA, UPLOADS

Update = Any


class TrainingPage:
    """Builds its components inside the tab that is open, and answers their events.

    Args:
        root: the studio's path.
    """

    def __init__(self, services: Services, job_media: JobMedia, tab: gr.Tab, root: str) -> None:
        self._services = services
        with gr.Row(elem_classes="okv-training"):
            with gr.Column(scale=0, min_width=380, elem_classes="okv-form"):
                self.form = JobForm(services, root + UPLOADS)
            with gr.Column(scale=1, min_width=320, elem_classes="okv-board"):
                self.board = JobBoard(services, job_media, root + MEDIA)
        self._listen(tab)

    def _listen(self, tab: gr.Tab) -> None:
        form, board = self.form, self.board
        tab.select(lambda: gr.Timer(active=True), None, [board.timer], **DIRECT)
        tab.select(board.show, [board.selected], board.shown, **DIRECT)
        tab.select(form.refresh, None, form.lists, **DIRECT)
        started = form.start.click(self._start, form.inputs, [form.message, board.selected], **DIRECT)
        started.then(board.show, [board.selected], board.shown, **DIRECT)

    def rest(self, others: Sequence[gr.Tab]) -> None:
        """Ask the catalog for news no more while another tab is looked at."""
        for other in others:
            other.select(lambda: gr.Timer(active=False), None, [self.board.timer], **DIRECT)

    def try_in(self, tabs: gr.Tabs, chat: ChatPage, tab_id: str) -> None:
        """Have the button lead to the chat, with the job's adapter chosen there."""

        def open_chat(selected: str, request: gr.Request) -> tuple[Update, Update]:
            ref = self.board.adapter_of(selected, request)
            if ref is None:
                return gr.skip(), gr.skip()
            return gr.Tabs(selected=tab_id), gr.update(choices=picker.names(self._services), value=ref)

        self.board.tried.click(open_chat, [self.board.selected], [tabs, chat.model], **DIRECT)

    def _start(self, request: gr.Request, *told: Any) -> tuple[str, Update]:
        message, job_id = self.form.started(request, *told)
        return message, gr.skip() if job_id is None else job_id
