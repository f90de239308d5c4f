"""The studio's training page in Debian's chromium, against the real server over the tiny base."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from browser_fixtures import Visits, answers, ask
from playwright.sync_api import Page, expect
from server_fixtures import RunningServer, data_url, wait_until
from training_fixtures import NAMES, picture_row

from okavango.modalities.tiny_bundle import picture_bytes
from okavango.training.service import WorkerOptions

pytestmark = pytest.mark.browser

GOOD = [picture_row(data_url(picture_bytes(i)), name) for i, name in enumerate(NAMES)]
FAULTY = [GOOD[0], picture_row("/etc/passwd", "x"), {"messages": [{"role": "user", "content": "hi"}]}]


def lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def open_training(page: Page) -> Page:
    page.get_by_role("tab", name="Training").click()
    expect(page.locator("#okv-jobs .okv-table, #okv-jobs .okv-empty")).to_be_visible()
    return page


def upload(page: Page, picker: str, name: str, rows: list[dict[str, object]]) -> None:
    page.set_input_files(
        f"#okv-{picker}-zone input[type=file]",
        {"name": name, "mimeType": "application/jsonl", "buffer": lines(rows)},
    )
    expect(page.locator(f"#okv-{picker}-report .okv-verdict")).to_contain_text(name)


def set_fields(page: Page, fields: dict[str, str]) -> None:
    """As somebody would who sees what became of it: a group that has just opened puts its own values in,
    when its fields are there already."""
    boxes = {page.locator(f"#okv-field-{field} :is(input, textarea)"): fields[field] for field in fields}
    for _ in range(20):
        for box, value in boxes.items():
            if box.input_value() != value:
                box.fill(value)
        page.wait_for_timeout(300)
        if all(box.input_value() == value for box, value in boxes.items()):
            return
    pytest.fail(f"the page does not keep {fields}")


def open_group(page: Page, name: str) -> None:
    page.get_by_role("button", name=name).click()


def test_from_upload_to_an_answer(make_server: Callable[..., RunningServer], open_page: Visits) -> None:
    """A faulty file is refused, a good one learned from by the server's own worker; its adapter answers."""
    server = make_server(studio=True, worker=WorkerOptions(threads=1, poll_seconds=0.1))
    page = open_training(open_page(server.url))
    expect(page.locator("#okv-jobs")).to_contain_text("No job yet")
    expect(page.locator("#okv-start")).to_be_disabled()
    upload(page, "data", "faulty.jsonl", FAULTY)
    faults = page.locator("#okv-data-report .okv-faults tbody tr")
    expect(faults).to_have_count(2)
    expect(faults.first).to_contain_text("messages[0].content[0].image_url.url")
    expect(page.locator("#okv-start-message")).to_contain_text("The data have faults")
    expect(page.locator("#okv-start")).to_be_disabled()

    upload(page, "data", "good.jsonl", GOOD)
    upload(page, "eval", "held-out.jsonl", GOOD[:3])
    expect(page.locator("#okv-start")).to_be_enabled()
    page.locator("#okv-name :is(input, textarea)").fill("Pets")
    set_fields(page, {"lora-r": "999"})
    open_group(page, "How it learns")
    learning = {"steps": "6", "views": "0", "align-steps": "3"}
    set_fields(page, learning)
    open_group(page, "How it is scored")
    scoring = {"eval-every": "3", "max-new-tokens": "4"}
    set_fields(page, scoring)
    page.click("#okv-start")
    refused = page.locator("#okv-start-message .okv-fault")
    expect(refused).to_be_visible()
    expect(refused).to_contain_text("Rank: ")
    assert server.services.catalog.list_jobs() == ()

    set_fields(page, {"lora-r": "4", **learning, **scoring})
    page.click("#okv-start")
    expect(page.locator("#okv-start-message")).to_contain_text("pets is queued as job-")
    expect(page.locator("#okv-job-head")).to_contain_text("succeeded", timeout=90_000)
    expect(page.locator("#okv-curve path.okv-held").first).to_be_attached()
    expect(page.locator("#okv-scores")).to_contain_text("BLEU-4")
    answered = page.locator("#okv-answers .okv-answer")
    expect(answered).to_have_count(3)
    expect(answered.first).to_contain_text("step 3")
    expect(answered.first).to_contain_text("step 6")
    picture = answered.first.locator("img")
    picture.scroll_into_view_if_needed()  # pictures are fetched when they are looked at
    wait_until(lambda: bool(picture.evaluate("(image) => image.complete && image.naturalWidth")))
    expect(page.locator("#okv-events li").first).to_contain_text("succeeded")

    expect(page.locator("#okv-try")).to_have_text("Try pets@1 in chat")
    page.click("#okv-try")
    expect(page.locator("#okv-card b").first).to_have_text("pets@1")
    ask(page, "hi")
    assert len(answers(page)) == 1
    expect(page.locator(".okv-made .okv-model")).to_have_text("pets@1")


