"""Debian's chromium, and what tests do with a page of the studio."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, FilePayload, Page, expect, sync_playwright

expect.set_options(timeout=20_000)  # a busy machine is no fault of the studio
CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")  # no longer: while Playwright runs, no other test can start an event loop
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.fail(f"no {CHROMIUM}: apt-get install chromium (make test does it on Debian)", pytrace=False)
    with sync_playwright() as playwright:
        # No sandbox: as root, which containers run as, chromium starts only without.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Visits:
    """Opens pages, each in a context of its own, and notes what should not be."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._contexts: list[BrowserContext] = []
        self.complaints: list[str] = []
        self.foreign: list[str] = []

    def __call__(self, url: str, width: int = 1280, height: int = 800, **options: Any) -> Page:
        context = self._browser.new_context(viewport={"width": width, "height": height}, **options)
        self._contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: self._see(request.url, urlsplit(url).netloc))
        page.on("console", lambda line: self.complaints.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(f"{url}/")
        expect(page.locator("#okv-model input")).not_to_have_value("")
        return page

    def _see(self, address: str, own: str) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("data", "blob") and parts.netloc != own:
            self.foreign.append(address)

    def end(self) -> None:
        for context in self._contexts:
            context.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Visits]:
    """open_page(url, width=390): a page that must not complain, nor talk to another host."""
    visits = Visits(browser)
    yield visits
    visits.end()
    assert visits.complaints == []
    assert visits.foreign == []


def choose(page: Page, model: str) -> None:
    page.click("#okv-model input")
    page.get_by_role("option", name=model, exact=True).click()
    expect(page.locator("#okv-card b").first).to_have_text(model)


def add_file(page: Page, data: bytes, name: str, kind: str) -> None:
    upload: FilePayload = {"name": name, "mimeType": kind, "buffer": data}
    page.set_input_files("#okv-composer input[type=file]", upload)
    expect(page.locator("#okv-composer .thumbnail-item")).to_be_visible()


def ask(page: Page, question: str) -> None:
    page.fill("#okv-composer textarea", question)
    page.press("#okv-composer textarea", "Enter")


def answers(page: Page, count: int = 1) -> list[str]:
    """The answers so far, exactly as the model gave them, once there are `count`."""
    copies = page.locator("#okv-conversation .okv-copy")
    expect(copies).to_have_count(count)
    return [unquote(copy.get_attribute("data-copy") or "") for copy in copies.all()]
