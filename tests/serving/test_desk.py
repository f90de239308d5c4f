"""Tickets between `submit` and their last event: plain Python and one lock."""

from __future__ import annotations

import threading
import time

import pytest

from okavango.modalities.prompt import Rendered
from okavango.platform.errors import BusyError, NotReadyError, OkavangoError
from okavango.serving.desk import Desk
from okavango.serving.tickets import Ticket
from okavango.serving.types import Request


def ticket(name: str = "r", deadline: float | None = None) -> Ticket:
    return Ticket(Request(name, Rendered((1,))), lambda event: None, 1, deadline)


def test_only_so_many_come_and_each_once():
    desk = Desk(2)
    first = ticket("a")
    desk.admit(first)
    with pytest.raises(OkavangoError, match="request a is already here"):
        desk.admit(ticket("a"))
    desk.admit(ticket("b"))
    with pytest.raises(BusyError, match="2 requests are here"):
        desk.admit(ticket("c"))
    assert desk.remove(first)
    assert not desk.remove(first)
    desk.admit(ticket("c"))
    assert [found.request.id for found in desk.all()] == ["b", "c"]


def test_a_ticket_that_left_is_not_taken_for_one_of_the_same_name():
    desk, gone, here = Desk(2), ticket("a"), ticket("a")
    desk.admit(gone)
    desk.remove(gone)
    desk.admit(here)
    assert not desk.remove(gone)
    assert desk.holds(here)
    assert not desk.holds(gone)
    assert desk.get("a") is here


def test_the_step_thread_hears_of_each_thing_once_and_of_the_last_pins():
    desk, one = Desk(2), ticket()
    desk.admit(one)
    desk.put(one)
    desk.pin({"a": 1})
    desk.pin({"b": 2})
    news = desk.wait(has_work=False)
    assert (news.inbox, news.overdue, news.pins) == ([one], [], {"b": 2})
    news = desk.wait(has_work=True)
    assert (news.inbox, news.overdue, news.pins) == ([], [], None)
    desk.pin({})
    assert desk.wait(has_work=False).pins == {}  # no pins are news, too


def test_who_waits_is_woken_by_a_deadline_that_comes_later():
    desk, heard = Desk(2), []
    thread = threading.Thread(target=lambda: heard.append(desk.wait(has_work=False)))
    thread.start()
    late = ticket(deadline=time.monotonic() + 0.01)
    desk.admit(late)
    thread.join(30)
    assert heard[0].overdue == [late]


def test_a_closed_desk_aborts_all_and_ends_when_that_is_heard():
    desk, one = Desk(2), ticket("a")
    desk.admit(one)
    desk.close("the first reason")
    desk.close("another")
    assert one.aborted
    with pytest.raises(NotReadyError, match="the first reason"):
        desk.admit(ticket("b"))
    assert desk.wait(has_work=False).inbox == [one, one]
    assert desk.wait(has_work=True) is not None
    assert desk.wait(has_work=False) is None


def test_what_a_ticket_begins_is_begun_before_the_desk_can_close():
    desk, begun = Desk(2), []

    def begin(taken: Ticket) -> None:
        thread = threading.Thread(target=desk.close, args=("closing",))
        thread.start()
        thread.join(0.05)
        begun.append((taken, taken.aborted, thread))

    one = ticket()
    desk.admit(one, begin)
    [(taken, was_aborted, thread)] = begun
    thread.join(30)
    assert (taken, was_aborted, one.aborted) == (one, False, True)


def test_an_abort_of_nobody_is_no_news():
    desk = Desk(2)
    desk.abort("nobody")
    desk.pin({"a": 1})
    assert desk.wait(has_work=False).inbox == []
