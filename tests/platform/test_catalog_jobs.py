from __future__ import annotations

import math
import re
from typing import Any

import pytest

from okavango.platform.catalog.events import Event
from okavango.platform.catalog.jobs import MOST_LOSSES
from okavango.platform.catalog.records import JobRecord
from okavango.platform.catalog.store import Catalog
from okavango.platform.errors import BusyError, ConflictError, InputError, NotFoundError

LEASE = 60.0


def queue(catalog: Catalog, name: str = "emoji", principal: str = "ana", **options: Any) -> JobRecord:
    return catalog.create_job("train", name, {"rank": 16}, principal=principal, **options)


def told(catalog: Catalog, job_id: str) -> list[str]:
    events = catalog.list_events(job_id)
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    return [event.message for event in events]


def test_a_new_job_waits(catalog: Catalog, clock: Any) -> None:
    job = queue(catalog)
    assert re.fullmatch(r"job-[0-9a-f]{12}", job.id)
    assert (job.kind, job.name, job.spec, job.principal) == ("train", "emoji", {"rank": 16}, "ana")
    assert (job.state, job.worker, job.lease_until, job.attempts) == ("queued", None, None, 0)
    assert (job.created_at, job.started_at, job.finished_at) == (clock.now, None, None)
    assert catalog.get_job(job.id) == job


def test_a_spec_is_json(catalog: Catalog) -> None:
    with pytest.raises(InputError, match=r"^spec: "):
        catalog.create_job("train", "emoji", {"rate": math.inf})


def test_jobs_are_claimed_in_order(catalog: Catalog, clock: Any) -> None:
    created = []
    for name in ("a", "b", "c"):
        created.append(queue(catalog, name).id)
        clock.advance(1)
    assert [catalog.claim_job("w", LEASE).id for _ in created] == created
    assert catalog.claim_job("w", LEASE) is None


def test_a_claim_is_a_lease(catalog: Catalog, clock: Any) -> None:
    job = queue(catalog)
    clock.advance(5)
    held = catalog.claim_job("w", LEASE)
    assert (held.id, held.state, held.worker, held.attempts) == (job.id, "running", "w", 1)
    assert (held.lease_until - clock.now).total_seconds() == LEASE
    assert held.started_at == clock.now


def test_one_job_can_be_asked_for(catalog: Catalog) -> None:
    first, second = queue(catalog), queue(catalog)
    assert catalog.claim_job("w", LEASE, second.id).id == second.id
    assert catalog.claim_job("v", LEASE, second.id) is None
    assert catalog.claim_job("v", LEASE).id == first.id
    with pytest.raises(NotFoundError, match="no such job"):
        catalog.claim_job("w", LEASE, "job-0")


def test_a_heartbeat_keeps_the_lease(catalog: Catalog, clock: Any) -> None:
    job = queue(catalog)
    catalog.claim_job("w", LEASE)
    for step in range(5):
        clock.advance(LEASE - 1)
        held = catalog.heartbeat(job.id, "w", LEASE, {"step": step})
        assert catalog.claim_job("v", LEASE) is None
    assert held.progress == {"step": 4}
    assert catalog.heartbeat(job.id, "w", LEASE).progress == {"step": 4}  # no news keeps the old


@pytest.mark.parametrize("late", [0, 1])
def test_a_silent_worker_loses_its_job(catalog: Catalog, clock: Any, late: int) -> None:
    job = queue(catalog)
    catalog.claim_job("w", LEASE)
    catalog.heartbeat(job.id, "w", LEASE, {"step": 7})
    clock.advance(LEASE + late)
    taken = catalog.claim_job("v", LEASE)
    assert (taken.id, taken.worker, taken.attempts, taken.progress) == (job.id, "v", 2, {"step": 7})
    for lost in (
        lambda: catalog.heartbeat(job.id, "w", LEASE),
        lambda: catalog.finish_job(job.id, "w", "succeeded"),
        lambda: catalog.release_job(job.id, "w"),
    ):
        with pytest.raises(ConflictError, match="taken over by v"):
            lost()
    assert catalog.get_job(job.id) == taken


