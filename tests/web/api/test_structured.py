"""What answers must look like, as callers say it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from server_fixtures import user

from okavango.modalities.content import Limits
from okavango.platform.errors import InputError
from okavango.serving.types import Guide
from okavango.web.api.chat_request import parse_chat

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}


def guide(**fields: Any) -> Guide | None:
    body = {"model": "tiny", "messages": user("hello"), **fields}
    return parse_chat(json.dumps(body).encode(), Limits()).params.guide


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": None, "structured_outputs": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Guide("json_schema", '{"type": "object"}')),
        ({"response_format": NAMED}, Guide("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"json": SCHEMA}}, Guide("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"json": "{}"}}, Guide("json_schema", "{}")),
        ({"structured_outputs": {"json_object": True}}, Guide("json_schema", '{"type": "object"}')),
        ({"structured_outputs": {"regex": "[ab]+"}}, Guide("regex", "[ab]+")),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Guide("grammar", 'start: "a"')),
    ],
)
def test_a_request_becomes_a_guide(fields: dict[str, Any], expected: Guide | None) -> None:
    assert guide(**fields) == expected


def test_a_choice_is_exactly_these() -> None:
    choices = ["yes", "a.b", "(c|d)*", "e\\f", "[g]{2}^$+?"]
    made = guide(structured_outputs={"choice": choices})
    assert made is not None
    assert all(re.fullmatch(made.text, choice) for choice in choices)
    assert not any(re.fullmatch(made.text, other) for other in ("axb", "c", "yesyes", ""))


@pytest.mark.parametrize(
    ("fields", "where", "said"),
    [
        ({"response_format": "json"}, "response_format", "object"),
        ({"response_format": {}}, "response_format", "type"),
        ({"response_format": {"type": "yaml"}}, "response_format", "'text', 'json_object', 'json_schema'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.name",
            "is missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "shema": {}}}},
            "response_format.json_schema.shema",
            "did you mean schema?",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "asks for 0 things"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "asks for 2 things"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "is not JSON"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "did you mean regex?"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "beside response_format",
        ),
        ({"guided_regex": "a"}, "guided_regex", "send structured_outputs"),
    ],
)
def test_a_fault_names_its_place(fields: dict[str, Any], where: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        guide(**fields)
    assert caught.value.where == where
