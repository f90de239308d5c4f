"""All jobs of who looks, and one of them as it goes on: curve, scores, answers, events, and its buttons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

import gradio as gr

from okavango.platform.catalog.records import JobRecord
from okavango.platform.catalog.states import FINISHED, SERVABLE
from okavango.platform.errors import NotFoundError, OkavangoError
from okavango.web.services import Services
from okavango.web.studio import job_tables
from okavango.web.studio.curves import curve
from okavango.web.studio.events import DIRECT
from okavango.web.studio.history import Histories, History
from okavango.web.studio.job_media import JobMedia
from okavango.web.studio.markup import fault
from okavango.web.studio.principals import principal_of
from okavango.web.studio.wording import explain

POLL_SECONDS = 2.0
MOST_JOBS = 50
NO_WORKER = (
    '<div class="okv-note">This server does no jobs itself (<code>--no-worker</code>): they wait until a '
    "worker takes them. Start one on any host that reaches the catalog: <code>okavango worker</code></div>"
)
# A row is chosen by a click, or by Enter on it.
_CHOOSE = """
const choose = (event) => {
  const row = event.target.closest("[data-ref]");
  if (row && (event.type === "click" || event.key === "Enter")) trigger("select", {ref: row.dataset.ref});
};
element.addEventListener("click", choose);
element.addEventListener("keydown", choose);
"""

Update = Any
_HIDDEN = gr.update(visible=False)


class JobBoard:
    """Builds its components inside the column that is open.

    Args:
        media: the address below which media of jobs are fetched.
    """

    def __init__(self, services: Services, job_media: JobMedia, media: str) -> None:
        self._catalog = services.catalog
        self._media = job_media
        self._media_root = media
        self._histories = Histories(services.catalog)
        self.selected = gr.State("")
        # Where the page is narrow, the form stands below all of the board.
        jump = '<a class="okv-jump" href="#okv-new-job">New job ↓</a>'
        gr.HTML(f'<h3 class="okv-title">Jobs {jump}</h3>', apply_default_css=False)
        if services.worker is None:
            gr.HTML(NO_WORKER, apply_default_css=False, elem_id="okv-no-worker")
        self.table = gr.HTML(elem_id="okv-jobs", js_on_load=_CHOOSE, apply_default_css=False)
        with gr.Column(visible=False, elem_id="okv-job") as self.detail:
            self._build_detail()
        self.timer = gr.Timer(POLL_SECONDS, active=False)
        self._listen()

    def _build_detail(self) -> None:
        self.head = gr.HTML(apply_default_css=False, elem_id="okv-job-head")
        with gr.Row(elem_classes="okv-actions"):
            self.tried = gr.Button(
                "Try in chat", variant="primary", size="md", elem_id="okv-try", visible=False
            )
            self.pause = gr.Button("Pause", size="md", elem_id="okv-pause", visible=False)
            self.resume = gr.Button("Resume", size="md", elem_id="okv-resume", visible=False)
            self.cancel = gr.Button("Cancel", size="md", elem_id="okv-cancel-job", visible=False)
        with gr.Row(visible=False, elem_classes="okv-confirmation", elem_id="okv-ending") as self.ending:
            gr.HTML("<div>Nothing of a job that is cancelled is kept.</div>", apply_default_css=False)
            self.end = gr.Button("End it", variant="stop", size="md", elem_id="okv-end", scale=0)
            self.leave = gr.Button("Let it go on", size="md", elem_id="okv-leave", scale=0)
        self.told = gr.HTML(apply_default_css=False, elem_id="okv-told")
        self.curve = gr.HTML(apply_default_css=False, elem_id="okv-curve")
        self.scores = gr.HTML(apply_default_css=False, elem_id="okv-scores")
        with gr.Accordion("Answers", open=True, elem_id="okv-answers"):
            self.answers = gr.HTML(apply_default_css=False)
        with gr.Accordion("Events", open=True, elem_id="okv-events"):
            self.lines = gr.HTML(apply_default_css=False)
        with gr.Accordion("Settings", open=False, elem_id="okv-told-settings"):
            self.settings = gr.HTML(apply_default_css=False)

    @property
    def shown(self) -> list[Any]:
        """What `show` answers for."""
        buttons = [self.tried, self.pause, self.resume, self.cancel]
        parts = [self.head, self.curve, self.scores, self.answers, self.lines, self.settings]
        return [self.selected, self.table, self.detail, *buttons, *parts]

    def show(self, selected: str, request: gr.Request) -> tuple[Update, ...]:
        """The jobs, and the selected one; the newest, where there is none. Also the timer's: what has not
        changed is not drawn anew."""
        principal, now = principal_of(request), datetime.now(UTC)
        jobs = self._catalog.list_jobs(principal=principal, limit=MOST_JOBS)
        job = self._find(jobs, selected, principal)
        if job is None:
            return "", job_tables.table(jobs, "", now), _HIDDEN, *(gr.skip() for _ in range(10))
        table = job_tables.table(jobs, job.id, now)
        # An answer that a click overtook must not take the choice back.
        chosen = gr.skip() if job.id == selected else job.id
        return chosen, table, gr.update(visible=True), *self._buttons(job), *self._parts(job, now)

    def _listen(self) -> None:
        selected = [self.selected]
        self.timer.tick(self.show, selected, self.shown, **DIRECT)
        self.table.select(self._choose, None, [*self.shown, self.ending, self.told], **DIRECT)
        self.cancel.click(lambda: gr.update(visible=True), None, [self.ending], **DIRECT)
        self.leave.click(lambda: _HIDDEN, None, [self.ending], **DIRECT)
        for button, act in (
            (self.pause, self._catalog.request_pause),
            (self.resume, self._catalog.resume_job),
            (self.end, self._catalog.request_cancel),
        ):
            done = button.click(self._acting(act), selected, [self.told, self.ending], **DIRECT)
            done.then(self.show, selected, self.shown, **DIRECT)

    def adapter_of(self, selected: str, request: gr.Request) -> str | None:
        """What a job has made, as adapter@version."""
        job = self._catalog.get_job(selected, principal=principal_of(request))
        return (job.result or {}).get("adapter")

    def _choose(self, request: gr.Request, event: gr.EventData) -> tuple[Update, ...]:
        chosen = str(event._data["ref"])
        return chosen, *self.show(chosen, request)[1:], _HIDDEN, ""

    def _acting(self, act: Callable[[str], JobRecord]) -> Callable[..., tuple[str, Update]]:
        def answer(selected: str, request: gr.Request) -> tuple[str, Update]:
            try:
                self._catalog.get_job(selected, principal=principal_of(request))
                act(selected)
            except OkavangoError as error:
                return fault(f"{selected}: {explain(error, selected)}"), _HIDDEN
            return "", _HIDDEN

        return answer

    def _find(self, jobs: Sequence[JobRecord], selected: str, principal: str) -> JobRecord | None:
        """The job of that id, also one that is too old to be listed; else the newest."""
        found = next((job for job in jobs if job.id == selected), None)
        if found is None and selected:
            try:
                return self._catalog.get_job(selected, principal=principal)
            except NotFoundError:
                pass
        return found or (jobs[0] if jobs else None)

    def _buttons(self, job: JobRecord) -> tuple[Update, ...]:
        """Those that make sense in a job's state."""
        goes_on = job.state not in FINISHED and not job.cancel_requested
        pausing = job.state == "running" and job.pause_requested
        return (
            self._try_button(job),
            gr.update(visible=goes_on and job.state != "paused" and not pausing),
            gr.update(visible=goes_on and (job.state == "paused" or pausing)),
            gr.update(visible=goes_on),
        )

    def _try_button(self, job: JobRecord) -> Update:
        ref = (job.result or {}).get("adapter")
        if ref is None:
            return _HIDDEN
        try:
            state = self._catalog.resolve(ref).state
        except OkavangoError:
            return _HIDDEN
        if state in SERVABLE:
            return gr.update(visible=True, interactive=True, value=f"Try {ref} in chat")
        value = f"{ref} is being checked …" if state == "registered" else f"{ref} is {state}"
        return gr.update(visible=True, interactive=False, value=value)

    def _parts(self, job: JobRecord, now: datetime) -> tuple[str, ...]:
        with self._histories.reading(job.id) as history:
            asked = [history.answers[line] for line in sorted(history.answers)]
            return (
                job_tables.head(job, history, now),
                _curve(job, history),
                job_tables.scores(history.scores or (job.result or {}).get("metrics", {})),
                job_tables.answers(job, asked, lambda line, digest: self._medium(job, line, digest)),
                job_tables.lines(list(history.lines)),
                job_tables.settings(job),
            )

    def _medium(self, job: JobRecord, line: int, digest: str) -> str:
        return self._media.tag(job, line, digest, escape(self._media_root))


def _curve(job: JobRecord, history: History) -> str:
    """Nothing of a job that ended before its first step."""
    if job.state in FINISHED and not history.losses:
        return ""
    return curve(history.losses, history.held_out, _steps(job))


def _steps(job: JobRecord) -> int:
    """How many a job will have taken; 0 where that is not known."""
    if (job.result or {}).get("steps") is not None:
        return int((job.result or {})["steps"])
    progress = job.progress or {}
    return int(progress["total"]) if progress.get("phase") == "training" else 0
