"""The engine: requests in, streams of events out. Threads and preparation live here, decisions do not.

submit ─▶ prepare (its own threads: adapter → host, media → features → embeddings) ─▶ desk
desk ─▶ the step thread: EngineCore.step() until nothing is left ─▶ sinks

A request is a ticket from `submit` to its last event: see serving/desk.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from okavango.modalities.base import Base, load_tokenizer
from okavango.modalities.encoders import make_renderer
from okavango.platform.errors import ConfigError, NotReadyError, OkavangoError
from okavango.platform.telemetry import Metrics, NullMetrics
from okavango.serving.adapters.loading import Adapter, HostCache, load_adapter
from okavango.serving.cache.features import FeatureCache
from okavango.serving.core import EngineCore
from okavango.serving.desk import Desk
from okavango.serving.drafting import make_drafting
from okavango.serving.embedding import Embedded, Embedder, Input
from okavango.serving.media import MediaRuntime
from okavango.serving.options import EngineOptions as EngineOptions
from okavango.serving.options import EngineStats
from okavango.serving.preparation import Preparation, vocabulary_of
from okavango.serving.profiling import StepProfiler
from okavango.serving.runner import Runner
from okavango.serving.sequence import Sequence as EngineSequence
from okavango.serving.tickets import Sink, Ticket, most_tokens
from okavango.serving.types import AdapterRef, AdapterSource, Event, FinishReason, Request

log = logging.getLogger(__name__)

_PREPARERS = 4  # most of them wait for an encoder
_FAILED = "the engine has failed; the server must be restarted"


class Engine:
    """One base, many adapters. Loads the decoder when made, encoders only when a medium comes.

    Raises:
        UnsupportedError: the decoder, or the draft base's, cannot be served.
        ConfigError: the draft base has another vocabulary.
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
        self.renderer = make_renderer(base, self.tokenizer)
        runner = Runner(base, options.runner)
        vocabulary = vocabulary_of(runner.decoder, self.tokenizer)
        limits, parking = options.limits, options.parking_bytes
        guesses = options.draft_rows > 0 and runner.backend.is_invariant
        drafting = make_drafting(options, self.tokenizer, vocabulary.size, is_used=guesses)
        self.core = EngineCore(runner, limits, vocabulary.eos, self._deliver, metrics, parking, drafting)
        features = FeatureCache(options.feature_cache_bytes)
        encoders = options.encoders(runner.num_blocks * runner.block_bytes)
        self.media = MediaRuntime(base, features, metrics, options.device, encoders)
        self.profiler = StepProfiler()
        self._source = source
        self._host = HostCache(options.host_cache_bytes, self._load)
        self._preparation = Preparation(
            self.tokenizer, self.media, self._host, options.max_rank, vocabulary, guesses=guesses
        )
        self._preparers = ThreadPoolExecutor(_PREPARERS, thread_name_prefix="okavango-prepare")
        self._embedder = Embedder(base, runner, self.media, self._host, self._preparers, options.max_waiting)
        self._desk = Desk(options.max_waiting + options.max_sequences)
        self._thread: threading.Thread | None = None
        metrics.gauge("okavango_kv_blocks_total", runner.num_blocks)

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the step thread, and load the encoders that are to be there from the start."""
        self.media.encoders.preload()
        self._thread = threading.Thread(target=self._run, name="okavango-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Abort what is left and end the step thread. Every request has had its last event then."""
        self._desk.close("the server is stopping")
        if self._thread is not None:
            self._thread.join()
        self._host.close()
        self._preparers.shutdown(wait=True, cancel_futures=True)
        self.media.close()
        self.core.runner.close()
        self._finish_all(Event(finish=FinishReason.ABORT))  # the thread was never started

    def submit(self, request: Request, sink: Sink) -> None:
        """Take a request. `sink` gets its events on other threads; the last one has a `finish`.

        Raises:
            ContextLengthError: prompt and answer do not fit the context, or the KV memory.
            BusyError: too many requests wait already.
            NotReadyError: the engine is stopping, or has failed.
        """
        max_tokens = most_tokens(request, self.context, self.core.scheduler.longest)
        instant = self._preparation.is_instant(request)
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        ticket = Ticket(request, sink, max_tokens, deadline)
        self._desk.admit(ticket, None if instant else self._begin)
        if instant:
            self._prepare(ticket)

    def pin(self, adapters: Collection[AdapterRef]) -> None:
        """Keep these adapters on the host and in slots, and no longer those of the last call.

        Takes as long as loading them; their slots they get on the step thread. One caller at a time.

        Raises:
            ConfigError: they leave no slot for others.
            OkavangoError: one cannot be fetched or bound, or is over the rank limit; nothing has changed.
        """
        if len({ref.digest for ref in adapters}) >= self.options.slots:
            raise ConfigError(
                f"{len(adapters)} pins leave none of {self.options.slots} slots for other adapters",
                remedy=f"pin fewer, or okavango serve --slots {len(adapters) + 1}",
            )
        loaded = [self._preparation.adapter(ref) for ref in adapters]
        self._host.pin(loaded)
        self._desk.pin({adapter.digest: adapter.lora for adapter in loaded})

    def abort(self, request_id: str) -> None:
        """Drop a request, wherever it is; what it holds is free within one step. Unknown ids are ignored."""
        self._desk.abort(request_id)

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

    async def embed(self, inputs: Sequence[Input], adapter: AdapterRef | None = None) -> Embedded:
        """Texts' tokens and media as vectors of the space that the adapter, or the base, was trained with.

        Raises:
            UnsupportedError: it was trained with none.
            InputError: its space has no such medium.
            BusyError: too many calls wait already.
            NotReadyError: the engine is stopping, or has failed.
            OkavangoError: the adapter cannot be loaded, or a medium not be decoded.
        """
        if not self.is_running:
            raise NotReadyError("the engine is not running")
        return await self._embedder.embed(inputs, adapter)

    def stats(self) -> EngineStats:
        scheduler = self.core.scheduler
        running, waiting = len(scheduler.running), len(scheduler.waiting)
        return EngineStats(
            preparing=max(0, len(self._desk) - running - waiting),
            running=running,
            waiting=waiting,
            kv_blocks_used=scheduler.pool.num_used,
            kv_blocks_total=scheduler.pool.num_blocks,
            slots=scheduler.slots.residents,
            encoders_loaded=self.media.encoders.loaded,
        )

    def _begin(self, ticket: Ticket) -> None:
        """Prepare a ticket on other threads, of which none waits for an adapter's load."""
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
        self._desk.put(ticket)

    def _load(self, digest: str) -> Adapter:
        runner = self.core.runner
        return load_adapter(self._source.fetch(digest), self.base, runner.targets, runner.pack)

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            # a bug of ours: nobody shall wait for a thread that is gone (is_running tells /healthz)
            self._desk.close(_FAILED)
            self._finish_all(Event(finish=FinishReason.ERROR, error=OkavangoError(_FAILED)))
            raise error

    def _loop(self) -> None:
        scheduler = self.core.scheduler
        while (news := self._desk.wait(has_work=scheduler.has_work)) is not None:
            if news.pins is not None:
                scheduler.preloads.pin(news.pins)
            for ticket in news.inbox:
                self._receive(ticket)
            for ticket in news.overdue:
                self._drop(ticket, FinishReason.TIMEOUT)
            if scheduler.has_work:
                self.profiler.run(self.core.step)

    def _receive(self, ticket: Ticket) -> None:
        if ticket.aborted:
            self._drop(ticket, FinishReason.ABORT)
        elif self._desk.holds(ticket):
            assert ticket.sequence is not None
            self.core.add(ticket.sequence)

    def _drop(self, ticket: Ticket, reason: FinishReason) -> None:
        """End a ticket, wherever it is. What is being prepared for it comes to nothing."""
        if not self._desk.holds(ticket):
            return
        ticket.aborted = True
        if ticket.sequence is None:
            self._finish(ticket, Event(finish=reason))
        else:
            self.core.abort(ticket.sequence, reason)

    def _deliver(self, sequence: EngineSequence, event: Event) -> None:
        ticket = self._desk.get(sequence.request.id)
        if ticket is None or ticket.sequence is not sequence:
            return
        if event.finish is not None:
            self._finish(ticket, event)
        else:
            self._send(ticket, event)

    def _finish(self, ticket: Ticket, event: Event) -> None:
        if self._desk.remove(ticket):
            self._send(ticket, event)

    def _finish_all(self, event: Event) -> None:
        for ticket in self._desk.all():
            self._finish(ticket, event)

    def _send(self, ticket: Ticket, event: Event) -> None:
        """A sink that raises has nobody behind it any more: its request ends, the step thread goes on."""
        try:
            ticket.sink(event)
        except Exception:
            log.exception("request %s: its reader failed", ticket.request.id)
            self.abort(ticket.request.id)
