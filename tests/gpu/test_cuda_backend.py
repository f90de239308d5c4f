"""The kernels for GPUs behind a whole engine: in float32 the tokens of transformers with PEFT, in bfloat16
logits within bounds, and nothing lost however requests and adapters come and go.

Needs only what a bare GPU machine has: torch, transformers, peft, safetensors, triton, pytest.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from invented import random_decoder, write_adapters, write_base
from ours import Bundles
from peft import PeftModel
from transformers import AutoConfig, PreTrainedConfig

from okavango.modalities.base import Base, load_decoder
from okavango.modalities.peft_files import read_peft
from okavango.modalities.precision import PARITY_BOUNDS, relative_error
from okavango.modalities.prompt import Rendered, Span
from okavango.platform.errors import OkavangoError
from okavango.serving.engine import Engine, EngineOptions
from okavango.serving.runner import Runner
from okavango.serving.sequence import Sequence as EngineSequence
from okavango.serving.step import Chunk, Step
from okavango.serving.types import AdapterRef, Event, FinishReason, Request, SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")

GIB = 1 << 30
RANKS = (4, 16, 24, 64)


class Running:
    """An engine on the GPU, with graphs of compiled or plain layers, or without (eager)."""

    def __init__(self, base: Base, bundles: Bundles, layers: str = "plain", **options: Any) -> None:
        shared = {"device": "cuda", "kernels": Path("unused"), "kv_bytes": GIB // 4, "max_sequences": 16}
        with pytest.MonkeyPatch.context() as patch:
            if layers != "compiled":  # which takes seconds a size
                patch.setattr("okavango.serving.cuda.backend.install_forms", lambda decoder: False)
            self.engine = Engine(base, bundles, EngineOptions(**{**shared, **options}))
        self.backend: Any = self.engine.core.runner.backend
        assert self.backend.name == "cuda", "the kernels do not serve this decoder"
        if layers != "eager":
            self.backend.wait()
            assert len(self.backend._graphs), "no graph was made"
        else:
            self.backend.close()
            self.backend._graphs._ready.clear()
        step = self.engine.core.step

        def checked() -> None:
            step()
            self.engine.core.scheduler.check_integrity()

        self.engine.core.step = checked  # type: ignore[method-assign]
        self.engine.start()

    def answers(self, requests: Sequence[Request]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in requests]
        errors: list[OkavangoError | None] = []
        done = threading.Semaphore(0)

        def take(i: int, event: Event) -> None:
            found[i].extend(event.tokens)
            if event.finish is not None:
                errors.append(event.error)
                done.release()

        for i, request in enumerate(requests):
            self.engine.submit(request, lambda event, i=i: take(i, event))
        for _ in requests:
            assert done.acquire(timeout=120), "the engine did not finish"
        assert not any(errors), errors
        return found


@pytest.fixture
def run() -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def make(*given: Any, **options: Any) -> Running:
        made.append(Running(*given, **options))
        return made[-1]

    yield make
    for running in made:
        running.engine.stop()
        running.engine.core.scheduler.check_integrity()
        assert running.engine.core.scheduler.pool.num_used == 0
    made.clear()
    torch.cuda.empty_cache()


def any_config(chance: random.Random, kind: str) -> PreTrainedConfig:
    """A decoder of this family, of a shape drawn by chance."""
    width = chance.choice((16, 24, 32, 64, 80, 128) if kind == "llama" else (32, 64, 128, 256))
    kv_heads, group = chance.choice((1, 2, 3)), chance.choice((1, 2, 3, 4, 7))
    shape = {
        "vocab_size": 512 + chance.randrange(100),
        "hidden_size": 8 * kv_heads * group * chance.randrange(2, 12),
        "intermediate_size": 8 * chance.randrange(8, 60),
        "num_hidden_layers": 2,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
    }
    if kind == "gemma3_text":
        shape |= {"sliding_window": chance.choice((17, 32, 90)), "query_pre_attn_scalar": width}
        shape |= {"layer_types": ["sliding_attention", "full_attention"]}
    return AutoConfig.for_model(kind, **shape)


def any_base(folder: Path, kind: str, seed: int) -> tuple[Base, Bundles]:
    config = any_config(random.Random(seed), kind)
    torch.manual_seed(seed)
    folder.mkdir()
    base = write_base(folder, config, random_decoder(config, torch.float32))
    return base, write_adapters(base, folder / "adapters", RANKS)


def any_requests(chance: random.Random, refs: Sequence[AdapterRef | None], count: int) -> list[Request]:
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    found = []
    for number in range(count):
        tokens = tuple(chance.randrange(500) for _ in range(chance.choice((1, 2, 15, 16, 17, 60, 130, 300))))
        found.append(Request(f"r{number}", Rendered(tokens), chance.choice(refs), params))
    return found


class Reference:
    """transformers with PEFT in float32, one request at a time."""

    def __init__(self, base: Base, bundles: Bundles) -> None:
        decoder = load_decoder(base, torch.float32, "cuda")
        first, *others = bundles.refs
        self.model = PeftModel.from_pretrained(decoder, self._folder(bundles, first), first.digest).eval()
        for ref in others:
            self.model.load_adapter(self._folder(bundles, ref), ref.digest)

    @staticmethod
    def _folder(bundles: Bundles, ref: AdapterRef) -> str:
        return str(bundles.fetch(ref.digest) / "decoder")

    @torch.inference_mode()
    def answer(self, request: Request) -> list[int]:
        ids = torch.tensor([request.prompt.tokens], device="cuda")
        count = request.params.max_tokens
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
        if request.adapter is None:
            with self.model.disable_adapter():
                out = self.model.generate(**asked)
        else:
            self.model.set_adapter(request.adapter.digest)
            out = self.model.generate(**asked)
        return list(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("layers", ["compiled", "plain", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_mixed_adapters_equal_transformers_with_peft(run, tmp_path, kind: str, layers: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")  # so that a failure can be had again
    base, bundles = any_base(tmp_path / "base", kind, seed)
    chance = random.Random(seed)
    requests = any_requests(chance, [None, *bundles.refs], 14)
    sizes = {"max_sequences": 4, "max_step_tokens": 96} if layers == "compiled" else {"max_step_tokens": 200}
    running = run(base, bundles, layers, dtype="float32", slots=3, **sizes)
    found = running.answers(requests)
    reference = Reference(base, bundles)
    assert found == [reference.answer(request) for request in requests]


def sequences(runner: Runner, lengths: Sequence[int], slots: int) -> list[EngineSequence]:
    """Sequences of random tokens on blocks of their own, slots in turn, slot 0 among them."""
    chance, size, taken = random.Random(5), runner.options.block_size, 0
    found = []
    for number, length in enumerate(lengths):
        tokens = tuple(chance.randrange(500) for _ in range(length))
        sequence = EngineSequence(Request(f"s{number}", Rendered(tokens)), max_tokens=1)
        count = -(-length // size)
        sequence.blocks = list(range(taken, taken + count))
        sequence.slot = number * (slots + 1) // len(lengths)  # chunks of one slot are adjacent
        taken += count
        found.append(sequence)
    return found


def load_all(runner: Runner, bundles: Bundles) -> None:
    for slot, ref in enumerate(bundles.refs, start=1):
        weights = read_peft(bundles.fetch(ref.digest) / "decoder", runner.targets)
        runner.load(slot, runner.pack(weights))


def step_of(sequences: Sequence[EngineSequence], last: int) -> Step:
    """The `last` tokens of each, or all but the last one where that is 0."""
    chunks = []
    for sequence in sequences:
        length = len(sequence.tokens)
        start = length - last if last else 0
        chunks.append(Chunk(sequence, start, last or length - 1))
    return Step((), tuple(chunks))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_graphs_give_the_logits_of_plain_layers(run, tmp_path, kind: str) -> None:
    base, bundles = any_base(tmp_path / "base", kind, random.randrange(1 << 30))
    running = run(base, bundles, dtype="bfloat16", slots=4, max_sequences=40, max_step_tokens=700)
    runner, graphs = running.engine.core.runner, running.backend._graphs
    load_all(runner, bundles)
    ready = list(graphs._ready)
    for count in (1, 3, 8, 29, 40):
        own = sequences(runner, [2 + 7 * i % 60 for i in range(count)], 4)
        for last, rows in ((0, None), (1, range(count))):
            step = step_of(own, last)
            wanted = list(rows or [step.num_tokens - 1])
            graphs._ready = []
            plain = runner.run(step, wanted).clone()
            graphs._ready = list(ready)
            found = runner.run(step, wanted)
            assert len(graphs._ready) == len(ready), "a graph was found wrong"
            assert relative_error(found, plain) < PARITY_BOUNDS[torch.bfloat16]


def test_rows_of_media_mix_with_tokens(run, tmp_path) -> None:
    base, bundles = any_base(tmp_path / "base", "llama", random.randrange(1 << 30))
    running = run(base, bundles, dtype="float32", slots=4)
    runner = running.engine.core.runner
    width = runner.decoder.config.hidden_size
    tokens = tuple(range(1, 31))
    span = Span("image", 10, 4)
    vectors = torch.randn(4, width, device="cuda") * 0.1
    pictured = EngineSequence(Request("m", Rendered(tokens, spans=(span,))), max_tokens=1, embeds=(vectors,))
    pictured.blocks = [0, 1]
    beside = sequences(runner, [20, 9], 0)
    for number, sequence in enumerate(beside):
        sequence.blocks = [4 + 2 * number, 5 + 2 * number]
    plain = load_decoder(base, torch.float32, "cuda")
    ids = torch.tensor([tokens], device="cuda")
    embeddings = plain.get_input_embeddings()(ids).clone()
    embeddings[0, 10:14] = vectors
    expected = plain(inputs_embeds=embeddings, use_cache=False).logits[0, -1:]
    # cut in the midst of the medium: one of its rows comes as a single token's would
    for cuts in ((0, 11, 12, 29, 30), (0, 30)):
        for start, end in pairwise(cuts):
            others = tuple(Chunk(s, 0, len(s.tokens)) for s in beside)
            step = Step((), (*others, Chunk(pictured, start, end - start)))
            found = runner.run(step, [step.num_tokens - 1])
        assert relative_error(found, expected) < PARITY_BOUNDS[torch.float32]


def test_adapters_and_requests_come_and_go_and_memory_stays(run, tmp_path) -> None:
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    config = any_config(chance, "llama")
    (tmp_path / "base").mkdir()
    base = write_base(tmp_path / "base", config, random_decoder(config, torch.float32))
    bundles = write_adapters(base, tmp_path / "adapters", [chance.choice(RANKS) for _ in range(12)])
    running = run(base, bundles, dtype="bfloat16", slots=3, kv_bytes=1 << 21, max_step_tokens=128)
    engine, held = running.engine, []
    for round_ in range(6):
        done, asked = threading.Semaphore(0), 60

        def take(event: Event, leaves: int, request_id: str, seen: list[int], done=done) -> None:
            seen.append(len(event.tokens))
            if event.finish is not None:
                assert event.finish is not FinishReason.ERROR, event.error
                done.release()
            elif sum(seen) == leaves:
                engine.abort(request_id)

        for number in range(asked):
            request = any_requests(chance, [None, *bundles.refs], 1)[0]
            request = replace(request, id=f"{round_}/{number}")
            leaves = chance.choice((0, 0, 0, 1, 5))
            engine.submit(request, partial(take, leaves=leaves, request_id=request.id, seen=[]))
            time.sleep(chance.expovariate(1 / 0.003))
        for _ in range(asked):
            assert done.acquire(timeout=120), "the engine did not finish"
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[1] + (1 << 20), f"memory grew (seed {seed}): {held}"


def test_a_cancelled_request_disturbs_nobody(run, tmp_path) -> None:
    base, bundles = any_base(tmp_path / "base", "llama", random.randrange(1 << 30))
    running = run(base, bundles, dtype="float32", slots=4)
    requests = any_requests(random.Random(3), [None, *bundles.refs], 6)
    alone = [running.answers([request])[0] for request in requests]
    endless = SamplingParams(max_tokens=600, temperature=0, ignore_eos=True)
    ended = threading.Event()

    def take(event: Event) -> None:
        if event.finish is not None:
            assert event.finish is FinishReason.ABORT
            ended.set()
        elif event.tokens:
            running.engine.abort("endless")

    running.engine.submit(Request("endless", Rendered((1, 2, 3)), bundles.refs[0], endless), take)
    assert running.answers(requests) == alone
    assert ended.wait(timeout=60)
