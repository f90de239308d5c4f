"""The training page's HTML: all jobs as rows, and all that is known of one job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any

from okavango.platform.catalog.records import JobEventRecord, JobRecord
from okavango.platform.catalog.states import FINISHED
from okavango.web.studio.history import Answers, History
from okavango.web.studio.job_media import holds_out
from okavango.web.studio.markup import badge, fault, mapping
from okavango.web.studio.scores import ALL_SCORES
from okavango.web.studio.units import ago, span

NONE_YET = (
    '<div class="okv-empty"><b>No job yet</b><br>Upload examples and start one, '
    "or queue one with <code>okavango train --detach</code>.</div>"
)
MOST_LOOKS = 4
"""Answers of a row that are shown: those of the newest looks."""
_TIPS = {
    "queued": "waits for a worker",
    "running": "a worker is at it",
    "paused": "set aside with its last checkpoint",
    "succeeded": "its adapter is registered",
    "failed": "it ended with an error",
    "cancelled": "it was ended, and nothing of it is kept",
}
_HEADS = ("Job", "State", "Progress", "Loss", "Held out", "Priority", "Created")

Medium = Callable[[int, str], str]
"""(line, digest) → a held-out row's medium as HTML."""


def table(jobs: Sequence[JobRecord], selected: str, now: datetime) -> str:
    """Jobs, newest first. `selected` is an id."""
    if not jobs:
        return NONE_YET
    cells = "".join(f"<th>{head}</th>" for head in _HEADS)
    rows = "".join(_row(job, selected, now) for job in jobs)
    return (
        f'<div class="okv-table-frame"><table class="okv-table okv-jobs"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def head(job: JobRecord, history: History, now: datetime) -> str:
    """What a job is, how far it is, and what ended it."""
    about = [f"<code>{escape(job.id)}</code>", f"priority {job.priority}"]
    if job.attempts > 1:
        about.append(f"attempt {job.attempts}")
    about.append(_age(job, now))
    facts = "".join(f"<span>{each}</span>" for each in about)
    error = fault(job.error) if job.error else ""
    return (
        f'<div class="okv-job"><div class="okv-card-head"><b>{escape(job.name)}</b>{state(job)}</div>'
        f'<div class="okv-made">{facts}</div>{_way(job, history)}{error}</div>'
    )


def state(job: JobRecord) -> str:
    """With what was asked of a job and is not done yet."""
    asked = "cancelling" if job.cancel_requested else "pausing" if job.pause_requested else None
    if asked is None or job.state in FINISHED:
        return badge(job.state, _TIPS[job.state])
    return badge(job.state, f"{asked}: its worker obeys within seconds") + (
        f'<span class="okv-muted">{asked} …</span>'
    )


def scores(metrics: Mapping[str, Any]) -> str:
    """Scores of the base and of the adapter on the same held-out rows, and how sure they are."""
    rows = "".join(_score(name, metrics) for name in ALL_SCORES if name in metrics)
    if not rows:
        return ""
    return (
        '<div class="okv-plain-frame"><table class="okv-plain"><thead><tr><th>Held-out rows</th><th>Base</th>'
        f"<th>Adapter</th><th>95 % interval</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def answers(job: JobRecord, asked: Sequence[Answers], medium: Medium) -> str:
    """Held-out rows with their media, what is expected, and what the adapter says at each look."""
    if not asked:
        return f'<div class="okv-empty okv-small">{_why_none(job)}</div>'
    return f'<div class="okv-answers">{"".join(_answers(each, medium) for each in asked)}</div>'


def lines(events: Sequence[JobEventRecord]) -> str:
    """What happened, newest first."""
    shown = "".join(_line(event) for event in reversed(events))
    return f'<ol class="okv-lines" tabindex="0">{shown}</ol>'


def settings(job: JobRecord) -> str:
    """What the job was told, without what it was not."""
    told = {name: value for name, value in job.spec.items() if value not in (None, {}, [])}
    return mapping(told)


def _row(job: JobRecord, selected: str, now: datetime) -> str:
    progress, metrics = job.progress or {}, (job.result or {}).get("metrics", {})
    cells = (
        f'<b class="okv-name">{escape(job.name)}</b>',
        state(job),
        _short_way(job),
        _number(metrics.get("train_loss", progress.get("loss"))),
        _number(metrics.get("loss")),
        str(job.priority),
        f'<time datetime="{job.created_at.isoformat()}" title="{job.created_at:%Y-%m-%d %H:%M} UTC">'
        f"{ago(job.created_at, now)}</time>",
    )
    filled = "".join(
        f'<td data-label="{label}">{cell}</td>' for label, cell in zip(("", *_HEADS[1:]), cells, strict=True)
    )
    chosen = str(job.id == selected).lower()
    return f'<tr data-ref="{escape(job.id)}" tabindex="0" aria-selected="{chosen}">{filled}</tr>'


def _short_way(job: JobRecord) -> str:
    if job.state == "succeeded":
        steps = (job.result or {}).get("steps")
        return f"{steps:,} steps" if steps is not None else ""
    if job.progress is None or job.state in FINISHED:
        return ""
    return f"{_bar(job.progress)}<span>{_done(job.progress)}</span>"


def _way(job: JobRecord, history: History) -> str:
    """How far a job is."""
    if job.state in FINISHED or (job.state != "running" and job.progress is None):
        return ""
    if job.progress is None:
        return '<div class="okv-way"><span class="okv-muted">starting: reading data and base …</span></div>'
    told = [f"{escape(str(job.progress.get('phase', '')))} {_done(job.progress)}"]
    if job.state == "running" and job.progress.get("phase") == "training":
        told += [f"loss {job.progress['loss']:.3f}"] if "loss" in job.progress else []
        left = history.seconds_left(int(job.progress["total"]))
        told += (
            [f"{job.progress['tokens_per_second']:,.0f} tokens/s"]
            if "tokens_per_second" in job.progress
            else []
        )
        told += [f"about {span(left)} left"] if left is not None else []
    return f'<div class="okv-way">{_bar(job.progress)}<span>{" · ".join(told)}</span></div>'


def _bar(progress: Mapping[str, Any]) -> str:
    done, total = progress.get("done", 0), max(1, progress.get("total", 1))
    return f'<progress value="{done}" max="{total}"></progress>'


def _done(progress: Mapping[str, Any]) -> str:
    return f'<span class="okv-number">{progress.get("done", 0):,}/{progress.get("total", 0):,}</span>'


def _age(job: JobRecord, now: datetime) -> str:
    if job.finished_at is None:
        return f"created {ago(job.created_at, now)}"
    took = f", after {span((job.finished_at - job.started_at).total_seconds())}" if job.started_at else ""
    return f"ended {ago(job.finished_at, now)}{took}"


def _number(value: Any) -> str:
    return f'<span class="okv-number">{value:.3f}</span>' if isinstance(value, int | float) else ""


def _score(name: str, metrics: Mapping[str, Any]) -> str:
    label, form, higher = ALL_SCORES[name]
    value, base = metrics[name], metrics.get(f"base_{name}")
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    interval = "–" if low is None or high is None else f"{form.format(low)} to {form.format(high)}"
    kind = ""
    if base is not None and low is not None and high is not None and not low <= base <= high:
        kind = "okv-good" if (base < value) == higher else "okv-bad"
    cells = (
        label,
        "–" if base is None else form.format(base),
        f'<b class="{kind}">{form.format(value)}</b>',
        interval,
    )
    first, *others = cells
    return (
        f"<tr><td>{first}</td>" + "".join(f'<td class="okv-number">{cell}</td>' for cell in others) + "</tr>"
    )


def _why_none(job: JobRecord) -> str:
    if not holds_out(job):
        return "The job holds no examples out, so it has no answers and no scores."
    if job.state in FINISHED:
        return "It ended before the first look at held-out examples."
    return "Answers come with the first look at held-out examples."


def _answers(asked: Answers, medium: Medium) -> str:
    media = "".join(medium(asked.line, digest) for digest in asked.media)
    newest = sorted(asked.by_step.items(), reverse=True)[:MOST_LOOKS]
    said = "".join(_said(step, text, asked.expected) for step, text in newest)
    return (
        f'<article class="okv-answer">{media}<div><p class="okv-muted">{escape(asked.question)}</p>'
        f"<dl><dt>expected</dt><dd>{escape(asked.expected)}</dd>{said}</dl></div></article>"
    )


def _said(step: int, text: str, expected: str) -> str:
    kind = "okv-good" if text.strip() == expected.strip() else ""
    return f'<dt>step {step:,}</dt><dd class="{kind}">{escape(text) or "<i>nothing</i>"}</dd>'


def _line(event: JobEventRecord) -> str:
    kind = "okv-bad" if event.level == "error" else "okv-state" if event.kind == "state" else ""
    more = "".join(_details(event))
    return (
        f'<li class="{kind}"><time datetime="{event.created_at.isoformat()}" title="UTC">'
        f"{event.created_at:%H:%M:%S}</time><span>{escape(event.message)}{more}</span></li>"
    )


def _details(event: JobEventRecord) -> Iterator[str]:
    data = event.data or {}
    if event.kind == "state" and "worker" in data:
        yield f' <span class="okv-muted">attempt {data["attempt"]} by {escape(str(data["worker"]))}</span>'
    if event.kind == "state" and "error" in data:
        yield f": {escape(str(data['error']).splitlines()[0])}"
