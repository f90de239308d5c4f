"""The engine: requests in, streams of events out. Threads and preparation live here, decisions do not.

submit ─▶ prepare (its own threads: adapter → host, media → features → embeddings) ─▶ inbox
inbox ─▶ the step thread: EngineCore.step() until nothing is left ─▶ sinks
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from okavango.modalities.base import Base, load_tokenizer
from okavango.modalities.precision import resolve_dtype
from okavango.modalities.prompt import Renderer
from okavango.platform.errors import (
    BusyError,
    ConfigError,
    ContextLengthError,
    NotReadyError,
    OkavangoError,
    UnsupportedError,
)
from okavango.platform.telemetry import Metrics, NullMetrics
from okavango.serving.adapters.loading import NO_LORA, Adapter, HostCache, load_adapter
from okavango.serving.core import EngineCore
from okavango.serving.media import FeatureCache, MediaRuntime
from okavango.serving.runner import Runner, RunnerOptions
from okavango.serving.sampler import make_rng
from okavango.serving.scheduler import RETRY_AFTER_SECONDS, Limits
from okavango.serving.sequence import Sequence
from okavango.serving.stream import TextStream
from okavango.serving.types import AdapterRef, AdapterSource, Event, FinishReason, Request

log = logging.getLogger(__name__)

Sink = Callable[[Event], None]
GIB = 1 << 30


@dataclass(frozen=True)
class EngineOptions:
    """How one engine runs.

    Attributes:
        dtype: auto, bfloat16 or float32.
        max_sequences: sequences in one step.
        max_step_tokens: tokens in one step; prompts are computed in chunks that fit.
        max_waiting: requests that may wait; one more is refused.
        block_size: token positions a KV block.
        kv_bytes: memory for keys and values; on a CPU it is taken only as it is used.
        slots: adapters in one step.
        max_rank: the highest LoRA rank that is served.
        host_cache_bytes: adapters kept in host memory.
        feature_cache_bytes: encoder outputs kept.
        threads: torch's threads; None leaves them as they are.
    """

    dtype: str = "auto"
    device: str = "cpu"
    max_sequences: int = 32
    max_step_tokens: int = 512
    max_waiting: int = 256
    block_size: int = 16
    kv_bytes: int = 4 * GIB
    slots: int = 8
    max_rank: int = 64
    host_cache_bytes: int = 2 * GIB
    feature_cache_bytes: int = GIB // 4
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_waiting", "block_size", "kv_bytes", "slots", "max_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, not {getattr(self, name)}", where=name)
        if self.max_step_tokens <= self.max_sequences:
            raise ConfigError(
                f"must be above max_sequences ({self.max_sequences}), or prompts would never get a turn",
                where="max_step_tokens",
            )


@dataclass(frozen=True)
class EngineStats:
    """A look at what is held right now; for people and tests, not for decisions."""

    preparing: int
    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    slots: tuple[str, ...]
    encoders_loaded: tuple[str, ...]


@dataclass(eq=False)
class _Ticket:
    """A request between submit and its last event."""

    request: Request
    sink: Sink
    sequence: Sequence | None = None
    aborted: bool = False


class Engine:
    """One base, many adapters. Loads the decoder when made, encoders only when a medium comes.

    Raises:
        UnsupportedError: the decoder cannot be served.
    """

    def __init__(
        self,
        base: Base,
        source: AdapterSource,
        options: EngineOptions | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.base = base
        self.options = options = options or EngineOptions()
        self.metrics = metrics = metrics or NullMetrics()
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.context = base.decoder.context
        self.tokenizer = load_tokenizer(base)
        self.renderer = Renderer(
            self.tokenizer, {name: head.spec.tokens for name, head in base.heads.items()}
        )
        runner = Runner(base, _runner_options(options))
        limits = Limits(options.max_sequences, options.max_step_tokens, options.max_waiting)
        self.core = EngineCore(runner, limits, _eos_ids(runner, self.renderer), self._deliver, metrics)
        self.media = MediaRuntime(base, FeatureCache(options.feature_cache_bytes), metrics, options.device)
        self._source = source
        self._host = HostCache(options.host_cache_bytes)
        self._tickets: dict[str, _Ticket] = {}
        self._inbox: list[_Ticket] = []
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._preparers = ThreadPoolExecutor(2, thread_name_prefix="okavango-prepare")
        metrics.gauge("okavango_kv_blocks_total", runner.num_blocks)

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the step thread."""
        self._thread = threading.Thread(target=self._run, name="okavango-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Abort what is left and end the step thread."""
        for request_id in list(self._tickets):
            self.abort(request_id)
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._preparers.shutdown(wait=True, cancel_futures=True)

    def submit(self, request: Request, sink: Sink) -> None:
        """Take a request. `sink` gets its events on other threads; the last one has a `finish`.

        Raises:
            ContextLengthError: prompt and answer do not fit the context, or the KV memory.
            BusyError: too many requests wait already.
            NotReadyError: the engine is stopping.
        """
        max_tokens = self._max_tokens(request)
        ticket = _Ticket(request, sink)
        with self._wake:
            if self._stopping:
                raise NotReadyError("the server is stopping")
            if request.id in self._tickets:
                raise OkavangoError(f"request {request.id} is already here")
            if len(self._tickets) >= self.options.max_waiting + self.options.max_sequences:
                raise BusyError(f"{len(self._tickets)} requests are here", retry_after=RETRY_AFTER_SECONDS)
            self._tickets[request.id] = ticket
        if self._is_prepared(request):
            self._prepare(ticket, max_tokens)
        else:
            self._preparers.submit(self._prepare, ticket, max_tokens)

    def abort(self, request_id: str) -> None:
        """Drop a request, wherever it is; what it holds is free within one step. Unknown ids are ignored."""
        with self._wake:
            ticket = self._tickets.get(request_id)
            if ticket is not None:
                ticket.aborted = True
                self._inbox.append(ticket)
                self._wake.notify()

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """The request's events. Closing the iterator aborts the request."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def sink(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the reader's loop is closed: it has gone
                loop.call_soon_threadsafe(events.put_nowait, event)

        self.submit(request, sink)
        try:
            while True:
                event = await events.get()
                yield event
                if event.finish is not None:
                    return
        finally:
            self.abort(request.id)

    def stats(self) -> EngineStats:
        scheduler = self.core.scheduler
        running, waiting = len(scheduler.running), len(scheduler.waiting)
        return EngineStats(
            preparing=max(0, len(self._tickets) - running - waiting),
            running=running,
            waiting=waiting,
            kv_blocks_used=scheduler.pool.num_used,
            kv_blocks_total=scheduler.pool.num_blocks,
            slots=scheduler.slots.residents,
            encoders_loaded=self.media.loaded,
        )

    def _max_tokens(self, request: Request) -> int:
        prompt, wanted = len(request.prompt.tokens), request.params.max_tokens
        blocks = self.core.runner.num_blocks
        limit = min(self.context, blocks * self.options.block_size)
        if prompt + (wanted or 1) > limit:
            asked = f" and {wanted} to generate" if wanted else ""
            raise ContextLengthError(
                f"{prompt} prompt tokens{asked} exceed the limit of {limit} tokens",
                where="messages",
                remedy="shorten the conversation or lower max_tokens",
            )
        return wanted or limit - prompt

    def _is_prepared(self, request: Request) -> bool:
        """Whether preparing the request takes no time, so that no thread is needed."""
        adapter = request.adapter
        return not request.prompt.media and (adapter is None or self._host.peek(adapter.digest) is not None)

    def _prepare(self, ticket: _Ticket, max_tokens: int) -> None:
        """Make the ticket's sequence and hand it to the step thread, or fail it."""
        request = ticket.request
        try:
            adapter = self._adapter(request.adapter) if request.adapter else None
            embeds, hits = self.media.embed(request.prompt.media, adapter)
        except Exception as error:
            if not isinstance(error, OkavangoError):
                log.exception("request %s could not be prepared", request.id)
                error = OkavangoError("the request could not be prepared")
            self._finish(ticket, Event(finish=FinishReason.ERROR, error=error))
            return
        ticket.sequence = Sequence(
            request,
            max_tokens,
            embeds=embeds,
            weights=adapter.lora if adapter else NO_LORA,
            rng=make_rng(request.params),
            stream=TextStream(self.tokenizer, request.params.stop),
            features_cached=hits,
        )
        with self._wake:
            self._inbox.append(ticket)
            self._wake.notify()

    def _adapter(self, ref: AdapterRef) -> Adapter:
        def load() -> Adapter:
            adapter = load_adapter(self._source.fetch(ref.digest), self.base, self.core.runner.targets)
            if adapter.lora.rank > self.options.max_rank:
                raise UnsupportedError(
                    f"adapter {ref} has rank {adapter.lora.rank}, over the limit of {self.options.max_rank}",
                    remedy=f"okavango serve --max-rank {adapter.lora.rank}",
                )
            return adapter

        return self._host.get(ref.digest, load)

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            # a bug of ours: nobody shall wait for a thread that is gone (is_running tells /healthz)
            for ticket in list(self._tickets.values()):
                failure = OkavangoError("the engine has failed; the server must be restarted")
                self._finish(ticket, Event(finish=FinishReason.ERROR, error=failure))
            raise error

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self.core.scheduler.has_work or self._stopping):
                    self._wake.wait()
                inbox, self._inbox = self._inbox, []
                if self._stopping and not inbox and not self.core.scheduler.has_work:
                    return
            for ticket in inbox:
                self._receive(ticket)
            if self.core.scheduler.has_work:
                self.core.step()

    def _receive(self, ticket: _Ticket) -> None:
        if ticket.request.id not in self._tickets:
            return
        if ticket.aborted:
            if ticket.sequence is None:
                self._finish(ticket, Event(finish=FinishReason.ABORT))
            else:
                self.core.abort(ticket.sequence)
            return
        assert ticket.sequence is not None
        try:
            self.core.add(ticket.sequence)
        except BusyError as error:
            self._finish(ticket, Event(finish=FinishReason.ERROR, error=error))

    def _deliver(self, sequence: Sequence, event: Event) -> None:
        ticket = self._tickets.get(sequence.request.id)
        if ticket is None:
            return
        if event.finish is not None:
            self._finish(ticket, event)
        else:
            self._send(ticket, event)

    def _finish(self, ticket: _Ticket, event: Event) -> None:
        with self._wake:
            if self._tickets.pop(ticket.request.id, None) is None:
                return
        self._send(ticket, event)

    def _send(self, ticket: _Ticket, event: Event) -> None:
        """A sink that raises has nobody behind it any more: its request ends, the step thread goes on."""
        try:
            ticket.sink(event)
        except Exception:
            log.exception("request %s: its reader failed", ticket.request.id)
            self.abort(ticket.request.id)


def _runner_options(options: EngineOptions) -> RunnerOptions:
    return RunnerOptions(
        dtype=resolve_dtype(options.dtype, options.device),
        device=options.device,
        block_size=options.block_size,
        kv_bytes=options.kv_bytes,
        slots=options.slots,
        max_rank=options.max_rank,
    )


def _eos_ids(runner: Runner, renderer: Renderer) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those that the decoder's generation config names."""
    config = runner.decoder.generation_config
    named = config.eos_token_id if config is not None else None
    ids = named if isinstance(named, list) else [named]
    return frozenset(i for i in (*ids, renderer.tokenizer.eos_token_id) if i is not None)