def test_a_late_worker_keeps_what_nobody_took(catalog: Catalog, clock: Any) -> None:
    """A laptop that slept goes on."""
    job = queue(catalog)
    catalog.claim_job("w", LEASE)
    clock.advance(LEASE * 10)
    assert catalog.heartbeat(job.id, "w", LEASE).state == "running"
    assert catalog.claim_job("v", LEASE) is None


@pytest.mark.parametrize(
    ("state", "result", "error"),
    [("succeeded", {"version": "emoji@1"}, None), ("failed", None, "no space"), ("cancelled", None, None)],
)
def test_a_job_ends_once(catalog: Catalog, clock: Any, state: str, result: Any, error: Any) -> None:
    job = queue(catalog)
    catalog.claim_job("w", LEASE)
    clock.advance(30)
    done = catalog.finish_job(job.id, "w", state, result=result, error=error)
    assert (done.state, done.result, done.error) == (state, result, error)
    assert (done.finished_at, done.lease_until, done.worker) == (clock.now, None, "w")
    with pytest.raises(ConflictError, match=f"is {state}"):
        catalog.finish_job(job.id, "w", "succeeded")
    with pytest.raises(ConflictError, match=f"is {state} and cannot become cancelled"):
        catalog.request_cancel(job.id)
    clock.advance(LEASE * 10)
    assert catalog.claim_job("v", LEASE) is None


def test_only_its_worker_ends_a_job(catalog: Catalog) -> None:
    job = queue(catalog)
    with pytest.raises(ConflictError, match="is queued"):
        catalog.finish_job(job.id, "w", "succeeded")
    with pytest.raises(NotFoundError):
        catalog.finish_job("job-0", "w", "succeeded")


def test_a_released_job_is_kept_for_resuming(catalog: Catalog, clock: Any) -> None:
    job = queue(catalog)
    first = catalog.claim_job("w", LEASE)
    catalog.heartbeat(job.id, "w", LEASE, {"step": 7})
    released = catalog.release_job(job.id, "w")
    assert (released.state, released.lease_until, released.progress) == ("queued", None, {"step": 7})
    clock.advance(5)
    again = catalog.claim_job("v", LEASE, job.id)
    assert (again.attempts, again.started_at) == (2, first.started_at)


def test_a_waiting_job_is_cancelled_at_once(catalog: Catalog, clock: Any) -> None:
    job = queue(catalog)
    done = catalog.request_cancel(job.id)
    assert (done.state, done.finished_at) == ("cancelled", clock.now)
    assert catalog.claim_job("w", LEASE) is None


def test_a_running_job_is_asked_to_stop(catalog: Catalog) -> None:
    job = queue(catalog)
    assert not catalog.claim_job("w", LEASE).cancel_requested
    assert catalog.request_cancel(job.id).state == "running"
    assert catalog.request_cancel(job.id).cancel_requested  # asking twice is no error
    assert catalog.heartbeat(job.id, "w", LEASE).cancel_requested
    assert catalog.finish_job(job.id, "w", "cancelled").state == "cancelled"


def test_giving_back_a_job_that_is_to_stop_ends_it(catalog: Catalog, clock: Any) -> None:
    job = queue(catalog)
    catalog.claim_job("w", LEASE)
    catalog.request_cancel(job.id)
    released = catalog.release_job(job.id, "w")
    assert (released.state, released.finished_at) == ("cancelled", clock.now)


def test_a_dead_workers_job_is_cancelled_without_it(catalog: Catalog, clock: Any) -> None:
    silent, asked = queue(catalog), queue(catalog)
    for job in (silent, asked):
        catalog.claim_job("w", LEASE, job.id)
    catalog.request_cancel(asked.id)
    clock.advance(LEASE)
    assert catalog.request_cancel(silent.id).state == "cancelled"
    assert catalog.claim_job("v", LEASE) is None
    assert catalog.get_job(asked.id).state == "cancelled"


