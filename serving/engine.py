"""The engine: requests in, streams of events out. Threads and preparation live here, decisions do not.

submit ─▶ prepare (its own threads: adapter → host, media → features → embeddings) ─▶ inbox
inbox ─▶ the step thread: EngineCore.step() until nothing is left ─▶ sinks

A request is a ticket from `submit` to its last event. Tickets, inbox and whether the engine is closed are
guarded by one lock, `_wake`; a ticket that is no longer registered is out of the game, whoever still has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from okavango.modalities.base import Base, load_tokenizer
from okavango.modalities.prompt import Renderer
from okavango.platform.errors import BusyError, ContextLengthError, NotReadyError, OkavangoError
from okavango.platform.telemetry import Metrics, NullMetrics
from okavango.serving.adapters.loading import Adapter, HostCache, load_adapter
from okavango.serving.core import EngineCore
from okavango.serving.media import FeatureCache, MediaRuntime
from okavango.serving.options import EngineOptions as EngineOptions
from okavango.serving.options import EngineStats
from okavango.serving.preparation import Preparation, vocabulary_of
from okavango.serving.profiling import StepProfiler
from okavango.serving.runner import Runner
from okavango.serving.sequence import Sequence
from okavango.serving.tickets import Sink, Ticket, late, seconds_left
from okavango.serving.types import AdapterSource, Event, FinishReason, Request

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1.0


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
        runner = Runner(base, options.runner)
        vocabulary = vocabulary_of(runner.decoder, self.tokenizer)
        limits, parking = options.limits, options.parking_bytes
        guesses = options.draft_rows > 0 and runner.backend.is_invariant
        self.core = EngineCore(runner, limits, vocabulary.eos, self._deliver, metrics, parking)
        self.media = MediaRuntime(base, FeatureCache(options.feature_cache_bytes), metrics, options.device)
        self.profiler = StepProfiler()
        self._source = source
        self._host = HostCache(options.host_cache_bytes, self._load)
        self._preparation = Preparation(
            self.tokenizer, self.media, self._host, options.max_rank, vocabulary, guesses=guesses
        )
        self._preparers = ThreadPoolExecutor(2, thread_name_prefix="okavango-prepare")
        self._tickets: dict[str, Ticket] = {}
        self._inbox: list[Ticket] = []
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed: str | None = None
        metrics.gauge("okavango_kv_blocks_total", runner.num_blocks)

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the step thread."""
        self._thread = threading.Thread(target=self._run, name="okavango-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Abort what is left and end the step thread. Every request has had its last event then."""
        self._close("the server is stopping")
        if self._thread is not None:
            self._thread.join()
        self._host.close()
        self._preparers.shutdown(wait=True, cancel_futures=True)
        self._finish_all(Event(finish=FinishReason.ABORT))  # the thread was never started

    def submit(self, request: Request, sink: Sink) -> None:
        """Take a request. `sink` gets its events on other threads; the last one has a `finish`.

        Raises:
            ContextLengthError: prompt and answer do not fit the context, or the KV memory.
            BusyError: too many requests wait already.
            NotReadyError: the engine is stopping, or has failed.
        """
        max_tokens = self._max_tokens(request)
        instant = self._preparation.is_instant(request)
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        ticket = Ticket(request, sink, max_tokens, deadline)
        with self._wake:
            self._admit(ticket)
            if not instant:
                self._begin(ticket)
        if instant:
            self._prepare(ticket)

    def abort(self, request_id: str) -> None:
        """Drop a request, wherever it is; what it holds is free within one step. Unknown ids are ignored."""
        with self._wake:
            ticket = self._tickets.get(request_id)
            if ticket is not None:
                self._abort(ticket)

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
        memory = self.core.runner.num_blocks * self.options.block_size
        limit = min(self.context, memory)
        if prompt + (wanted or 1) > limit:
            asked = f" and {wanted} to generate" if wanted else ""
            more = "" if limit == self.context else ", or give the server more --kv-memory"
            raise ContextLengthError(
                f"{prompt} prompt tokens{asked} exceed the limit of {limit} tokens",
                where="messages",
                remedy=f"shorten the conversation or lower max_tokens{more}",
            )
        return wanted or limit - prompt

    def _admit(self, ticket: Ticket) -> None:
        """Register a ticket, or say why not. The lock is held."""
        if self._closed is not None:
            raise NotReadyError(self._closed)
        if ticket.request.id in self._tickets:
            raise OkavangoError(f"request {ticket.request.id} is already here")
        if len(self._tickets) >= self.options.max_waiting + self.options.max_sequences:
            raise BusyError(f"{len(self._tickets)} requests are here", retry_after=RETRY_AFTER_SECONDS)
        self._tickets[ticket.request.id] = ticket
        if ticket.deadline is not None:
            self._wake.notify()  # the step thread may be asleep, and has a time to wake up now

    def _abort(self, ticket: Ticket) -> None:
        """Tell the step thread that a ticket's reader is gone. The lock is held."""
        ticket.aborted = True
        self._inbox.append(ticket)
        self._wake.notify()

    def _close(self, reason: str) -> None:
        """Take no more requests, and abort those that are here."""
        with self._wake:
            self._closed = self._closed or reason
            for ticket in self._tickets.values():
                self._abort(ticket)
            self._wake.notify()

    def _begin(self, ticket: Ticket) -> None:
        """Prepare a ticket on other threads, of which none waits for an adapter's load. The lock is held."""
        adapter = ticket.request.adapter
        if adapter is None:
            self._preparers.submit(self._prepare, ticket)
        else:
            loading = self._host.load(adapter.digest)
            loading.add_done_callback(lambda loaded: self._preparers.submit(self._prepare, ticket, loaded))

    def _prepare(self, ticket: Ticket, loaded: Future[Adapter] | None = None) -> None:
        """Make the ticket's sequence and hand it to the step thread, or fail it."""
        if ticket.aborted:
            return
        try:
            if loaded is not None:
                loaded.result()  # what went wrong is this request's error
            ticket.sequence = self._preparation.prepare(ticket.request, ticket.max_tokens)
        except Exception as error:
            if not isinstance(error, OkavangoError):
                log.exception("request %s could not be prepared", ticket.request.id)
                error = OkavangoError("the request could not be prepared")
            self._finish(ticket, Event(finish=FinishReason.ERROR, error=error))
            return
        with self._wake:
            self._inbox.append(ticket)
            self._wake.notify()

    def _load(self, digest: str) -> Adapter:
        runner = self.core.runner
        return load_adapter(self._source.fetch(digest), self.base, runner.targets, runner.pack)

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            # a bug of ours: nobody shall wait for a thread that is gone (is_running tells /healthz)
            self._close("the engine has failed; the server must be restarted")
            self._finish_all(Event(finish=FinishReason.ERROR, error=OkavangoError(str(self._closed))))
            raise error

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self.core.scheduler.has_work or self._closed or self._late()):
                    self._wake.wait(seconds_left(self._tickets.values(), time.monotonic()))
                inbox, self._inbox = self._inbox, []
                overdue = self._late()
                if self._closed and not inbox and not self.core.scheduler.has_work:
                    return
            for ticket in inbox:
                self._receive(ticket)
            for ticket in overdue:
                self._drop(ticket, FinishReason.TIMEOUT)
            if self.core.scheduler.has_work:
                self.profiler.run(self.core.step)

    def _late(self) -> list[Ticket]:
        """Tickets to end now. The lock is held."""
        return late(self._tickets.values(), time.monotonic())

    def _receive(self, ticket: Ticket) -> None:
        if ticket.aborted:
            self._drop(ticket, FinishReason.ABORT)
        elif self._tickets.get(ticket.request.id) is ticket:
            assert ticket.sequence is not None
            self.core.add(ticket.sequence)

    def _drop(self, ticket: Ticket, reason: FinishReason) -> None:
        """End a ticket, wherever it is. What is being prepared for it comes to nothing."""
        if self._tickets.get(ticket.request.id) is not ticket:
            return
        ticket.aborted = True
        if ticket.sequence is None:
            self._finish(ticket, Event(finish=reason))
        else:
            self.core.abort(ticket.sequence, reason)

    def _deliver(self, sequence: Sequence, event: Event) -> None:
        ticket = self._tickets.get(sequence.request.id)
        if ticket is None or ticket.sequence is not sequence:
            return
        if event.finish is not None:
            self._finish(ticket, event)
        else:
            self._send(ticket, event)

    def _finish(self, ticket: Ticket, event: Event) -> None:
        with self._wake:
            if self._tickets.get(ticket.request.id) is not ticket:
                return
            del self._tickets[ticket.request.id]
        self._send(ticket, event)

    def _finish_all(self, event: Event) -> None:
        with self._wake:
            tickets = list(self._tickets.values())
        for ticket in tickets:
            self._finish(ticket, event)

    def _send(self, ticket: Ticket, event: Event) -> None:
        """A sink that raises has nobody behind it any more: its request ends, the step thread goes on."""
        try:
            ticket.sink(event)
        except Exception:
            log.exception("request %s: its reader failed", ticket.request.id)
            self.abort(ticket.request.id)
