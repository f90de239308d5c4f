"""The studio in Debian's chromium, against the real server over the tiny base."""

from __future__ import annotations

import queue
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser_fixtures import Visits, add_file, answers, ask, choose
from playwright.sync_api import Locator, Page, expect
from server_fixtures import ENGINE, RunningServer, Site, make_site, wait_until
from tiny_fixtures import Bundles

from okavango.modalities.base import Base
from okavango.modalities.content import Media, Message, Text
from okavango.modalities.tiny_bundle import picture_bytes, write_tiny_bundle
from okavango.platform.errors import BusyError
from okavango.serving.types import AdapterRef, Event, Request, SamplingParams
from okavango.web.services import ServeOptions
from okavango.web.studio.picker import first_choice

pytestmark = pytest.mark.browser
PICTURE = picture_bytes(11)
FAULT = "#okv-conversation .okv-fault"
SCORES = {"loss": 1.8342, "bleu4": 11.21, "chrf": 28.43, "exact_match": 0.034}
LINEAGE = {"base": "tiny", "data": {"rows": 1243}, "spec": {"rank": 8}}


@pytest.fixture(scope="module")
def studio_site(tiny_base: Base, tiny_bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = make_site(tmp_path_factory.mktemp("studio"), tiny_base)
    site.publish("r8", tiny_bundles.folders["r8"], metrics=SCORES, lineage=LINEAGE)
    site.publish("r8", tiny_bundles.folders["r16"], metrics={"chrf": 31.4})
    spoiled = tmp_path_factory.mktemp("spoiled") / "bundle"
    write_tiny_bundle(spoiled, tiny_base, seed=9, targets=["embed_tokens"], head=False)
    site.publish("spoiled", spoiled)
    return site


@pytest.fixture(scope="module")
def studio(studio_site: Site) -> Iterator[RunningServer]:
    running = RunningServer(studio_site, ServeOptions(engine=ENGINE), studio=True)
    wait_until(lambda: not running.services.catalog.versions("registered"))
    yield running
    running.stop()


@pytest.fixture
def page(studio: RunningServer, open_page: Visits) -> Page:
    return open_page(studio.url)


def add_picture(page: Page, data: bytes, name: str = "picture.png") -> None:
    add_file(page, data, name, "image/png")


def clear(page: Page) -> None:
    page.click("#okv-clear")
    expect(page.locator("#okv-conversation .message-row")).to_have_count(0)


def fill(field: Locator, value: str) -> None:
    """Type into a field under Sampling; again where the page, still settling, sets it back."""
    for _ in range(10):
        field.fill(value)
        field.press("Tab")
        field.page.wait_for_timeout(500)
        if field.input_value() == value:
            break
    expect(field).to_have_value(value)


def set_max_tokens(page: Page, count: int) -> None:
    page.click("text=Sampling")
    fill(page.get_by_label("number input for Max tokens"), str(count))
    expect(page.get_by_label("range slider for Max tokens")).to_have_value(str(count))


def from_engine(
    server: RunningServer, messages: list[Message], adapter: str | None = None, tokens: int = 256
) -> str:
    """What the engine answers greedily, asked without the studio."""
    engine = server.services.engine
    ref = None
    if adapter is not None:
        version = server.services.catalog.resolve(adapter)
        ref = AdapterRef(version.adapter, version.version, version.digest)
    params = SamplingParams(max_tokens=tokens, temperature=0)
    events: queue.Queue[Event] = queue.Queue()
    engine.submit(
        Request(f"test-{time.monotonic_ns()}", engine.renderer.prompt(messages), ref, params), events.put
    )
    text = ""
    while True:
        event = events.get(timeout=60)
        text += event.text
        if event.finish is not None:
            assert event.error is None
            return text


def question(text: str, *pictures: bytes) -> Message:
    return Message("user", (*(Media("image", data) for data in pictures), Text(text)))


def test_root_leads_to_the_studio(studio: RunningServer, page: Page) -> None:
    assert urlsplit(page.url).path.rstrip("/") == "/studio"
    assert page.title() == "Okavango studio"
    expect(page.locator("#okv-model input")).to_have_value(first_choice(studio.services))


def test_an_adapter_answers_about_a_picture(studio: RunningServer, page: Page) -> None:
    choose(page, "r8@1")
    add_picture(page, PICTURE)
    ask(page, "What is this?")
    version = studio.services.catalog.resolve("r8@1")
    assert answers(page) == [from_engine(studio, [question("What is this?", PICTURE)], "r8@1")]
    made = page.locator(".okv-made")
    expect(made.locator(".okv-model")).to_have_text("r8@1")
    expect(made.locator(".okv-digest")).to_have_text(version.digest[:12])
    expect(made.locator(".okv-digest")).to_have_attribute("data-copy", version.digest)
    expect(made).to_contain_text("tokens/s")
    expect(made).to_contain_text("features computed")
    expect(page.locator("#okv-conversation .user img")).to_be_visible()

    # The other version leaves the encoder alone, so it finds the picture's features in the cache.
    choose(page, "r8@2")
    clear(page)
    add_picture(page, PICTURE)
    ask(page, "What is this?")
    assert answers(page) == [from_engine(studio, [question("What is this?", PICTURE)], "r8@2")]
    expect(made.locator(".okv-model")).to_have_text("r8@2")
    expect(made).to_contain_text("features from cache")


def test_a_conversation_goes_on_until_it_is_cleared(studio: RunningServer, page: Page) -> None:
    choose(page, "tiny")
    set_max_tokens(page, 24)
    ask(page, "One")
    [first] = answers(page)
    assert first == from_engine(studio, [question("One")], tokens=24)
    ask(page, "Two")
    turns = [question("One"), Message("assistant", (Text(first),)), question("Two")]
    second = from_engine(studio, turns, tokens=24)
    assert answers(page, 2) == [first, second]
    assert second != from_engine(studio, [question("Two")], tokens=24)

    page.get_by_label("Send each question alone").check()
    ask(page, "Two")
    assert answers(page, 3)[2] == from_engine(studio, [question("Two")], tokens=24)

    clear(page)
    page.get_by_label("Send each question alone").uncheck()
    ask(page, "One")
    assert answers(page) == [first]


def test_an_answer_is_asked_for_again_of_another_model(studio: RunningServer, page: Page) -> None:
    choose(page, "r8@1")
    ask(page, "Again")
    [first] = answers(page)
    choose(page, "r8@2")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".okv-made .okv-model")).to_have_text("r8@2")
    assert answers(page) == [from_engine(studio, [question("Again")], "r8@2")] != [first]


