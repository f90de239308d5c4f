"""The engine's heart, single-threaded: schedule → load → run → sample → deliver, one step a call.

Knows neither threads nor adapters' files nor pictures: sequences come with all that they need.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import torch
from torch import Tensor

from okavango.platform.errors import OkavangoError
from okavango.platform.telemetry import Metrics
from okavango.serving.adapters.slots import SlotTable
from okavango.serving.cache.blocks import BlockPool
from okavango.serving.cache.parking import Parked
from okavango.serving.profiling import phase
from okavango.serving.runner import Runner
from okavango.serving.sampler import report, sample
from okavango.serving.scheduler import Chunk, Limits, Scheduler, Step
from okavango.serving.sequence import Sequence
from okavango.serving.types import Chosen, Event, FinishReason

log = logging.getLogger(__name__)

Deliver = Callable[[Sequence, Event], None]
Picked = tuple[Chunk, int | None, Chosen | None]


@dataclass(frozen=True)
class Row:
    """A chunk, and which of the step's logits follow the last of its tokens that are sure."""

    chunk: Chunk
    index: int


class EngineCore:
    """Steps sequences through a runner until each is finished.

    Args:
        eos: token ids that end an answer.
        deliver: called with every event, on the thread that calls `step`.
        parking_bytes: host memory for keys and values of preempted sequences.
    """

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        eos: Iterable[int],
        deliver: Deliver,
        metrics: Metrics,
        parking_bytes: int = 0,
    ) -> None:
        self.runner = runner
        pool = BlockPool(runner.num_blocks, runner.options.block_size)
        slots, parking = SlotTable(runner.options.slots), parking_bytes // runner.block_bytes
        self.scheduler = Scheduler(pool, slots, limits, parking)
        self._eos = frozenset(eos)
        self._deliver = deliver
        self._metrics = metrics

    def add(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence, reason: FinishReason = FinishReason.ABORT) -> None:
        """Drop a sequence and free all that it holds. Its reader gets what text was held back."""
        self.scheduler.drop(sequence)
        text = sequence.stream.flush() if sequence.stream is not None else ""
        self._deliver(sequence, Event(text, finish=reason, usage=sequence.usage))

    def step(self) -> None:
        """One step. Whatever it raises fails its own sequences only."""
        began = time.perf_counter()
        with phase("schedule", self._metrics):
            step = self.scheduler.schedule()
        try:
            logits, rows = self._compute(step)
            picked = self._pick(logits, rows)
        except Exception as error:
            log.exception("a step of %d sequences failed", len(step.chunks))
            self._fail_step(step, error)
            return
        self._settle([_sure(chunk) for chunk in step.chunks], picked)
        self._follow_drafts(logits, rows)
        seconds = time.perf_counter() - began
        self._metrics.observe("okavango_step_seconds", seconds)
        if 2 * self.scheduler.tally.prefill_tokens > step.num_tokens:
            self.scheduler.parking.saw_computing(step.num_tokens, seconds)
        self._measure(step)

    def _compute(self, step: Step) -> tuple[Tensor | None, list[Row]]:
        """The step's logits, and which of them are of tokens after which the next one is picked."""
        with phase("load", self._metrics):
            self._move(step)
            for sequence in step.loads:
                self.runner.load(sequence.slot, sequence.weights)
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
        sequence = chunk.sequence
        accepted = max(0, len(sequence.tokens) - chunk.sure_end - 1)
        if sequence.lookup is not None:
            sequence.lookup.learn(sequence.tokens, accepted)
        self._metrics.count("okavango_draft_tokens_total", accepted, result="accepted")
        self._metrics.count("okavango_draft_tokens_total", len(chunk.draft) - accepted, result="rejected")

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
        shown = error if isinstance(error, OkavangoError) else OkavangoError("the engine failed in this step")
        unsure = {sequence.digest for sequence in step.loads} - {None}
        failed = {chunk.sequence for chunk in step.chunks} | {move.sequence for move in step.restores}
        failed |= {sequence for sequence in self.scheduler.running if sequence.digest in unsure}
        self._fail(failed, shown)
        for digest in unsure:
            self.scheduler.slots.forget(str(digest))

    def _fail(self, sequences: Iterable[Sequence], error: OkavangoError) -> None:
        for sequence in sequences:
            # others may have shared its blocks already; nobody new shall meet what may have broken it
            self.scheduler.drop(sequence, forget=True)
            self._deliver(sequence, Event(finish=FinishReason.ERROR, usage=sequence.usage, error=error))

    def _measure(self, step: Step) -> None:
        metrics, scheduler, tally = self._metrics, self.scheduler, self.scheduler.tally
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
