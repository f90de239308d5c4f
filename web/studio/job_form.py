"""The form of a new job: data that were checked, settings, and the start, which is the API's own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr

from okavango.platform.errors import OkavangoError
from okavango.web.api.fine_tuning import queue_job
from okavango.web.services import Services
from okavango.web.studio import settings
from okavango.web.studio.data_picker import Checked, DataPicker
from okavango.web.studio.principals import principal_of
from okavango.web.studio.scores import ALL_SCORES
from okavango.web.studio.settings import Setting

NOT_YET = "Choose examples to learn from, and they are checked at once."

Update = Any


class JobForm:
    """Builds its components inside the column that is open.

    Attributes:
        start: the button; `started` gives what its click is to do.
        message: what came of it.
    """

    def __init__(self, services: Services, uploads: str) -> None:
        self._services = services
        self._fields: dict[str, gr.components.Component] = {}
        gr.HTML('<h3 class="okv-title" id="okv-new-job">New job</h3>', apply_default_css=False)
        self.data = DataPicker(
            services, "Examples", "to learn from: an earlier upload, or a new one", uploads, "okv-data"
        )
        self.held_out = DataPicker(
            services,
            "Held-out examples",
            "not learned from: they give scores, sample answers and a second curve",
            uploads,
            "okv-eval",
            brief=True,
        )
        with gr.Row(elem_classes="okv-fields"):
            self._build(settings.HELD_OUT)
        self._build_settings()
        self.start = gr.Button("Start", variant="primary", interactive=False, elem_id="okv-start")
        self.message = gr.HTML(_note(NOT_YET), elem_id="okv-start-message", apply_default_css=False)
        for picker in (self.data, self.held_out):
            picker.listen(lambda: (self._look, self._files(), [self.start, self.message]))

    def refresh(self, request: gr.Request) -> tuple[Update, Update]:
        """Both lists of files as they are now."""
        return self.data.refresh(request), self.held_out.refresh(request)

    @property
    def lists(self) -> list[Any]:
        """What `refresh` answers for."""
        return [self.data.file, self.held_out.file]

    @property
    def inputs(self) -> list[Any]:
        """What `started` is told."""
        return [*self._files(), self.name, self.parts, *self._fields.values()]

    def started(
        self,
        request: gr.Request,
        data: str,
        held_out: str,
        checked: Checked,
        held_out_checked: Checked,
        *told: Any,
    ) -> tuple[str, str | None]:
        """Queue the job; what to say, and its id where there is one."""
        why_not = _why_not(data, held_out, checked, held_out_checked)
        if why_not is not None:
            return _fault([why_not]), None
        name, parts, *values = told
        base = self._services.base.name
        raw = settings.request_body(
            base, data, held_out or None, name, parts, dict(zip(self._fields, values, strict=True))
        )
        try:
            job = queue_job(raw, principal_of(request), self._services)
        except OkavangoError as error:
            return _fault(settings.refusal(error)), None
        return _note(f"{job.name} is queued as {job.id}."), job.id

    def _files(self) -> list[Any]:
        return [self.data.file, self.held_out.file, self.data.checked, self.held_out.checked]

    def _look(self, *files: Any) -> tuple[Update, str]:
        """The start, and why it cannot be pressed."""
        why_not = _why_not(*files)
        return gr.update(interactive=why_not is None), _note(why_not or "")

    def _build_settings(self) -> None:
        parts = [settings.DECODER, settings.HEADS] if self._services.base.heads else [settings.DECODER]
        self.name = gr.Textbox(
            label="Adapter",
            info="its name: a further version, if there is one of that name",
            placeholder="a new one, if empty",
            max_length=64,
            max_lines=1,
            elem_id="okv-name",
        )
        self.parts = gr.CheckboxGroup(
            [*parts, *((f"{each} encoder", each) for each in self._services.base.encoders)],
            value=parts,
            label="What learns",
            info="an encoder that learns takes many times as long",
            elem_id="okv-parts",
        )
        with gr.Row(elem_classes="okv-fields"):
            self._build(settings.MAIN)
        for title, group in (
            ("How it learns", settings.LEARNING),
            ("How it is scored", settings.LOOKING),
            ("How rows are read", settings.ROWS),
        ):
            with gr.Accordion(title, open=False), gr.Row(elem_classes="okv-fields"):
                self._build(group)

    def _build(self, group: Sequence[Setting]) -> None:
        for setting in group:
            self._fields[setting.path] = _field(setting)


def _field(setting: Setting) -> gr.components.Component:
    default = settings.shown_at_first(setting)
    named: dict[str, Any] = {
        "label": setting.label,
        "info": setting.info,
        "elem_id": f"okv-field-{setting.path.replace('.', '-').replace('_', '-')}",
    }
    match setting.kind:
        case "number" if settings.default_of(setting) is not None:
            # Its bounds are the specification's own, which says what is wrong with a value.
            return gr.Number(default, min_width=110, **named)
        case "number":  # Gradio's own field of numbers makes nothing a zero
            shown = "" if default is None else str(default)
            return gr.Textbox(shown, placeholder="not set", max_lines=1, min_width=110, **named)
        case "choice":
            empty = [("found out", "")] if default is None else []
            return gr.Dropdown(
                [*empty, *settings.choices_of(setting)], value=default or "", min_width=110, **named
            )
        case "scores":
            choices = [(ALL_SCORES[name].label, name) for name in settings.choices_of(setting)]
            return gr.CheckboxGroup(choices, value=[], elem_classes="okv-wide", **named)
        case "switch":
            return gr.Checkbox(default, min_width=110, **named)
    return gr.Textbox(default or "", elem_classes="okv-wide", max_lines=4, **named)


def _why_not(
    data: str | None, held_out: str | None, checked: Checked, held_out_checked: Checked
) -> str | None:
    """Why no job can start with these files; None where one can."""
    if not data:
        return NOT_YET
    for file, found in ((data, checked), (held_out, held_out_checked)):
        if file and found.file != file:
            return "The data are being checked."
        if file and not found.ok:
            return "The data have faults: correct them and upload the file again."
    return None


def _note(text: str) -> str:
    return f'<div class="okv-muted">{escape(text)}</div>' if text else ""


def _fault(sentences: Sequence[str]) -> str:
    said = "".join(f"<div>{escape(each)}</div>" for each in sentences)
    return f'<div class="okv-fault" role="alert">{said}</div>'
