from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from okavango.platform.catalog import migrate
from okavango.platform.catalog.database import make_engine, parse_url
from okavango.platform.catalog.store import Catalog
from okavango.platform.cli import app

Run = Callable[..., Any]


def runner(monkeypatch: pytest.MonkeyPatch, url: str) -> Run:
    monkeypatch.setenv("OKAVANGO_DATABASE_URL", url)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.fixture
def okavango(monkeypatch: pytest.MonkeyPatch, catalog_url: str) -> Run:
    return runner(monkeypatch, catalog_url)


def cells(output: str) -> list[list[str]]:
    """The rows of a table, its head among them."""
    rows = [line for line in output.splitlines() if line[:1] in "│┃"]
    return [[cell.strip() for cell in row.replace("┃", "│").split("│")[1:-1]] for row in rows]


def test_list_says_what_each_name_is_now(okavango: Run, catalog: Catalog, register: Any) -> None:
    register("emoji", "v1", state="ready", metrics={"chrf": 21.456, "note": "text"})
    register("emoji", "v2")
    catalog.promote("emoji", 1)
    register("tickets", "v1", metrics={})
    register("zebra", "v1", state="refused")
    done = okavango("adapters", "list")
    assert done.exit_code == 0
    head, *rows = cells(done.output)
    assert head == ["adapter", "base", "is now", "state", "aliases", "scores", "made (UTC)"]
    assert rows == [
        ["emoji", "starter", "@1", "ready", "prod → 1", "chrf 21.46", "2026-01-01 00:00"],
        ["tickets", "starter", "@1", "registered", "", "", "2026-01-01 00:00"],
        ["zebra", "starter", "none", "", "", "", ""],
    ]


def test_an_empty_list_says_how_to_fill_it(okavango: Run) -> None:
    assert "okavango train" in okavango("adapters", "list").output
    assert json.loads(okavango("adapters", "list", "--json").output) == []


def test_list_for_programs(okavango: Run, catalog: Catalog, register: Any) -> None:
    register("emoji", "v1", state="ready")
    catalog.promote("emoji", 1)
    (adapter,) = json.loads(okavango("adapters", "list", "--json").output)
    assert (adapter["name"], adapter["created_at"]) == ("emoji", "2026-01-01T00:00:00+00:00")
    assert adapter["versions"][0]["metrics"] == {"chrf": 21.5}
    assert adapter["aliases"][0]["version"] == 1


def test_show_an_adapter(okavango: Run, catalog: Catalog, register: Any) -> None:
    register("emoji", "0123456789abcdef", state="ready")
    register("emoji", "v2")
    catalog.set_version_state("emoji", 2, "refused", error="[2] tensors did not bind")
    catalog.promote("emoji", 1)
    done = okavango("adapters", "show", "emoji")
    assert done.output.startswith("emoji, an adapter of starter")
    assert [row[:4] + row[6:] for row in cells(done.output)[1:]] == [
        ["1", "ready", "prod", "0123456789ab", ""],
        ["2", "refused", "", "v2", "[2] tensors did not bind"],
    ]


def test_show_a_version(okavango: Run, catalog: Catalog, register: Any) -> None:
    register("emoji", "v1", state="bound", lineage={"data": "t1"})
    shown = okavango("adapters", "show", "emoji@1").output
    assert '"data": "t1"' in shown
    assert "bound" in shown
    version = json.loads(okavango("adapters", "show", "emoji@1", "--json").output)
    assert (version["lineage"], version["state"], version["verification"]) == ({"data": "t1"}, "bound", None)


def test_promote(okavango: Run, catalog: Catalog, register: Any) -> None:
    for digest in ("v1", "v2"):
        register("emoji", digest, state="ready")
    assert okavango("adapters", "promote", "emoji@1").output == "emoji@prod is emoji@1\n"
    assert (
        okavango("adapters", "promote", "emoji@2", "--alias", "canary").output == "emoji@canary is emoji@2\n"
    )
    assert (
        okavango("adapters", "promote", "emoji@canary").output == "emoji@prod is emoji@2 (before: emoji@1)\n"
    )
    assert catalog.resolve("emoji").version == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "emojy"], "did you mean emoji?"),
        (["show", "emoji@7"], "versions: 1"),
        (["promote", "emoji"], "write emoji@3"),
        (["promote", "emoji@1"], "is not verified yet"),
        (["promote", "emoji@1", "--alias", "3"], "reads as a version number"),
    ],
)
def test_mistakes(okavango: Run, register: Any, arguments: list[str], message: str) -> None:
    register("emoji", "v1")
    done = okavango("adapters", *arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stdout == ""


def test_upgrade_and_check(monkeypatch: pytest.MonkeyPatch, empty_url: str) -> None:
    okavango = runner(monkeypatch, empty_url)
    refused = okavango("db", "check")
    assert refused.exit_code == 1
    assert "run `okavango db upgrade`" in refused.stderr
    for _ in range(2):
        done = okavango("db", "upgrade")
        assert (done.exit_code, done.output) == (0, f"The catalog is at revision {migrate.head()}.\n")
    assert okavango("db", "check").exit_code == 0
    with make_engine(parse_url(empty_url)).begin() as connection:
        connection.execute(text("ALTER TABLE jobs ADD COLUMN stray INTEGER"))
    broken = okavango("db", "check")
    assert broken.exit_code == 1
    assert "stray" in broken.stderr


def test_a_shared_database_has_to_be_upgraded_first(
    monkeypatch: pytest.MonkeyPatch, postgres_url: str
) -> None:
    okavango = runner(monkeypatch, postgres_url)
    assert "okavango db upgrade" in okavango("adapters", "list").stderr
    assert okavango("db", "upgrade").exit_code == 0
    assert okavango("adapters", "list").exit_code == 0
