"""What an answer must look like, in OpenAI's words (response_format) and in vLLM's (structured_outputs)."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from okavango.platform.errors import InputError
from okavango.serving.types import Guide

_ANY_OBJECT = Guide("json_schema", '{"type": "object"}')


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["json_object"]


class JsonSchema(BaseModel):
    """`name`, `description` and `strict` change nothing: a schema is always kept to."""

    model_config = ConfigDict(extra="forbid")

    name: str
    description: str | None = None
    body: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(BaseModel):
    """Exactly one of them, as vLLM has it since 0.12."""

    model_config = ConfigDict(extra="forbid")

    schema_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = None


def guide_of(
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None,
    structured: StructuredOutputs | None,
) -> Guide | None:
    """The guide that a request asks for, if any.

    Raises:
        InputError: it asks for more than one, or for a schema that is none.
    """
    formatted = _formatted(response_format)
    if structured is None:
        return formatted
    if formatted is not None:
        raise InputError(
            "cannot be kept beside response_format", where="structured_outputs", remedy="send one of them"
        )
    return _structured(structured)


def _formatted(wanted: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> Guide | None:
    match wanted:
        case JsonObjectFormat():
            return _ANY_OBJECT
        case JsonSchemaFormat():
            schema = wanted.json_schema.body
            return _ANY_OBJECT if schema is None else Guide("json_schema", json.dumps(schema))
    return None


def _structured(wanted: StructuredOutputs) -> Guide:
    guides = [
        None if wanted.schema_ is None else Guide("json_schema", _schema_text(wanted.schema_)),
        _ANY_OBJECT if wanted.json_object else None,
        None if wanted.regex is None else Guide("regex", wanted.regex),
        None if wanted.choice is None else Guide("regex", _one_of(wanted.choice)),
        None if wanted.grammar is None else Guide("grammar", wanted.grammar),
    ]
    found = [guide for guide in guides if guide is not None]
    if len(found) != 1:
        raise InputError(
            f"asks for {len(found)} things",
            where="structured_outputs",
            remedy="send one of json, json_object, regex, choice and grammar",
        )
    return found[0]


def _schema_text(schema: dict[str, Any] | str) -> str:
    if isinstance(schema, dict):
        return json.dumps(schema)
    try:
        json.loads(schema)
    except ValueError as error:
        raise InputError(f"is not JSON: {error}", where="structured_outputs.json") from error
    return schema


def _one_of(choices: list[str]) -> str:
    """A regular expression for exactly these. Only what means something is escaped: dialects differ."""
    escaped = (re.sub(r"([\\.^$*+?{}\[\]|()])", r"\\\1", choice) for choice in choices)
    return f"({'|'.join(escaped)})"
