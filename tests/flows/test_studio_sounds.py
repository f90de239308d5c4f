"""Sounds in the studio, in Debian's chromium."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser_fixtures import Visits, add_file, answers, ask, choose
from playwright.sync_api import expect
from server_fixtures import ENGINE, RunningServer, make_site

from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tiny_bundle import sound_bytes
from okavango.web.services import ServeOptions

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("hearing")
    site = make_site(folder, write_tiny_base(folder / "base", audio=True, name="both"))
    running = RunningServer(site, ServeOptions(engine=ENGINE), studio=True)
    yield running
    running.stop()


def test_a_sound_is_heard_and_can_be_played(studio: RunningServer, open_page: Visits) -> None:
    page = open_page(studio.url)
    expect(page.locator("#okv-conversation")).to_contain_text("a picture or a sound")
    expect(page.get_by_test_id("microphone-button")).to_be_visible()
    choose(page, "both")
    add_file(page, sound_bytes(1, 1.0), "said.wav", "audio/wav")
    ask(page, "What is said?")
    assert answers(page)[0]
    expect(page.get_by_test_id("user").get_by_label("Play")).to_be_visible()
    expect(page.locator(".okv-note")).to_contain_text("cannot hear sounds yet")
    expect(page.locator(".okv-made")).to_contain_text("features computed")
    heard = studio.metric('okavango_encoder_runs_total{modality="audio"}')
    assert heard == 1


def test_a_sound_that_is_none_is_said_so(studio: RunningServer, open_page: Visits) -> None:
    page = open_page(studio.url)
    add_file(page, b"RIFF nothing", "broken.wav", "audio/wav")
    ask(page, "What is said?")
    expect(page.locator("#okv-conversation .okv-fault")).to_be_visible()
