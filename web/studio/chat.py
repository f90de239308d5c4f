"""The chat page: a model, a question with media if any, an answer that streams in and says its maker."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import gradio as gr

from okavango.platform.errors import InputError
from okavango.serving.types import SamplingParams
from okavango.web.services import Services
from okavango.web.studio import picker
from okavango.web.studio.asking import Asking
from okavango.web.studio.bubbles import bubbles
from okavango.web.studio.conversation import SOUNDS, Conversation, Turn, completed
from okavango.web.studio.events import DIRECT, QUEUED
from okavango.web.studio.principals import principal_of
from okavango.web.studio.wording import explain

MAX_TOKENS = 256

Update = Any
Shown = tuple[Update, Update, Update]
"""What becomes of the conversation on the page, the turns behind it, and the composer."""
_UNCHANGED: Shown = (gr.skip(), gr.skip(), gr.skip())


class ChatPage:
    """Builds its components inside the Blocks that is open, and answers their events."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._asking: dict[str, Asking] = {}
        with gr.Row(elem_classes="okv-chat"):
            with gr.Column(scale=0, min_width=300, elem_classes="okv-side"):
                self._build_side()
            with gr.Column(scale=1, min_width=320, elem_classes="okv-main"):
                self._build_main()
        self._listen()

    def follow(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """Listen to the page that opens, and to the tab that is looked at again."""
        page.load(self._open, None, [self.model, self.card], **DIRECT)
        tab.select(self._refresh, [self.model], [self.model, self.card], **DIRECT)

    def _build_side(self) -> None:
        with gr.Row(elem_classes="okv-picker"):
            self.model = gr.Dropdown(
                label="Model",
                container=False,
                choices=[],
                # Any ADAPTER@VERSION may be typed, also one that was registered a second ago.
                allow_custom_value=True,
                elem_id="okv-model",
                scale=1,
                min_width=160,
            )
            self.refresh = gr.Button(
                "↻", elem_id="okv-refresh", elem_classes="okv-icon", scale=0, min_width=40
            )
        self.card = gr.HTML(elem_id="okv-card", apply_default_css=False)
        with gr.Accordion("Sampling", open=False, elem_id="okv-sampling"):
            self.temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0 is greedy")
            self.max_tokens = gr.Slider(
                1,
                self._services.engine.context,
                value=min(MAX_TOKENS, self._services.engine.context // 2),
                step=1,
                label="Max tokens",
                info="of an answer",
            )
            self.seed = gr.Textbox("", label="Seed", placeholder="drawn anew each time", max_lines=1)
            self.is_single = gr.Checkbox(False, label="Send each question alone")
        self.clear = gr.Button("New conversation", elem_id="okv-clear", size="md")

    def _build_main(self) -> None:
        self.turns = gr.State(())
        takes = [modality for modality in ("image", "audio") if self._is_served(modality)]
        hears = "audio" in takes
        self.chatbot = gr.Chatbot(
            show_label=False,
            label="Conversation",
            placeholder=welcome(takes),
            buttons=[],
            layout="bubble",
            height="100%",
            elem_id="okv-conversation",
            allow_file_downloads=False,
            feedback_options=None,
        )
        self.composer = gr.MultimodalTextbox(
            show_label=False,
            label="Question",
            placeholder=f"Ask about {_named(takes)}, or anything" if takes else "Ask anything",
            sources=(["upload", "microphone"] if hears else ["upload"]) if takes else [],
            file_types=[*takes, *SOUNDS] if hears else takes,
            file_count="multiple",
            max_plain_text_length=self._services.options.media.text_chars,
            max_lines=8,
            autofocus=True,
            elem_id="okv-composer",
        )

    def _is_served(self, modality: str) -> bool:
        services = self._services
        return modality in services.base.heads and modality not in services.engine.options.disabled

    def _listen(self) -> None:
        settings = [self.model, self.temperature, self.max_tokens, self.seed, self.is_single]
        shown = [self.chatbot, self.turns, self.composer]
        self.composer.submit(
            self._ask, [self.composer, self.turns, *settings], shown, concurrency_limit=None, **QUEUED
        )
        self.chatbot.retry(self._ask_again, [self.turns, *settings], shown, concurrency_limit=None, **QUEUED)
        self.composer.stop(self._stop, **DIRECT)
        self.clear.click(self._clear, None, shown, **DIRECT)
        self.refresh.click(self._refresh, [self.model], [self.model, self.card], **DIRECT)
        self.model.focus(self._refresh, [self.model], [self.model, self.card], **DIRECT)
        self.model.change(self._card, [self.model], [self.card], **DIRECT)

    async def _ask(
        self, request: gr.Request, composed: dict[str, Any], turns: Conversation, *settings: Any
    ) -> AsyncGenerator[Shown, None]:
        turn = Turn(composed["text"].strip(), tuple(composed["files"]))
        if not turn.question and not turn.media:
            yield _UNCHANGED
            return
        async with aclosing(self._answer(turn, completed(turns), settings, request)) as updates:
            async for update in updates:
                yield update

    async def _ask_again(
        self, request: gr.Request, turns: Conversation, *settings: Any
    ) -> AsyncGenerator[Shown, None]:
        if not turns:  # the server was started anew since the page was opened
            yield _UNCHANGED
            return
        turn = Turn(turns[-1].question, turns[-1].media)
        async with aclosing(self._answer(turn, completed(turns[:-1]), settings, request)) as updates:
            async for update in updates:
                yield update

    async def _answer(
        self, turn: Turn, before: Conversation, settings: tuple[Any, ...], request: gr.Request
    ) -> AsyncGenerator[Shown, None]:
        model, *sampling, is_single = settings
        session = str(request.session_hash)
        if session in self._asking:
            gr.Info("One question at a time: stop the answer that comes in, or wait for it.")
            yield _UNCHANGED
            return
        try:
            params = read_params(*sampling)
        except InputError as error:
            yield _shown((*before, turn := replace(turn, fault=explain(error, ""))), _ready(turn))
            return
        asked = (turn,) if is_single else (*before, turn)
        asking = Asking(self._services, model or "", asked, params, principal_of(request))
        self._asking[session] = asking
        try:
            yield _shown((*before, turn), _busy())
            async with aclosing(asking.looks()) as looks:
                async for turn in looks:
                    if self._asking.get(session) is not asking:
                        break  # the conversation was cleared
                    yield bubbles((*before, turn)), gr.skip(), gr.skip()
            if self._asking.get(session) is asking:
                yield gr.skip(), (*before, turn), _ready(turn)
            elif session not in self._asking:
                # A look that was under way may have reached the page after the clearing.
                yield [], (), gr.skip()
        finally:  # also where the page is gone: Gradio closes this generator then
            asking.stop()
            if self._asking.get(session) is asking:
                del self._asking[session]

    async def _stop(self, request: gr.Request) -> None:
        asking = self._asking.get(str(request.session_hash))
        if asking is not None:
            asking.stop()

    async def _clear(self, request: gr.Request) -> Shown:
        # What is being composed stays: a picture added a moment after the click would be lost with it.
        asking = self._asking.pop(str(request.session_hash), None)
        if asking is not None:
            asking.stop()
        return [], (), gr.update(submit_btn=True, stop_btn=False)

    def _open(self) -> tuple[Update, Update]:
        chosen = picker.first_choice(self._services)
        card = picker.card(self._services, chosen)
        return gr.update(choices=picker.names(self._services), value=chosen), card

    def _refresh(self, chosen: str | None) -> tuple[Update, Update]:
        return gr.update(choices=picker.names(self._services)), picker.card(self._services, chosen)

    def _card(self, chosen: str | None) -> str:
        return picker.card(self._services, chosen)


def welcome(takes: Sequence[str]) -> str:
    """What stands where a conversation will be, by the modalities that are served."""
    how = f"Add {_named(takes)} with the clip, paste or drop it here." if takes else ""
    record = " Or record what you say." if "audio" in takes else ""
    return f"\n### Ask anything\n{how}{record}\n"


def _named(takes: Sequence[str]) -> str:
    return " or ".join({"image": "a picture", "audio": "a sound"}[modality] for modality in takes)


def _shown(turns: Conversation, composer: Update) -> Shown:
    return bubbles(turns), turns, composer


def _busy() -> Update:
    return gr.update(value=None, submit_btn=False, stop_btn=True)


def _ready(turn: Turn) -> Update:
    """What was asked in vain comes back, so that nobody has to type it twice."""
    if turn.fault is None:
        return gr.update(submit_btn=True, stop_btn=False)
    asked = {"text": turn.question, "files": list(turn.media)}
    return gr.update(value=asked, submit_btn=True, stop_btn=False)


def read_params(temperature: float, max_tokens: float, seed: str) -> SamplingParams:
    """What the fields under Sampling say. An empty seed means a new one each time.

    Raises:
        InputError: the seed is not a whole number, or one that no generator takes.
    """
    drawn = not seed.strip()
    if not drawn and not (seed.strip().isdecimal() and int(seed) < 2**63):
        raise InputError(f"the seed is {seed.strip()!r}, not a whole number from 0 to 2⁶³ - 1", where="seed")
    return SamplingParams(int(max_tokens), temperature=temperature, seed=None if drawn else int(seed))
