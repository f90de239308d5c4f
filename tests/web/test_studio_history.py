"""A job's history, folded from the events of a real catalog."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from okavango.platform.catalog.events import Event
from okavango.platform.catalog.store import Catalog, open_catalog
from okavango.platform.config import Settings
from okavango.web.studio.history import Histories, History

START = datetime(2026, 5, 1, 12, tzinfo=UTC)


def at_step(step: int, **data: float) -> Event:
    return Event(
        "metrics", f"step {step}", data={"step": step, **data}, at=START + timedelta(seconds=2 * step)
    )


def sample(step: int, answer: str) -> Event:
    data = {"step": step, "line": 3, "media": ["ab" * 32], "expected": "red fox", "answer": answer}
    return Event("sample", "fox.png What?", data=data)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = open_catalog(Settings(home=tmp_path / "home", cache=tmp_path / "cache"))
    yield opened
    opened.close()


@pytest.fixture
def job(catalog: Catalog) -> str:
    made = catalog.create_job("train", "titles", {})
    catalog.claim_job("worker", 60)
    return made.id


def read(catalog: Catalog, job: str) -> History:
    with Histories(catalog).reading(job) as history:
        return history


def test_what_happened_is_kept_by_kind(catalog: Catalog, job: str) -> None:
    events = [
        at_step(1, train_loss=3.0),
        at_step(2, train_loss=2.0),
        at_step(2, valid_loss=2.5),
        sample(2, "fox"),
        sample(4, "red fox"),
        Event("scores", "scores on what was held out", data={"loss": 1.5, "chrf": 30.0}),
    ]
    catalog.heartbeat(job, "worker", 60, events=events)
    history = read(catalog, job)
    assert history.losses == {1: 3.0, 2: 2.0}
    assert history.held_out == {2: 2.5}
    assert history.scores == {"loss": 1.5, "chrf": 30.0}
    [asked] = history.answers.values()
    assert (asked.question, asked.expected, asked.by_step) == (
        "fox.png What?",
        "red fox",
        {2: "fox", 4: "red fox"},
    )
    assert [line.message for line in history.lines] == ["queued", "running", "scores on what was held out"]


def test_each_event_is_read_once_and_steps_done_again_count_once(catalog: Catalog, job: str) -> None:
    histories = Histories(catalog)
    catalog.heartbeat(job, "worker", 60, events=[at_step(1, train_loss=3.0), at_step(2, train_loss=9.0)])
    with histories.reading(job) as history:
        assert history.losses[2] == 9.0
        last = history.last
    catalog.heartbeat(job, "worker", 60, events=[at_step(2, train_loss=2.0)])
    with histories.reading(job) as history:
        assert (history.losses, history.last) == ({1: 3.0, 2: 2.0}, last + 1)
        assert [line.message for line in history.lines] == ["queued", "running"]


def test_more_events_than_a_page_holds(catalog: Catalog, job: str) -> None:
    catalog.heartbeat(job, "worker", 60, events=[at_step(step, train_loss=1.0) for step in range(1, 2101)])
    assert len(read(catalog, job).losses) == 2100


def test_the_time_that_is_left_goes_by_the_last_steps(catalog: Catalog, job: str) -> None:
    catalog.heartbeat(job, "worker", 60, events=[at_step(1, train_loss=1.0)])
    assert read(catalog, job).seconds_left(10) is None
    catalog.heartbeat(job, "worker", 60, events=[at_step(step, train_loss=1.0) for step in range(2, 6)])
    assert read(catalog, job).seconds_left(10) == pytest.approx(10)
    assert read(catalog, job).seconds_left(3) == 0
