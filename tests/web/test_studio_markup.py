"""What the studio writes into a page: escaped, whole where it is copied, and in words for people."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from okavango.platform.catalog.records import AdapterRecord, AliasRecord, VersionRecord
from okavango.platform.errors import BusyError, InputError, NotFoundError
from okavango.web.studio.bubbles import bubbles, provenance
from okavango.web.studio.conversation import Provenance, Turn
from okavango.web.studio.markup import digest, mapping
from okavango.web.studio.scores import scores_of
from okavango.web.studio.tables import details, promotion, table
from okavango.web.studio.wording import explain

EVIL = '<img src=x onerror="alert(1)">'
NOW = datetime(2026, 5, 1, 12, 30, tzinfo=UTC)


def version(**changes: Any) -> VersionRecord:
    facts: dict[str, Any] = {
        "adapter": "emoji",
        "version": 2,
        "digest": "ab" * 32,
        "base": "tiny",
        "base_digest": "cd" * 32,
        "components": {"decoder": "ef" * 32},
        "modalities": ("image",),
        "lineage": {},
        "metrics": {},
        "state": "ready",
        "verification": None,
        "error": None,
        "principal": "local",
        "job_id": None,
        "created_at": NOW,
        "updated_at": NOW,
    }
    return VersionRecord(**{**facts, **changes})


def adapter(*versions: VersionRecord, prod: int | None = None) -> AdapterRecord:
    aliases = () if prod is None else (AliasRecord("emoji", "prod", prod, None, NOW),)
    return AdapterRecord("emoji", "tiny", NOW, versions, aliases)


@pytest.mark.parametrize(
    "field", ["lineage", "metrics", "verification", "error", "job_id", "principal", "base", "components"]
)
def test_nothing_that_a_bundle_says_becomes_markup(field: str) -> None:
    value = (
        {EVIL: EVIL, "deep": {EVIL: [EVIL]}}
        if field not in {"error", "job_id", "principal", "base"}
        else EVIL
    )
    odd = version(**{field: value})
    page = details(adapter(odd), odd) + table([adapter(odd)], odd.ref) + promotion(adapter(odd), odd)
    assert "onerror" in page
    assert "<img" not in page


def test_nothing_that_a_model_says_becomes_markup_in_its_line() -> None:
    line = provenance(Provenance(EVIL, "ab" * 32, 1, 1, 0.1, None, notes=(EVIL,)), f'{EVIL}"\n\n--><b>')
    assert "<img" not in line
    assert "<b>" not in line


def test_a_digest_is_short_to_the_eye_and_whole_to_the_clipboard() -> None:
    html = digest("ab" * 32)
    assert f">{'ab' * 6}<" in html
    assert f'data-copy="{"ab" * 32}"' in html


def test_versions_newest_first_with_aliases_and_scores() -> None:
    first = version(version=1, digest="12" * 32, metrics={"loss": 1.5, "chrf": 28.43, "exact_match": 0.034})
    page = table([adapter(first, version(), prod=1)], "emoji@1")
    newest, oldest = page.index('data-ref="emoji@2"'), page.index('data-ref="emoji@1"')
    assert newest < oldest
    assert page.count('aria-selected="true"') == 1
    for shown in ("1.500", "28.4", "3.4%", ">prod<"):
        assert shown in page[oldest:]
        assert shown not in page[newest:oldest]


def test_an_empty_catalog_says_how_to_fill_it() -> None:
    assert "okavango train" in table([], "")


def test_scores_that_are_not_there_are_left_empty() -> None:
    assert scores_of({"chrf": 12.34, "bleu4": "nonsense"}) == [
        ("Loss", ""),
        ("BLEU-4", ""),
        ("chrF", "12.3"),
        ("Exact match", ""),
        ("Word errors", ""),
        ("R@1", ""),
    ]


def test_promotion_says_what_would_change() -> None:
    assert "is emoji@1. From now on" in promotion(adapter(version(version=1), version(), prod=1), version())
    assert "will be answered by" in promotion(adapter(version()), version())


def test_nested_values_have_dotted_names() -> None:
    html = mapping({"data": {"rows": 12, "digest": "ab" * 32}, "rate": 0.00123456, "none": None})
    for shown in ("data.rows", "12", "okv-digest", "0.001235", "–"):
        assert shown in html


def test_a_turn_without_an_answer_shows_its_fault_alone() -> None:
    asked, failed = bubbles((Turn("What?", fault="No <such> model."),))
    assert asked == {"role": "user", "content": [{"type": "text", "text": "What?"}]}
    assert "No &lt;such&gt; model." in failed["content"][0].value


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("must be 1", where="messages[0].content"), "Must be 1."),
        (NotFoundError("emoji@2 is gone", remedy="name another"), "emoji@2 is gone. Name another."),
        (BusyError("9 calls are here", retry_after=2), "9 calls are here. Send it again in a moment."),
        (RuntimeError("secret"), "The server failed; its log tells why under request r1."),
    ],
)
def test_errors_in_whole_sentences(error: Exception, said: str) -> None:
    assert explain(error, "r1") == said