def test_a_bare_base_with_an_untrained_head_says_so(page: Page) -> None:
    choose(page, "tiny")
    add_picture(page, PICTURE)
    ask(page, "What is this?")
    answers(page)
    expect(page.locator(".okv-note")).to_contain_text("The bare base cannot see pictures yet")


def test_a_damaged_picture_is_refused_and_nothing_is_lost(studio: RunningServer, page: Page) -> None:
    choose(page, "r8@1")
    add_picture(page, PICTURE[: len(PICTURE) // 2])
    ask(page, "What is this?")
    expect(page.locator(FAULT)).to_contain_text("The PNG picture is truncated or damaged")
    expect(page.locator("#okv-composer textarea")).to_have_value("What is this?")

    page.click("#okv-composer .delete-button")
    add_picture(page, PICTURE)
    page.press("#okv-composer textarea", "Enter")
    assert answers(page) == [from_engine(studio, [question("What is this?", PICTURE)], "r8@1")]
    expect(page.locator(FAULT)).to_have_count(0)


def test_a_seed_that_is_none_is_refused(page: Page) -> None:
    page.click("text=Sampling")
    fill(page.get_by_label("Seed"), "lucky")
    ask(page, "hello")
    expect(page.locator(FAULT)).to_contain_text("not a whole number")
    expect(page.locator("#okv-composer .submit-button")).to_be_visible()


def test_names_that_are_typed(page: Page) -> None:
    for name, known, said in (
        ("r88", "No such adapter", "Did you mean r8?"),
        ("spoiled@1", "embeddings is not served", "spoiled@1 is refused and takes no requests"),
    ):
        page.fill("#okv-model input", name)
        page.press("#okv-model input", "Enter")
        expect(page.locator("#okv-card")).to_contain_text(known)
        ask(page, "hello")
        expect(page.locator(FAULT)).to_contain_text(said)


def test_a_digest_and_an_answer_are_copied_whole(studio: RunningServer, open_page: Visits) -> None:
    page = open_page(studio.url, permissions=["clipboard-read", "clipboard-write"])
    choose(page, "r8@1")
    ask(page, "hello")
    [answer] = answers(page)
    for selector, text in (
        ("#okv-conversation .okv-digest", studio.services.catalog.resolve("r8@1").digest),
        ("#okv-conversation .okv-copy", answer),
    ):
        page.click(selector)
        expect(page.locator(selector)).to_have_class(re.compile("okv-copied"))
        assert page.evaluate("navigator.clipboard.readText()") == text


def open_adapters(page: Page) -> None:
    page.get_by_role("tab", name="Adapters").click()
    expect(page.locator("#okv-adapters .okv-table, #okv-adapters .okv-empty")).to_be_visible()


def test_the_adapters_page_shows_versions_scores_and_lineage(studio: RunningServer, page: Page) -> None:
    open_adapters(page)
    row = page.locator("tr[data-ref='r8@1']")
    digest = studio.services.catalog.resolve("r8@1").digest
    for cell in ("r8@1", "ready", "1.834", "11.2", "28.4", "3.4%", "tiny", digest[:12]):
        expect(row).to_contain_text(cell)
    row.click()
    expect(row).to_have_attribute("aria-selected", "true")
    details = page.locator("#okv-details")
    for fact in ("data.rows", "1243", "spec.rank", "its probes were reproduced", "float32"):
        expect(details).to_contain_text(fact)

    refused = page.locator("tr[data-ref='spoiled@1']")
    refused.press("Enter")
    expect(refused).to_contain_text("refused")
    error = studio.services.catalog.resolve("spoiled@1").error
    assert error
    expect(details.locator(".okv-fault")).to_have_text(error)
    expect(page.locator("#okv-promote")).to_be_disabled()


def test_promoting_asks_first_and_then_moves_prod(
    make_server: Callable[..., RunningServer],
    site: Site,
    tiny_bundles: Bundles,
    open_page: Visits,
) -> None:
    for rank in ("r4", "r8"):
        site.publish("emoji", tiny_bundles.folders[rank])
    server = make_server(studio=True)
    catalog = server.services.catalog
    wait_until(lambda: not catalog.versions("registered"))
    page = open_page(server.url)
    open_adapters(page)
    page.click("tr[data-ref='emoji@1']")
    expect(page.locator("#okv-promote")).to_have_text("Promote emoji@1 to prod")
    page.click("#okv-promote")
    expect(page.locator("#okv-confirmation")).to_contain_text("will be answered by emoji@1")
    page.click("#okv-cancel")
    expect(page.locator("#okv-confirmation")).to_be_hidden()
    assert catalog.aliases("emoji") == ()

    page.click("#okv-promote")
    page.click("#okv-confirm")
    expect(page.get_by_text("emoji@prod is emoji@1 now")).to_be_visible()
    expect(page.locator("tr[data-ref='emoji@1'] .okv-alias")).to_have_text("prod")
    expect(page.locator("#okv-promote")).to_be_disabled()
    assert [alias.version for alias in catalog.aliases("emoji")] == [1]

    # What others do is seen without asking: the page looks at the catalog again and again.
    catalog.promote("emoji", 2)
    expect(page.locator("tr[data-ref='emoji@2'] .okv-alias")).to_have_text("prod")
    page.get_by_role("tab", name="Chat").click()
    choose(page, "emoji@prod")
    expect(page.locator("#okv-card")).to_contain_text("→ emoji@2")


@pytest.fixture
def slow(make_server: Callable[..., RunningServer]) -> RunningServer:
    """A base without adapters that takes its time: about 25 tokens a second."""
    server = make_server(studio=True)
    step = server.services.engine.core.step

    def slow_step() -> None:
        time.sleep(0.04)
        step()

    server.services.engine.core.step = slow_step  # type: ignore[method-assign]
    return server


def test_an_answer_streams_in_and_stops_when_told(slow: RunningServer, open_page: Visits) -> None:
    page = open_page(slow.url)
    ask(page, "Count to a million")
    growing = page.locator("#okv-conversation .bot .message-content").first
    expect(growing).to_be_visible()
    lengths = set()
    while len(lengths) < 3:
        lengths.add(len(growing.inner_text()))
    assert slow.services.engine.stats().running == 1
    page.click("#okv-composer .stop-button")
    expect(page.locator(".okv-made")).to_contain_text("stopped")
    wait_until(lambda: slow.services.is_idle() and slow.services.engine.stats().kv_blocks_used == 0)
    [part] = answers(page)
    whole = from_engine(slow, [question("Count to a million")], tokens=64)
    assert part
    assert whole.startswith(part)


@pytest.mark.parametrize("leave", ["close", "reload", "clear"])
def test_who_leaves_stops_the_answer(slow: RunningServer, open_page: Visits, leave: str) -> None:
    page = open_page(slow.url)
    ask(page, "Count to a million")
    wait_until(lambda: slow.services.engine.stats().running == 1)
    {"close": page.close, "reload": page.reload, "clear": lambda: page.click("#okv-clear")}[leave]()
    wait_until(lambda: slow.services.engine.stats().kv_blocks_used == 0, seconds=5)
    open_page.complaints.clear()  # Gradio's script notes that the page was left while it listened


def test_a_cleared_conversation_does_not_come_back(slow: RunningServer, open_page: Visits) -> None:
    page = open_page(slow.url)
    ask(page, "Count to a million")
    expect(page.locator("#okv-conversation .bot")).to_be_visible()
    clear(page)
    wait_until(lambda: slow.services.engine.stats().kv_blocks_used == 0)
    ask(page, "And now?")
    page.click("#okv-composer .stop-button")
    expect(page.locator("#okv-conversation .user")).to_have_count(1)
    expect(page.locator("#okv-conversation .user")).to_have_text("And now?")


def test_no_adapter_yet(slow: RunningServer, open_page: Visits) -> None:
    page = open_page(slow.url)
    expect(page.locator("#okv-model input")).to_have_value("tiny")
    open_adapters(page)
    expect(page.locator("#okv-adapters")).to_contain_text("No adapter yet")


def test_a_full_queue_is_said_kindly(make_server: Callable[..., RunningServer], open_page: Visits) -> None:
    server = make_server(studio=True)

    def refuse(*_: object) -> None:
        raise BusyError("16 requests are here", retry_after=2)

    server.services.engine.submit = refuse  # type: ignore[method-assign]
    page = open_page(server.url)
    ask(page, "hello")
    expect(page.locator(FAULT)).to_contain_text("16 requests are here. Send it again in a moment.")
    expect(page.locator("#okv-composer textarea")).to_have_value("hello")


def test_with_keys_the_browser_signs_in(
    make_server: Callable[..., RunningServer],
    open_page: Visits,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = make_server(keys="secret", studio=True)
    assert server.get("/studio/").status_code == 401
    page = open_page(server.url, http_credentials={"username": "anyone", "password": "secret"})
    with caplog.at_level("INFO", "okavango.web.answers"):
        ask(page, "hello")
        answers(page)
    [line] = [record.getMessage() for record in caplog.records if record.name == "okavango.web.answers"]
    assert "for key-" in line


def test_nothing_but_uploads_is_served_and_nothing_is_offered_to_programs(studio: RunningServer) -> None:
    for path in (Path(__file__), studio.site.settings.home / "catalog.db", Path("/etc/hostname")):
        assert studio.get(f"/studio/gradio_api/file={path}").status_code == 403
    info = studio.get("/studio/gradio_api/info").json()
    assert info == {"named_endpoints": {}, "unnamed_endpoints": {}}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_without_scrolling_sideways(
    studio: RunningServer, open_page: Visits, scheme: str
) -> None:
    page = open_page(studio.url, width=390, height=844, color_scheme=scheme)
    choose(page, "r8@1")
    add_picture(page, PICTURE)
    ask(page, "What is this?")
    answers(page)
    open_adapters(page)
    page.click("tr[data-ref='r8@1']")
    expect(page.locator("#okv-details")).to_contain_text("r8@1")
    for tab in ("Adapters", "Chat"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
