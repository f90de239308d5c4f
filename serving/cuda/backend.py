"""Computes steps on a GPU: transformers' own modules over kernels of ours, replayed as CUDA graphs.

Serves decoders whose attention goes through transformers' interface and whose linear layers are torch's own
and see every row once; others are torch's (serving/paged.py). Positions that see later ones are, too.
"""

# Shapes: T rows of the step, D decoder width, V vocabulary, K kv heads, N blocks, P positions a block

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from okavango.modalities.lora import LoraWeights, Target
from okavango.modalities.prompt import Rendered
from okavango.platform.errors import UnsupportedError
from okavango.serving.attention import KeyValues, LayerShape
from okavango.serving.backend import RunnerOptions, num_blocks
from okavango.serving.cuda.arena import Arena, PackedAdapter
from okavango.serving.cuda.attention import NAME
from okavango.serving.cuda.compiled import install_forms, raise_limit
from okavango.serving.cuda.graphs import Graphs, ladder
from okavango.serving.cuda.kernels.prefill import tile_tokens
from okavango.serving.cuda.linear import find_groups, install_groups
from okavango.serving.cuda.plan import Plan, Room, Sizes, decode_room, mixed_room, plan_step
from okavango.serving.cuda.staging import Staging
from okavango.serving.cuda.state import StepTables, computing
from okavango.serving.paged import attention_modules, measure_layers
from okavango.serving.sequence import Sequence as EngineSequence
from okavango.serving.step import Chunk, Step
from okavango.serving.types import Request

log = logging.getLogger(__name__)

_SPARE_BLOCKS = 2  # nobody's: where graphs are tried
_MOST_GRAPH_ROWS = 2048  # beyond, kernels take longer than launching them does
_FEW_ROWS = 128  # up to so many, adapters' tiles are small