def test_jobs_are_listed_newest_first(catalog: Catalog, clock: Any) -> None:
    created = []
    for name in ("a", "b", "c"):
        created.append(queue(catalog, name).id)
        clock.advance(1)
    catalog.claim_job("w", LEASE)
    assert [job.id for job in catalog.list_jobs()] == created[::-1]
    assert [job.id for job in catalog.list_jobs("queued")] == [created[2], created[1]]
    assert [job.id for job in catalog.list_jobs("running")] == [created[0]]


def test_an_unknown_job_names_its_neighbours(catalog: Catalog) -> None:
    with pytest.raises(NotFoundError, match="there is no job yet"):
        catalog.get_job("job-0")
    job = queue(catalog)
    with pytest.raises(NotFoundError, match=f"did you mean {job.id}"):
        catalog.get_job(job.id[:-1])


def test_what_is_urgent_goes_first(catalog: Catalog, clock: Any) -> None:
    created = {}
    for name, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 5)):
        created[name] = queue(catalog, name, priority=priority).id
        clock.advance(1)
    claimed = [catalog.claim_job(f"w{i}", LEASE).id for i in range(4)]
    assert claimed == [created[name] for name in "bdac"]


def test_principals_take_turns(catalog: Catalog, clock: Any) -> None:
    for i in range(3):
        queue(catalog, f"ana {i}")
        clock.advance(1)
    queue(catalog, "bo", "bo")
    assert [catalog.claim_job(f"w{i}", LEASE).name for i in range(3)] == ["ana 0", "bo", "ana 1"]


def test_a_principal_has_so_many_running(catalog: Catalog, clock: Any) -> None:
    jobs = [queue(catalog, f"ana {i}").id for i in range(3)]
    assert catalog.claim_job("v", LEASE, most_running=1) is not None
    assert catalog.claim_job("w", LEASE, most_running=1) is None
    assert queue(catalog, "bo", "bo").id == catalog.claim_job("w", LEASE, most_running=1).id
    (running,) = (job for job in catalog.list_jobs("running", principal="ana"))
    catalog.finish_job(running.id, "v", "succeeded")
    assert catalog.claim_job("x", LEASE, most_running=1).id in jobs


def test_a_principal_has_so_many_open(catalog: Catalog) -> None:
    first = queue(catalog, most_open=2)
    queue(catalog, most_open=2)
    with pytest.raises(BusyError, match="2 jobs of yours") as refused:
        queue(catalog, most_open=2)
    assert refused.value.retry_after > 0
    queue(catalog, "bo", "bo", most_open=2)
    catalog.request_cancel(first.id)
    queue(catalog, most_open=2)


def test_a_waiting_job_is_set_aside_and_taken_up(catalog: Catalog) -> None:
    job = queue(catalog)
    assert catalog.request_pause(job.id).state == "paused"
    assert catalog.request_pause(job.id).state == "paused"
    assert catalog.claim_job("w", LEASE) is None
    assert catalog.resume_job(job.id).state == "queued"
    with pytest.raises(ConflictError, match="is queued, and not paused"):
        catalog.resume_job(job.id)
    assert catalog.claim_job("w", LEASE).id == job.id
    assert told(catalog, job.id) == ["queued", "paused", "queued", "running"]


def test_a_running_job_is_set_aside_by_its_worker(catalog: Catalog) -> None:
    job = queue(catalog)
    catalog.claim_job("w", LEASE)
    asked = catalog.request_pause(job.id)
    assert (asked.state, asked.pause_requested) == ("running", True)
    assert catalog.heartbeat(job.id, "w", LEASE).pause_requested
    paused = catalog.release_job(job.id, "w")
    assert (paused.state, paused.pause_requested) == ("paused", False)
    assert catalog.request_cancel(job.id).state == "cancelled"


def test_a_pause_can_be_taken_back(catalog: Catalog) -> None:
    job = queue(catalog)
    catalog.claim_job("w", LEASE)
    catalog.request_pause(job.id)
    assert not catalog.resume_job(job.id).pause_requested
    assert catalog.release_job(job.id, "w").state == "queued"


def test_who_was_to_be_cancelled_is_not_paused(catalog: Catalog) -> None:
    job = queue(catalog)
    catalog.claim_job("w", LEASE)
    catalog.request_pause(job.id)
    catalog.request_cancel(job.id)
    assert catalog.release_job(job.id, "w").state == "cancelled"


