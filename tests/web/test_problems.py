"""One table: every error of ours has a status, and OpenAI's shape."""

from __future__ import annotations

import inspect

import pytest
from starlette.exceptions import HTTPException

from okavango.platform import errors
from okavango.platform.errors import (
    BindError,
    BusyError,
    ConflictError,
    DeadlineError,
    DownloadError,
    InputError,
    MediaError,
    NotFoundError,
    NotReadyError,
    OkavangoError,
)
from okavango.web.problems import HttpError, problem_of


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InputError("x"), 400, "invalid_request_error"),
        (MediaError("x"), 400, "invalid_request_error"),
        (NotFoundError("x"), 404, "invalid_request_error"),
        (ConflictError("x"), 409, "invalid_request_error"),
        (BusyError("x", retry_after=3), 429, "rate_limit_error"),
        (NotReadyError("x"), 503, "server_error"),
        (DownloadError("x"), 503, "server_error"),
        (DeadlineError("x"), 504, "server_error"),
        (BindError("x"), 500, "server_error"),
        (OkavangoError("x"), 500, "server_error"),
        (HttpError(413, "too_large", "x"), 413, "invalid_request_error"),
        (HTTPException(404), 404, "invalid_request_error"),
        (ValueError("x"), 500, "server_error"),
    ],
)
def test_classes_decide_the_status(error: Exception, status: int, kind: str) -> None:
    problem = problem_of(error, "req_1")
    assert (problem.status, problem.type) == (status, kind)
    assert set(problem.body["error"]) == {"message", "type", "param", "code"}


def test_every_class_of_the_tree_is_in_the_table() -> None:
    for _, cls in inspect.getmembers(errors, inspect.isclass):
        if issubclass(cls, OkavangoError):
            more = {"retry_after": 1.0} if issubclass(cls, BusyError) else {}
            problem = problem_of(cls("x", **more), "req_1")
            assert (problem.status, problem.code) != (500, "internal_error")
            assert problem.code == cls.code


def test_a_place_in_the_request_is_its_param() -> None:
    field = problem_of(InputError("is bad", where="messages[0].content[1].image_url.url"), "req_1")
    assert field.param == "messages[0].content[1].image_url.url"
    assert field.message == "messages[0].content[1].image_url.url: is bad"
    elsewhere = problem_of(NotFoundError("no such adapter", where="adapter 'x'"), "req_1")
    assert elsewhere.param is None
    assert elsewhere.message == "adapter 'x': no such adapter"


def test_what_is_the_servers_fault_keeps_its_places_to_itself() -> None:
    error = BindError("is missing", where="/home/someone/secret", remedy="delete /home/someone/secret")
    assert problem_of(error, "req_1").message == "is missing"
    problem = problem_of(RuntimeError("/home/someone/secret"), "req_1")
    assert "secret" not in problem.message
    assert "req_1" in problem.message


def test_headers_say_when_to_come_again() -> None:
    assert problem_of(BusyError("x", retry_after=0.2), "").headers == {"Retry-After": "1"}
    assert problem_of(BusyError("x", retry_after=2.1), "").headers == {"Retry-After": "3"}
    assert "Retry-After" in problem_of(NotReadyError("x"), "").headers
    assert problem_of(InputError("x"), "").headers == {}