class CudaBackend:
    """The kernels over one decoder, which they change for good.

    Raises:
        UnsupportedError: they do not compute this decoder.
    """

    name = "cuda"
    is_invariant = False
    can_follow = True

    def __init__(self, decoder: PreTrainedModel, targets: Sequence[Target], options: RunnerOptions) -> None:
        self.options = options
        self.device = _indexed(torch.device(options.device))
        self.decoder = decoder
        shapes: list[LayerShape] = []
        groups = find_groups(decoder, targets, lambda: shapes.extend(measure_layers(decoder)))
        widths = {max(shape.key_width, shape.value_width) for shape in shapes}
        config = decoder.config.get_text_config()
        heads = {config.num_attention_heads // shape.heads for shape in shapes}
        if len(widths) != 1 or len(heads) != 1:
            raise UnsupportedError("its layers' heads are of several shapes", where="CUDA kernels")
        self._query_tile = tile_tokens(options.dtype == torch.float32, *widths, *heads)
        self.num_blocks = num_blocks(shapes, options)
        self._arena = Arena(groups, options.slots, options.max_rank, options.dtype, self.device)
        install_groups(decoder, self._arena)  # from here on the decoder is ours
        self.caches = self._allocate(shapes)
        self._has_forms = install_forms(decoder)
        self._can_be_any = False
        self._staging = Staging(self.device)
        self._graphs = Graphs(self._forward, config.hidden_size, options.dtype, self.device)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def pack(self, weights: LoraWeights) -> PackedAdapter:
        return self._arena.pack(weights)

    def load(self, slot: int, packed: PackedAdapter) -> None:
        self._arena.write(slot, packed)

    def replay(self, step: Step, rows: Sequence[int]) -> Tensor | None:
        """Logits of a step of single tokens, where a graph is ready for it."""
        if not len(self._graphs) or any(not _is_token(chunk) for chunk in step.chunks):
            return None
        return self._replay(self._plan(step, rows))

    def follow(self, step: Step, tokens: Tensor) -> Tensor:
        plan = self._plan(step, range(len(tokens)))
        logits = self._replay(plan, tokens=tokens) if len(self._graphs) else None
        if logits is None:
            sent = self._send(plan)
            sent.tables["tokens"].copy_(tokens)
            logits = self._forward(sent, None)
        return logits

    def compute(self, embeddings: Tensor, step: Step, rows: Sequence[int]) -> Tensor:
        plan = self._plan(step, rows)
        logits = self._replay(plan, embeddings) if len(self._graphs) else None
        if logits is None:
            logits = self._compute(self._send(plan), embeddings)
        return logits

    def begin_capture(self) -> None:
        """Start a thread that makes graphs; steps go on without until they are there."""
        self._thread = threading.Thread(target=self._capture, name="okavango-graphs", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until all graphs are made."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """End the thread that makes graphs, after the one that it is at."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def capture(self, room: Room, *, uses_slots: bool) -> None:
        """Make one graph. Raises whatever goes wrong."""
        has_embeddings = room.query_tiles > 0
        form = ("any" if has_embeddings else "fixed") if self._has_forms else None
        arena = self._arena if uses_slots else None
        step = StepTables(room, {}, self._sizes(room.rows), arena, form)  # type: ignore[arg-type]
        self._graphs.capture(step, self._check_plan(room), has_embeddings=has_embeddings)

    def _try_long(self) -> None:
        """See whether steps that no graph holds may be of compiled layers."""
        rows = self.options.max_step_tokens
        if self._has_forms and rows > _MOST_GRAPH_ROWS:
            room = self._mixed_room(rows)
            step = StepTables(room, {}, self._sizes(rows), self._arena, "any")
            self._can_be_any = self._graphs.agrees(step, self._check_plan(room))

    def rooms(self) -> Iterator[tuple[Room, bool]]:
        """What graphs are made of, and whether with adapters, in the order of their use: a larger one serves
        smaller steps, and one with adapters serves steps without, until theirs are there."""
        options, slots = self.options, self.options.slots
        blocks = self._sequence_blocks()
        decodes = [
            decode_room(rows, slots, blocks, self._sizes(rows)) for rows in ladder(options.max_sequences)
        ]
        most = min(options.max_step_tokens, _MOST_GRAPH_ROWS)
        mixed = [self._mixed_room(rows) for rows in ladder(most) if rows > 2 * options.block_size]
        for rooms in (decodes, mixed):
            for room in reversed(rooms):
                yield room, True
        for rooms in (decodes, mixed):
            for room in reversed(rooms):
                yield room, False

    def _capture(self) -> None:
        for room, uses_slots in self.rooms():
            if self._closing.is_set():
                return
            try:
                self.capture(room, uses_slots=uses_slots)
            except Exception as error:
                if self._has_forms:
                    log.warning("layers are not compiled: %s", error, exc_info=True)
                    self._has_forms = False
                    continue
                log.warning("steps are computed without CUDA graphs: %s", error, exc_info=True)
                return
        log.info("%d CUDA graphs are ready", len(self._graphs))
        try:
            self._try_long()
        except Exception as error:
            log.warning("layers are not compiled for long steps: %s", error, exc_info=True)

    def _replay(
        self, plan: Plan, embeddings: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor | None:
        graph = self._graphs.find(
            plan.room, uses_slots=plan.uses_slots, has_embeddings=embeddings is not None
        )
        if graph is None:
            return None
        return self._graphs.replay(graph, plan, embeddings, tokens)

    def _compute(self, step: StepTables, embeddings: Tensor) -> Tensor:
        """A step that no graph holds. Of many rows, compiled layers are quicker; they have been made."""
        if not self._can_be_any or step.room.rows <= _MOST_GRAPH_ROWS:
            return self._forward(step, embeddings)
        raise_limit()
        try:
            return self._forward(replace(step, form="any"), embeddings)
        except Exception as error:
            log.warning("layers are not compiled for long steps: %s", error, exc_info=True)
            self._can_be_any = False
            return self._forward(step, embeddings)

    def _forward(self, step: StepTables, embeddings: Tensor | None) -> Tensor:
        """The decoder over a step whose tables are on the device → logits [outputs, V]."""
        tables = step.tables
        tokens = {"input_ids": tables["tokens"].long()[None]} if embeddings is None else {}
        given = {"inputs_embeds": embeddings[None]} if embeddings is not None else tokens
        with computing(step):
            output = self.decoder(
                **given,
                position_ids=tables["positions"].long()[None],
                use_cache=False,
                logits_to_keep=tables["outputs"].long(),
            )
        logits: Tensor = output.logits[0]
        return logits

    def _plan(self, step: Step, rows: Sequence[int]) -> Plan:
        return plan_step(step, rows, self._sizes(step.num_tokens))

    def _send(self, plan: Plan) -> StepTables:
        """The plan's tables on the device, of its own room."""
        room = plan.room
        memory = torch.empty(room.size, dtype=torch.int32, device=self.device)
        piece = self._staging.borrow(room.size)
        piece.send(plan.write(room, piece.numbers), memory)
        arena = self._arena if plan.uses_slots else None
        return StepTables(room, room.views(memory), self._sizes(room.rows), arena)

    def _sizes(self, rows: int) -> Sizes:
        return Sizes(self.options.block_size, self._query_tile, 16 if rows <= _FEW_ROWS else 64)

    def _sequence_blocks(self) -> int:
        """Most blocks that one sequence can hold."""
        context = self.decoder.config.get_text_config().max_position_embeddings
        return min(self.num_blocks, -(-context // self.options.block_size))

    def _mixed_room(self, rows: int) -> Room:
        options, blocks = self.options, self._sequence_blocks()
        return mixed_room(rows, options.max_sequences, options.slots, blocks, self._sizes(rows))

    def _check_plan(self, room: Room) -> Plan:
        """A step to try a graph with, on blocks that are nobody's: first tokens, and a first block's beside
        them where the graph takes chunks."""
        size, (alone, shared) = self.options.block_size, self._spare
        lengths = [size, *[1] * (room.decodes - 1)] if room.chunks else [1] * room.decodes
        lengths = lengths[: 1 + max(0, room.rows - lengths[0])]
        chunks = []
        for i, length in enumerate(lengths):
            tokens = tuple((1 + 7 * i + 3 * j) % 97 for j in range(length))
            sequence = EngineSequence(Request(f"graph-{i}", Rendered(tokens)), max_tokens=1)
            sequence.blocks = [shared if length == 1 else alone]
            chunks.append(Chunk(sequence, 0, length))
        last = range(sum(lengths) - len(lengths), sum(lengths))
        return plan_step(Step((), tuple(chunks)), last, self._sizes(room.rows))

    def _allocate(self, shapes: Sequence[LayerShape]) -> list[KeyValues]:
        """Give every layer its blocks, keys and values in separate storages [N, K, P, width]."""
        count, size = self.num_blocks, self.options.block_size
        self._spare = (count, count + 1)
        found = []
        for module, shape in zip(attention_modules(self.decoder), shapes, strict=True):
            each = []
            for name, width in (("keys", shape.key_width), ("values", shape.value_width)):
                dims = (count + _SPARE_BLOCKS, shape.heads, size, width)
                tensor = torch.zeros(dims, dtype=self.options.dtype, device=self.device).transpose(0, 1)
                module.register_buffer(f"okavango_{name}", tensor, persistent=False)
                each.append(tensor[:, :count])
            found.append(KeyValues(each[0], each[1], shape.window))
        self.decoder.set_attn_implementation(NAME)
        return found


def _indexed(device: torch.device) -> torch.device:
    """ "cuda" by its number, which some of torch's functions ask for."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _is_token(chunk: Chunk) -> bool:
    """Whether all that the chunk computes is one token, no medium's."""
    spans = chunk.sequence.request.prompt.spans
    return chunk.count == 1 and not any(span.start <= chunk.start < span.end for span in spans)
