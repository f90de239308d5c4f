"""Guided answers: by a decoder of random weights, so that nothing but the guide can make them right."""

from __future__ import annotations

import json
import math
import re
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from okavango.modalities.tiny import byte_tokenizer
from okavango.platform.errors import InputError, UnsupportedError
from okavango.serving.sampling.guide import Guides, GuideState
from okavango.serving.sampling.state import Vocabulary
from okavango.serving.types import FinishReason, Guide, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 12},
        "price": {"type": "integer", "minimum": 0, "maximum": 9999},
        "tags": {"type": "array", "items": {"enum": ["new", "sale"]}, "maxItems": 3},
        "stock": {"type": ["boolean", "null"]},
    },
    "required": ["title", "price", "tags", "stock"],
    "additionalProperties": False,
}
ADAPTERS = [None, "r4", "r8", "r16"]


def schema_guide(schema: object = SCHEMA) -> Guide:
    return Guide("json_schema", json.dumps(schema))


def text_of(events) -> str:
    assert events[-1].error is None, events[-1].error
    return "".join(event.text for event in events)


def check(product: dict) -> None:
    """What the schema says, without a library of its own."""
    assert list(product) == ["title", "price", "tags", "stock"]
    assert isinstance(product["title"], str)
    assert len(product["title"]) <= 12
    assert type(product["price"]) is int
    assert 0 <= product["price"] <= 9999
    assert set(product["tags"]) <= {"new", "sale"}
    assert len(product["tags"]) <= 3
    assert product["stock"] in (True, False, None)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.8, 2.0]), st.sampled_from([20, 400]))
def test_an_answer_follows_its_schema_or_was_cut(harness, seed, temperature, max_tokens):
    params = SamplingParams(max_tokens, temperature, seed=seed, guide=schema_guide())
    requests = [harness.request(f"product {seed}", adapter, params=params) for adapter in ADAPTERS]
    for events in harness.run(requests):
        if events[-1].finish is FinishReason.STOP:
            check(json.loads(text_of(events)))
        else:
            assert events[-1].finish is FinishReason.LENGTH
            assert events[-1].usage.completion_tokens == max_tokens


def test_an_answer_ends_with_its_guide_and_not_before(harness):
    params = SamplingParams(400, 1.0, seed=4, guide=schema_guide(), min_tokens=399, ignore_eos=True)
    [events] = harness.run([harness.request("a product", params=params)])
    assert events[-1].finish is FinishReason.STOP
    assert events[-1].text.endswith("}")
    check(json.loads(text_of(events)))


@pytest.mark.parametrize(
    ("guide", "pattern"),
    [
        (
            Guide("regex", r"[A-Z]{2}-[0-9]{3}(, [A-Z]{2}-[0-9]{3}){1,2}"),
            r"[A-Z]{2}-\d{3}(, [A-Z]{2}-\d{3}){1,2}",
        ),
        (Guide("regex", "(grün|rot|😀)+!"), "(grün|rot|😀)+!"),
        (
            Guide("grammar", 'start: sum\nsum: NUMBER ("+" NUMBER)~1..3 "."\nNUMBER: /[1-9][0-9]?/'),
            r"\d{1,2}(\+\d{1,2}){1,3}\.",
        ),
    ],
)
def test_regex_and_grammar(harness, guide, pattern):
    requests = [
        harness.request("go", adapter, params=SamplingParams(200, 1.0, seed=seed, guide=guide))
        for seed in range(4)
        for adapter in (None, "r8")
    ]
    texts = [text_of(events) for events in harness.run(requests)]
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    assert len(set(texts)) > 1


def test_rows_without_a_guide_are_as_they_are_alone(harness):
    def mix(guided: bool) -> list:
        guides = [schema_guide(), Guide("regex", "[a-f]{30}"), Guide("grammar", 'start: ("x" | "yz")+')]
        return [
            harness.request(
                f"tell me more {i}",
                adapter,
                params=SamplingParams(30, (0.0, 0.9)[i % 2], seed=i, guide=guide if guided else None),
            )
            for i, adapter in enumerate(ADAPTERS)
            for guide in ([*guides] if guided else [None])
        ]

    alone = [harness.tokens([request])[0] for request in mix(guided=False)]
    guided = mix(guided=True)
    requests = [
        request for pair in zip(guided[:4], mix(guided=False), guided[4:8], strict=True) for request in pair
    ]
    assert harness.tokens(requests)[1::3] == alone
    # a guided answer does not depend on what shares its batch either
    assert harness.tokens(guided) == [harness.tokens([request])[0] for request in mix(guided=True)]


@pytest.mark.parametrize(
    "guide",
    [
        Guide("json_schema", "{"),
        Guide("json_schema", "[]"),
        Guide("json_schema", '"object"'),
        Guide("json_schema", '{"type": "objekt"}'),
        Guide("json_schema", '{"type": "object", "properties": 3}'),
        Guide("json_schema", '{"$ref": "http://localhost/x"}'),
        Guide("json_schema", '{"type": "string", "pattern": "("}'),
        Guide("json_schema", "[" * 100_000),
        Guide("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000),
        Guide("regex", "("),
        Guide("regex", "(?=a)b"),
        Guide("regex", "(" * 10_000 + ")" * 10_000),
        Guide("grammar", "start: nowhere"),
        Guide("grammar", "%%%"),
        Guide("grammar", 'elsewhere: "a"'),
    ],
    ids=lambda guide: f"{guide.kind}-{guide.text[:20]}",
)
def test_what_is_no_guide_is_refused_by_field(harness, guide):
    [events] = harness.run([harness.request("hi", params=SamplingParams(5, guide=guide))])
    error = events[-1].error
    assert type(error) is InputError
    assert error.where == "response_format"
    assert len(str(error)) < 500


def test_without_the_library_the_extra_is_named(harness, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    params = SamplingParams(5, guide=Guide("regex", "a"))
    [events] = harness.run([harness.request("hi", params=params)])
    assert isinstance(events[-1].error, UnsupportedError)
    assert "okavango[guided]" in events[-1].error.remedy


@pytest.fixture
def guides() -> Guides:
    """Over more logits than the tokenizer has tokens, as many decoders have."""
    tokenizer = byte_tokenizer()
    return Guides(tokenizer, Vocabulary(len(tokenizer) + 9, (tokenizer.eos_token_id,)))


def allowed(state: GuideState) -> set[int]:
    assert set(state.mask().tolist()) == {0, -math.inf}
    return set((state.mask() == 0).nonzero()[:, 0].tolist())


def test_a_mask_has_every_logit_and_the_end_where_the_answer_may_end(guides):
    tokenizer = byte_tokenizer()
    state = guides.start(Guide("regex", "a?b*"))
    [a], [b] = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in "ab")
    end = tokenizer.eos_token_id
    assert state.mask().shape == (len(tokenizer) + 9,)
    assert allowed(state) == {a, b, end}
    state.accept(a)
    assert allowed(state) == {b, end}
    assert not state.is_complete
    state.accept(end)
    assert state.is_complete


def test_answers_of_one_guide_do_not_share_a_place(guides):
    first, second = (guides.start(Guide("regex", "ab")) for _ in range(2))
    [token] = allowed(first)
    first.accept(token)
    assert allowed(second) == {token} != allowed(first)


def test_a_token_that_is_not_allowed_is_an_error_of_its_own(guides):
    state = guides.start(Guide("regex", "ab"))
    state.accept(0)
    assert not state.is_complete
    with pytest.raises(Exception, match="guide cannot be followed"):
        state.mask()
