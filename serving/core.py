"""The engine's heart, single-threaded: schedule → load → run → sample → deliver, one step a call.

Knows neither threads nor adapters' files nor pictures: sequences come with all that they need.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sequence_

import torch
from torch import Tensor

from okavango.platform.errors import OkavangoError
from okavango.platform.telemetry import Metrics
from okavango.serving.adapters.slots import SlotTable
from okavango.serving.attention import common_window
from okavango.serving.cache.blocks import BlockPool
from okavango.serving.cache.parking import Parked
from okavango.serving.drafting import Drafting
from okavango.serving.flight import Flight, Greatest, Row, takes_greatest
from okavango.serving.profiling import phase
from okavango.serving.runner import Runner
from okavango.serving.sampler import report, sample
from okavango.serving.scheduler import Chunk, Limits, Scheduler, Step
from okavango.serving.sequence import Sequence
from okavango.serving.types import Chosen, Event, FinishReason

log = logging.getLogger(__name__)

Deliver = Callable[[Sequence, Event], None]
Picked = tuple[Chunk, int | None, Chosen | None]


class EngineCore:
    """Steps sequences through a runner until each is finished.

    Args:
        eos: token ids that end an answer.
        deliver: called with every event, on the thread that calls `step`.
        parking_bytes: host memory for keys and values of preempted sequences.
        drafting: a draft model that proposes tokens between steps.
    """

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        eos: Iterable[int],
        deliver: Deliver,
        metrics: Metrics,
        parking_bytes: int = 0,
        drafting: Drafting | None = None,
    ) -> None:
        self.runner = runner
        pool = BlockPool(runner.num_blocks, runner.options.block_size)
        slots, parking = SlotTable(runner.options.slots), parking_bytes // runner.block_bytes
        window = common_window(runner.backend.caches)
        self.scheduler = Scheduler(pool, slots, limits, parking, window)
        self._eos = frozenset(eos)
        self._deliver = deliver
        self._metrics = metrics
        self.drafting = drafting
        self._flight: Flight | None = None  # begun before the one before it was looked at
        self._landed = 0.0

    def add(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence, reason: FinishReason = FinishReason.ABORT) -> None:
        """Drop a sequence and free all that it holds. Its reader gets what text was held back."""
        self.scheduler.drop(sequence)
        text = sequence.stream.flush() if sequence.stream is not None else ""
        self._deliver(sequence, Event(text, finish=reason, usage=sequence.usage))

    def step(self) -> None:
        """Look at the results of one step; the next one may be under way then. Whatever it raises fails its
        own sequences only."""
        if self.drafting is not None:
            with phase("draft", self._metrics):
                self.drafting.propose(self.scheduler.running)
        flight = self._flight or self._begin()
        self._flight = None
        if flight is None:
            return
        self._flight = self._follow(flight)
        try:
            picked = self._pick_of(flight)
        except Exception as error:
            self._fail_step(flight.step, error)
            return
        self._land(flight, picked)

    def _begin(self) -> Flight | None:
        """What the scheduler wants next, under way; None where it failed."""
        began = time.perf_counter()
        with phase("schedule", self._metrics):
            step = self.scheduler.schedule()
        try:
            logits, rows = self._compute(step)
            return Flight(step, rows, logits, self._greatest(logits, rows), self.scheduler.tally, began)
        except Exception as error:
            self._fail_step(step, error)
            return None

    def _greatest(self, logits: Tensor | None, rows: Sequence_[Row]) -> Greatest | None:
        """Tokens on their way, where the sampler has nothing to add and steps may follow each other so."""
        if logits is None or not rows or not self.runner.can_follow or len(rows) != len(logits):
            return None
        if not all(takes_greatest(row.chunk.sequence.sampling) for row in rows):
            return None
        return Greatest(logits)

    def _follow(self, flight: Flight) -> Flight | None:
        """The step after this one, begun before its tokens are known; None where there is more to decide."""
        if flight.greatest is None or self.drafting is not None:
            return None
        with phase("schedule", self._metrics):
            step = self.scheduler.follow(flight.step)
        if step is None:
            return None
        began = time.perf_counter()
        try:
            with phase("run", self._metrics):
                logits = self.runner.follow(step, flight.tokens(step.chunks))
            rows = [Row(chunk, index) for index, chunk in enumerate(step.chunks)]
            return Flight(step, rows, logits, Greatest(logits), self.scheduler.tally, began)
        except Exception as error:
            self._fail_step(step, error)
            return None

    def _pick_of(self, flight: Flight) -> list[Picked]:
        if flight.greatest is None:
            return self._pick(flight.logits, flight.rows)
        with phase("sample", self._metrics):
            tokens = flight.greatest.take()
        return [(row.chunk, token, None) for row, token in zip(flight.rows, tokens, strict=True)]

    def _land(self, flight: Flight, picked: list[Picked]) -> None:
        """A step is computed. Sequences that have ended since it began get nothing of it."""
        step, present = flight.step, set(self.scheduler.running)
        chunks = [_sure(chunk) for chunk in step.chunks if chunk.sequence in present]
        self._settle(chunks, [each for each in picked if each[0].sequence in present])
        self._follow_drafts(flight.logits, flight.rows)
        now = time.perf_counter()
        seconds, self._landed = now - max(flight.began, self._landed), now
        self._metrics.observe("okavango_step_seconds", seconds)
        if 2 * flight.tally.prefill_tokens > step.num_tokens:
            self.scheduler.parking.saw_computing(step.num_tokens, seconds)
        if self.drafting is not None and step.chunks and not flight.tally.prefill_tokens:
            self.drafting.saw(step.chunks, seconds)
        self._measure(flight)

    def _compute(self, step: Step) -> tuple[Tensor | None, list[Row]]:
        """The step's logits, and which of them are of tokens after which the next one is picked."""
        with phase("load", self._metrics):
            self._move(step)
            for load in step.loads:
                self.runner.load(load.slot, load.weights)
                self._metrics.count("okavango_slot_loads_total")
        if not step.chunks:
            return None, []
        wanted: list[int] = []
        rows, position = [], 0
        for chunk in step.chunks:
            position += chunk.count
            if chunk.samples:
                rows.append(Row(chunk, len(wanted)))
                wanted += range(position - 1 - len(chunk.draft), position)
        # a step of prompt chunks alone still has to run; its last row's logits are computed and not used
        with phase("run", self._metrics):
            return self.runner.run(step, wanted or [position - 1]), rows

    def _pick(self, logits: Tensor | None, rows: Sequence_[Row]) -> list[Picked]:
        if logits is None or not rows:
            return []
        with phase("sample", self._metrics):
            index = [row.index for row in rows]
            own = logits if len(index) == len(logits) else logits[torch.tensor(index, device=logits.device)]
            states = [row.chunk.sequence.sampling for row in rows]
            tokens = sample(own, states)
            return list(zip((row.chunk for row in rows), tokens, report(own, tokens, states), strict=True))

    def _settle(self, chunks: Iterable[Chunk], picked: Sequence_[Picked]) -> None:
        """Chunks are computed, and these tokens come next."""
        broken = {chunk.sequence for chunk, token, _ in picked if token is None}
        self.scheduler.commit(chunk for chunk in chunks if chunk.sequence not in broken)
        with phase("deliver", self._metrics):
            for chunk, token, chosen in picked:
                if token is None:
                    self._fail([chunk.sequence], chunk.sequence.sampling.fault or _not_finite(chunk.sequence))
                else:
                    self._append(chunk.sequence, token, () if chosen is None else (chosen,))

    def _follow_drafts(self, logits: Tensor | None, rows: Sequence_[Row]) -> None:
        """As long as what was picked is what was guessed, the next logits are there already."""
        drafted = [row for row in rows if row.chunk.draft]
        following, number = drafted, 0
        while following := [row for row in following if self._is_right(row.chunk, number)]:
            number += 1
            chunks = [Chunk(row.chunk.sequence, row.chunk.sure_end + number - 1, 1) for row in following]
            try:
                indices = (row.index + number for row in following)
                picked = self._pick(logits, list(map(Row, chunks, indices)))
            except Exception:
                log.exception("picking the tokens after %d guesses failed", number)
                self._fail([c.sequence for c in chunks], OkavangoError("the engine failed in this step"))
                return
            self._settle(chunks, picked)
        for row in drafted:
            self._learn(row.chunk)

    def _is_right(self, chunk: Chunk, number: int) -> bool:
        """Whether the sequence goes on, and with the guess of this number."""
        tokens = chunk.sequence.tokens
        is_next = number < len(chunk.draft) and len(tokens) == chunk.sure_end + number + 1
        return is_next and tokens[-1] == chunk.draft[number] and chunk.sequence in self.scheduler.running

    def _learn(self, chunk: Chunk) -> None:
        sequence, guesses, tried = chunk.sequence, chunk.sequence.guesses, len(chunk.draft)
        assert guesses is not None, "drafted without guesses"
        accepted = max(0, len(sequence.tokens) - chunk.sure_end - 1)
        guesses.learn(sequence.tokens, tried, accepted)
        counted, source = "okavango_draft_tokens_total", guesses.source
        self._metrics.count(counted, accepted, source=source, result="accepted")
        self._metrics.count(counted, tried - accepted, source=source, result="rejected")

    def _move(self, step: Step) -> None:
        """Copy preempted sequences' blocks to the host, before anybody writes to them, and others back."""
        for move in step.parks:
            began = time.perf_counter()
            copy = self.runner.park(move.blocks)
            self.scheduler.parking.saw_copying(len(move.blocks), time.perf_counter() - began)
            move.sequence.parked = Parked(move.tokens, len(move.blocks), copy)
        for move in step.restores:
            assert move.sequence.parked is not None
            self.runner.restore(move.sequence.parked.data, move.first, move.blocks)
            move.sequence.parked = None

    def _append(self, sequence: Sequence, token: int, logprobs: tuple[Chosen, ...]) -> None:
        sequence.tokens.append(token)
        stream = sequence.stream
        params = sequence.request.params
        ended = token in self._eos and not params.ignore_eos
        text = stream.push(token) if stream is not None and not ended else ""
        sequence.sampling.accept(token)
        finish = None
        if ended or sequence.sampling.is_complete or (stream is not None and stream.stopped):
            finish = FinishReason.STOP
        elif sequence.num_generated >= sequence.max_tokens:
            finish = FinishReason.LENGTH
        if finish is None:
            self._deliver(sequence, Event(text, (token,), logprobs=logprobs))
            return
        text += stream.flush() if stream is not None else ""
        self.scheduler.drop(sequence)
        cached = sequence.features_cached
        last = Event(text, (token,), finish, sequence.usage, features_cached=cached, logprobs=logprobs)
        self._deliver(sequence, last)

    def _fail_step(self, step: Step, error: Exception) -> None:
        """Fail the step's sequences, and all on a slot whose load may not have happened."""
        log.error("a step of %d sequences failed", len(step.chunks), exc_info=error)
        shown = error if isinstance(error, OkavangoError) else OkavangoError("the engine failed in this step")
        unsure = {load.digest for load in step.loads}
        failed = {chunk.sequence for chunk in step.chunks} | {move.sequence for move in step.restores}
        failed |= {sequence for sequence in self.scheduler.running if sequence.digest in unsure}
        self._fail(failed, shown)
        for digest in unsure:
            self.scheduler.slots.forget(digest)

    def _fail(self, sequences: Iterable[Sequence], error: OkavangoError) -> None:
        for sequence in sequences:
            # others may have shared its blocks already; nobody new shall meet what may have broken it
            self.scheduler.drop(sequence, forget=True)
            self._deliver(sequence, Event(finish=FinishReason.ERROR, usage=sequence.usage, error=error))

    def _measure(self, flight: Flight) -> None:
        metrics, scheduler, step, tally = self._metrics, self.scheduler, flight.step, flight.tally
        metrics.observe("okavango_batch_sequences", len(step.chunks))
        metrics.observe("okavango_batch_tokens", step.num_tokens)
        metrics.observe("okavango_batch_adapters", len(step.segments))
        prefill = min(tally.prefill_tokens, step.num_tokens)
        metrics.count("okavango_step_tokens_total", prefill, phase="prefill")
        metrics.count("okavango_step_tokens_total", step.num_tokens - prefill, phase="decode")
        metrics.gauge("okavango_waiting_requests", len(scheduler.waiting))
        metrics.gauge("okavango_running_requests", len(scheduler.running))
        metrics.gauge("okavango_kv_blocks_used", scheduler.pool.num_used)
        metrics.gauge("okavango_slots_used", len(scheduler.slots.residents))
        metrics.count("okavango_preemptions_total", tally.preempted)
        metrics.count("okavango_prefix_tokens_total", tally.reused_tokens, result="hit")
        metrics.count("okavango_prefix_tokens_total", tally.prefill_tokens, result="miss")
        metrics.count("okavango_parked_requests_total", len(step.parks))
        metrics.count("okavango_restored_tokens_total", tally.restored_tokens)
        for reason, sequences in tally.waits.items():
            metrics.count("okavango_waits_total", sequences, reason=reason)


def _sure(chunk: Chunk) -> Chunk:
    """The chunk without what is guessed."""
    return Chunk(chunk.sequence, chunk.start, chunk.count - len(chunk.draft)) if chunk.draft else chunk


def _not_finite(sequence: Sequence) -> OkavangoError:
    adapter = sequence.request.adapter
    return OkavangoError(
        f"the logits of {adapter or 'the base'} are not finite after {len(sequence.tokens)} tokens",
        remedy="its weights overflow: look at how it was trained, or serve it with --dtype float32",
    )