def test_a_dead_workers_job_is_paused_without_it(catalog: Catalog, clock: Any) -> None:
    job = queue(catalog)
    catalog.claim_job("w", LEASE)
    catalog.request_pause(job.id)
    clock.advance(LEASE + 1)
    assert catalog.claim_job("v", LEASE) is None
    assert catalog.get_job(job.id).state == "paused"


def test_a_job_that_kills_its_workers_fails(catalog: Catalog, clock: Any) -> None:
    job = queue(catalog)
    for i in range(MOST_LOSSES - 1):
        assert catalog.claim_job(f"w{i}", LEASE).losses == i
        clock.advance(LEASE + 1)
    assert catalog.claim_job("x", LEASE).losses == MOST_LOSSES - 1
    failed = catalog.lose_job(job.id, "x", "its process ended by signal 9")
    assert (failed.state, failed.losses) == ("failed", MOST_LOSSES)
    assert failed.error.startswith("its process ended by signal 9")
    assert told(catalog, job.id)[-1] == "failed"


def test_a_job_that_nobody_is_heard_of_again_fails_too(catalog: Catalog, clock: Any) -> None:
    job = queue(catalog)
    for i in range(MOST_LOSSES):
        assert catalog.claim_job(f"w{i}", LEASE).id == job.id
        clock.advance(LEASE + 1)
    assert catalog.claim_job("x", LEASE) is None
    assert "not heard of" in catalog.get_job(job.id).error


def test_giving_back_is_no_loss(catalog: Catalog) -> None:
    job = queue(catalog)
    for i in range(2 * MOST_LOSSES):
        catalog.claim_job(f"w{i}", LEASE)
        catalog.release_job(job.id, f"w{i}")
    assert (catalog.get_job(job.id).state, catalog.get_job(job.id).losses) == ("queued", 0)


def test_events_come_with_heartbeats_and_in_pages(catalog: Catalog, clock: Any) -> None:
    job = queue(catalog)
    catalog.claim_job("w", LEASE)
    early = clock.now
    clock.advance(3)
    events = [Event("metrics", f"step {i}", data={"loss": i / 2}, at=early) for i in range(5)]
    catalog.heartbeat(job.id, "w", LEASE, events=[*events, Event("message", "odd", "warn")])
    found = catalog.list_events(job.id)
    assert [event.number for event in found] == list(range(1, 9))
    assert (found[2].kind, found[2].data, found[2].created_at) == ("metrics", {"loss": 0.0}, early)
    assert (found[-1].level, found[-1].data, found[-1].created_at) == ("warn", None, clock.now)
    assert [event.number for event in catalog.list_events(job.id, after=5)] == [6, 7, 8]
    newest = catalog.list_events(job.id, newest_first=True, limit=2, before=8)
    assert [event.number for event in newest] == [7, 6]
    assert [event.number for event in catalog.list_events(job.id, kind="metrics", after=4)] == [5, 6, 7]
    with pytest.raises(ConflictError):
        catalog.heartbeat(job.id, "v", LEASE, events=events)
    assert len(catalog.list_events(job.id)) == 8
    assert catalog.list_events("job-0") == ()


def test_jobs_are_their_principals(catalog: Catalog, clock: Any) -> None:
    mine = []
    for i in range(3):
        mine.append(queue(catalog, f"a{i}").id)
        clock.advance(1)
    other = queue(catalog, "b", "bo").id
    assert [job.id for job in catalog.list_jobs(principal="ana")] == mine[::-1]
    assert [job.id for job in catalog.list_jobs(principal="ana", after=mine[2], limit=1)] == [mine[1]]
    assert catalog.get_job(other).principal == "bo"
    for call in (
        lambda: catalog.get_job(other, principal="ana"),
        lambda: catalog.list_jobs(principal="ana", after=other),
    ):
        with pytest.raises(NotFoundError):
            call()


def test_labels_are_kept(catalog: Catalog) -> None:
    job = queue(catalog, labels={"team": "shop"})
    assert catalog.get_job(job.id).labels == {"team": "shop"}
    assert queue(catalog).labels == {}
