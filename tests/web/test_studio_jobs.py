"""What the training page shows of jobs: tables, curves, answers, sizes; nothing of theirs becomes markup."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from okavango.platform.catalog.records import JobEventRecord, JobRecord
from okavango.web.studio import job_tables
from okavango.web.studio.curves import curve, nice, smoothed, thinned
from okavango.web.studio.history import Answers, History
from okavango.web.studio.units import ago, size, span

EVIL = '<img src=x onerror="alert(1)">'
NOW = datetime(2026, 5, 1, 12, 30, tzinfo=UTC)


def job(**changes: Any) -> JobRecord:
    facts: dict[str, Any] = {
        "id": "job-0123456789ab",
        "kind": "train",
        "name": "titles",
        "spec": {"eval": "file-1", "lora": {"r": 16}, "system": None},
        "labels": {},
        "state": "running",
        "principal": "local",
        "worker": "host/1/x",
        "lease_until": NOW,
        "attempts": 1,
        "losses": 0,
        "priority": 2,
        "cancel_requested": False,
        "pause_requested": False,
        "progress": {"phase": "training", "done": 30, "total": 120, "loss": 1.5, "tokens_per_second": 1234.5},
        "result": None,
        "error": None,
        "created_at": NOW - timedelta(minutes=5),
        "updated_at": NOW,
        "started_at": NOW - timedelta(minutes=4),
        "finished_at": None,
    }
    return JobRecord(**{**facts, **changes})


def event(message: str, kind: str = "message", **data: Any) -> JobEventRecord:
    return JobEventRecord("job-0123456789ab", 1, kind, "info", message, data or None, NOW)


def test_nothing_of_a_job_becomes_markup() -> None:
    odd = job(name=EVIL, error=EVIL, state="failed", spec={EVIL: EVIL}, progress={"phase": EVIL})
    asked = Answers(1, EVIL, EVIL, (), {1: EVIL})
    page = "".join(
        (
            job_tables.table([odd], odd.id, NOW),
            job_tables.head(odd, History(), NOW),
            job_tables.head(job(progress={"phase": EVIL, "done": 1, "total": 2}), History(), NOW),
            job_tables.answers(odd, [asked], lambda line, digest: ""),
            job_tables.lines([event(EVIL), event("failed", "state", error=EVIL)]),
            job_tables.settings(odd),
        )
    )
    assert "onerror" in page
    assert "<img" not in page


def test_a_row_says_how_far_a_job_is() -> None:
    running, ended = (
        job(),
        job(id="job-2", state="succeeded", result={"steps": 120, "metrics": {"loss": 0.5}}),
    )
    page = job_tables.table([running, ended], ended.id, NOW)
    first, second = page.split("<tr data-ref=")[1:]
    for shown in ('<progress value="30" max="120">', "30/120", "1.500", "5 min ago"):
        assert shown in first
    for shown in ("120 steps", "0.500", 'aria-selected="true"'):
        assert shown in second
    assert 'aria-selected="true"' not in first


def test_the_head_tells_the_pace_and_what_was_asked() -> None:
    history = History()
    for step in (10, 30):
        history.times.append((step, NOW + timedelta(seconds=step)))
    text = job_tables.head(job(pause_requested=True, attempts=2), history, NOW)
    for shown in (
        "training",
        "1,234 tokens/s",
        "loss 1.500",
        "about 1 min 30 s left",
        "pausing …",
        "attempt 2",
    ):
        assert shown in text
    assert "left" not in job_tables.head(job(state="paused"), history, NOW)
    assert "starting" in job_tables.head(job(progress=None), history, NOW)
    assert "starting" not in job_tables.head(job(progress=None, state="paused"), history, NOW)
    ended = job(state="failed", error="line one\nline two", finished_at=NOW)
    assert "ended just now, after 4 min" in job_tables.head(ended, history, NOW)
    assert "line two" in job_tables.head(ended, history, NOW)


@pytest.mark.parametrize(
    ("name", "base", "value", "interval", "kind"),
    [
        ("chrf", 10.0, 30.0, (25.0, 35.0), "okv-good"),
        ("chrf", 40.0, 30.0, (25.0, 35.0), "okv-bad"),
        ("chrf", 28.0, 30.0, (25.0, 35.0), ""),
        ("wer", 0.9, 0.3, (0.2, 0.4), "okv-good"),
        ("wer", 0.1, 0.3, (0.2, 0.4), "okv-bad"),
    ],
)
def test_a_score_is_good_only_where_it_is_sure(
    name: str, base: float, value: float, interval: tuple[float, float], kind: str
) -> None:
    low, high = interval
    metrics = {name: value, f"base_{name}": base, f"{name}_low": low, f"{name}_high": high}
    assert f'<b class="{kind}">' in job_tables.scores(metrics)


def test_scores_that_nobody_counted_leave_no_table() -> None:
    assert job_tables.scores({"train_loss": 1.0}) == ""
    assert "25.0 to 35.0" in job_tables.scores({"chrf": 30.0, "chrf_low": 25.0, "chrf_high": 35.0})


def test_answers_newest_first_and_right_ones_marked() -> None:
    asked = Answers(7, "What?", "red fox", ("ab", "cd"), dict.fromkeys(range(1, 9), "fox") | {9: "red fox "})
    page = job_tables.answers(job(), [asked], lambda line, digest: f"[{line} {digest}]")
    assert "[7 ab][7 cd]" in page
    assert re.findall(r"step (\d)", page) == ["9", "8", "7", "6"]
    assert page.count("okv-good") == 1
    assert "holds no examples out" in job_tables.answers(job(spec={"eval": None}), [], lambda *_: "")


def test_a_curve_has_both_losses_its_ticks_and_what_the_mouse_is_told() -> None:
    page = curve({step: 4 / step for step in range(1, 61)}, {20: 1.0, 40: 0.5, 60: 0.75}, 100)
    for shown in ("okv-train", "okv-raw", "held-out loss <b>0.750</b>", "lowest 0.500 at step 40"):
        assert shown in page
    assert re.findall(r'okv-along"[^>]*>([\d,]+)<', page) == ["0", "20", "40", "60", "80", "100"]
    assert "step 20: training 0.200, held out 1.000" in page
    assert "begins with the first step" in curve({}, {}, 100)


@pytest.mark.parametrize("losses", [{1: 2.0}, {1: 0.0, 2: 0.0}, {5: 1e-9}, {1: 1e6, 2: 1.0}])
def test_a_curve_of_anything(losses: dict[int, float]) -> None:
    page = curve(losses, {}, 0)
    assert "nan" not in page
    assert "okv-up" in page


def test_long_curves_are_thinned_and_keep_their_mean() -> None:
    points = [(step, float(step % 7)) for step in range(1, 100_001)]
    found = thinned(points)
    assert len(found) <= 240
    assert found[-1][0] == 100_000
    assert sum(loss for _, loss in found) / len(found) == pytest.approx(3, abs=0.01)
    straight = [(float(i), 2.0 * i) for i in range(50)]
    assert smoothed(straight)[5:-5] == straight[5:-5]
    assert smoothed(straight)[-1] == (49.0, 2 * 46.5)


@pytest.mark.parametrize(("whole", "size_"), [(1, 0.2), (60, 20), (7, 2), (1000, 200), (0.034, 0.01)])
def test_ticks_are_round_numbers(whole: float, size_: float) -> None:
    assert nice(whole, 5) == pytest.approx(size_)


def test_sizes_and_times_in_few_words() -> None:
    assert [size(n) for n in (0, 950, 1234, 12_345_678, 2 << 30)] == [
        "0 B",
        "950 B",
        "1.23 kB",
        "12.3 MB",
        "2.15 GB",
    ]
    assert [span(s) for s in (0, 59.6, 90, 3600, 7500, 90_000)] == [
        "0 s",
        "1 min",
        "1 min 30 s",
        "1 h",
        "2 h 5 min",
        "1 d 1 h",
    ]
    assert [ago(NOW - timedelta(seconds=s), NOW) for s in (5, 60, 7300, 200_000)] == [
        "just now",
        "1 min ago",
        "2 h ago",
        "2 d ago",
    ]
