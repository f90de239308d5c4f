"""The adapters page: all versions with their scores, one of them in full, and the move of an alias to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from okavango.platform.catalog.names import DEFAULT_ALIAS
from okavango.platform.catalog.records import AdapterRecord, VersionRecord
from okavango.platform.catalog.states import SERVABLE
from okavango.platform.errors import OkavangoError
from okavango.web.services import Services
from okavango.web.studio import tables
from okavango.web.studio.events import DIRECT, QUEUED
from okavango.web.studio.wording import explain

POLL_SECONDS = 3.0

# A row is chosen by a click, or by Enter on it. What copies something stops its own clicks before.
_CHOOSE = """
const choose = (event) => {
  const row = event.target.closest("[data-ref]");
  if (row && (event.type === "click" || event.key === "Enter")) trigger("select", {ref: row.dataset.ref});
};
element.addEventListener("click", choose);
element.addEventListener("keydown", choose);
"""

Update = Any
Found = tuple[AdapterRecord, VersionRecord]


class AdaptersPage:
    """Builds its components inside the tab that is open, and answers their events."""

    def __init__(self, services: Services, tab: gr.Tab) -> None:
        self._catalog = services.catalog
        self.selected = gr.State("")
        self.table = gr.HTML(elem_id="okv-adapters", js_on_load=_CHOOSE, apply_default_css=False)
        self.promote = gr.Button(visible=False, size="md", elem_id="okv-promote")
        with gr.Row(visible=False, elem_id="okv-confirmation") as self.confirmation:
            self.question = gr.HTML(apply_default_css=False)
            self.confirm = gr.Button("Move it", variant="primary", size="md", elem_id="okv-confirm", scale=0)
            self.cancel = gr.Button("Leave it", size="md", elem_id="okv-cancel", scale=0)
        self.details = gr.HTML(elem_id="okv-details", apply_default_css=False)
        self.timer = gr.Timer(POLL_SECONDS, active=False)
        self._listen(tab)

    def _listen(self, tab: gr.Tab) -> None:
        shown = [self.selected, self.table, self.details, self.promote]
        asking = [self.confirmation, self.question]
        tab.select(lambda: gr.Timer(active=True), None, [self.timer], **DIRECT)
        for event in (tab.select, self.timer.tick):
            event(self._show, [self.selected], shown, **DIRECT)
        self.table.select(self._choose, None, [*shown, self.confirmation], **DIRECT)
        self.promote.click(self._ask, [self.selected], asking, **DIRECT)
        self.cancel.click(_close, None, [self.confirmation], **DIRECT)
        # Through the queue, for no other way leads a message to the page.
        self.confirm.click(self._move, [self.selected], [*shown, self.confirmation], **QUEUED)

    def rest(self, others: Sequence[gr.Tab]) -> None:
        """Ask the catalog for news no more while another tab is looked at."""
        for other in others:
            other.select(lambda: gr.Timer(active=False), None, [self.timer], **DIRECT)

    def _show(self, selected: str) -> tuple[Update, ...]:
        """Also the timer's: what has not changed is not sent, by gr.HTML itself."""
        adapters = self._catalog.list_adapters()
        found = _find(adapters, selected)
        if found is None:
            return "", tables.table(adapters, ""), "", gr.update(visible=False)
        adapter, version = found
        return (
            version.ref,
            tables.table(adapters, version.ref),
            tables.details(adapter, version),
            _promote_button(adapter, version),
        )

    def _choose(self, event: gr.EventData) -> tuple[Update, ...]:
        return (*self._show(str(event._data["ref"])), _close())

    def _ask(self, selected: str) -> tuple[Update, Update]:
        found = _find(self._catalog.list_adapters(), selected)
        if found is None:
            return gr.update(visible=False), ""
        return gr.update(visible=True), tables.promotion(*found)

    def _move(self, selected: str) -> tuple[Update, ...]:
        try:
            version = self._catalog.resolve(selected)
            moved = self._catalog.promote(version.adapter, version.version)
        except OkavangoError as error:
            gr.Warning(explain(error, selected))
        else:
            before = "" if moved.previous is None else f" It was {moved.adapter}@{moved.previous} before."
            gr.Info(f"{moved.adapter}@{moved.name} is {version.ref} now.{before}")
        return (*self._show(selected), _close())


def _find(adapters: Sequence[AdapterRecord], ref: str) -> Found | None:
    """The version of that ref, or else the first one of the table; None where there is none."""
    every = [(adapter, version) for adapter in adapters for version in reversed(adapter.versions)]
    return next((found for found in every if found[1].ref == ref), every[0] if every else None)


def _promote_button(adapter: AdapterRecord, version: VersionRecord) -> Update:
    is_there = any(a.name == DEFAULT_ALIAS and a.version == version.version for a in adapter.aliases)
    label = f"{version.ref} is {DEFAULT_ALIAS}" if is_there else f"Promote {version.ref} to {DEFAULT_ALIAS}"
    return gr.update(value=label, visible=True, interactive=not is_there and version.state in SERVABLE)


def _close() -> Update:
    return gr.update(visible=False)