def test_without_a_worker_jobs_wait_and_buttons_fit_their_states(
    make_server: Callable[..., RunningServer], open_page: Visits
) -> None:
    server = make_server(studio=True)
    client, catalog = server.client(), server.services.catalog
    file = client.files.create(file=("rows.jsonl", lines(GOOD)), purpose="fine-tune").id
    first, second = (
        client.fine_tuning.jobs.create(model="tiny", training_file=file, suffix=name).id
        for name in ("first", "second")
    )
    page = open_training(open_page(server.url, width=390, height=844))
    expect(page.locator("#okv-no-worker")).to_contain_text("okavango worker")
    page.click(f"tr[data-ref='{first}']")
    expect(page.locator("#okv-job-head")).to_contain_text(first)
    expect(page.locator("#okv-resume")).to_be_hidden()
    page.click("#okv-pause")
    expect(page.locator(f"tr[data-ref='{first}']")).to_contain_text("paused")
    expect(page.locator("#okv-pause")).to_be_hidden()
    page.click("#okv-resume")
    expect(page.locator(f"tr[data-ref='{first}']")).to_contain_text("queued")

    # What others do is seen without asking, and does not take the choice away.
    third = client.fine_tuning.jobs.create(model="tiny", training_file=file, suffix="third").id
    expect(page.locator(f"tr[data-ref='{third}']")).to_be_visible()
    expect(page.locator(f"tr[data-ref='{first}']")).to_have_attribute("aria-selected", "true")
    page.click("#okv-cancel-job")
    page.click("#okv-leave")
    assert catalog.get_job(first).state == "queued"
    page.click("#okv-cancel-job")
    page.click("#okv-end")
    expect(page.locator("#okv-job-head")).to_contain_text("cancelled")
    for button in ("pause", "resume", "cancel-job", "try"):
        expect(page.locator(f"#okv-{button}")).to_be_hidden()
    assert (catalog.get_job(first).state, catalog.get_job(second).state) == ("cancelled", "queued")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390


def test_who_signs_in_sees_their_own_alone(
    make_server: Callable[..., RunningServer], open_page: Visits
) -> None:
    server = make_server(keys="one,two", studio=True, upload_bytes=100_000)
    client = server.client("one")
    file = client.files.create(file=("secret.jsonl", lines(GOOD)), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, suffix="secret").id
    page = open_training(open_page(server.url, http_credentials={"username": "anyone", "password": "two"}))
    expect(page.locator("#okv-jobs")).to_contain_text("No job yet")
    page.click("#okv-data input")
    expect(page.get_by_role("option", name="none")).to_be_visible()
    expect(page.get_by_role("option", name=re.compile("secret"))).to_have_count(0)
    # Whoever knows an id is told no more than who guesses one.
    page.fill("#okv-data input", file)
    page.press("#okv-data input", "Enter")
    expect(page.locator("#okv-data-report")).to_contain_text("No such file")
    expect(page.locator("#okv-start")).to_be_disabled()

    page.set_input_files(
        "#okv-data-zone input[type=file]",
        {"name": "large.jsonl", "mimeType": "application/jsonl", "buffer": b"x" * 200_000},
    )
    expect(page.locator("#okv-data-zone .okv-upload-status")).to_contain_text(
        "over the limit of 100,000 bytes"
    )
    open_page.complaints.clear()  # the browser notes every status that is no success
    assert server.services.catalog.get_job(job).state == "queued"
