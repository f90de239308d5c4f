"""The engine on CUDA: the same tokens as transformers and PEFT in float32, mixed ranks in one batch."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from okavango.modalities.base import Base, load_decoder
from okavango.modalities.content import Message, Text
from okavango.modalities.peft_files import read_peft
from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tiny_bundle import write_tiny_bundle
from okavango.platform.bundle import read_manifest
from okavango.serving.engine import Engine, EngineOptions
from okavango.serving.types import AdapterRef, Event, Request, SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")

PARAMS = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


class Source:
    def __init__(self, base: Base, folder: Path) -> None:
        self.folders = {}
        for rank in (4, 8, 16):
            write_tiny_bundle(folder / str(rank), base, seed=rank, rank=rank, head=False, probes=False)
            self.folders[read_manifest(folder / str(rank)).digest] = folder / str(rank)

    def fetch(self, digest: str) -> Path:
        return self.folders[digest]


@pytest.fixture
def base(tmp_path) -> Base:
    # no encoder: open_clip is not everywhere where a GPU is
    return write_tiny_base(tmp_path / "base", image=False)


def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in requests]
    done = threading.Semaphore(0)

    def take(i: int, event: Event) -> None:
        assert event.error is None
        found[i].extend(event.tokens)
        if event.finish is not None:
            done.release()

    for i, request in enumerate(requests):
        engine.submit(request, lambda event, i=i: take(i, event))
    for _ in requests:
        assert done.acquire(timeout=120)
    return found


@torch.inference_mode()
def reference(base: Base, folder: Path | None, request: Request) -> list[int]:
    model = load_decoder(base, torch.float32, "cuda")
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder / "decoder").eval()
    ids = torch.tensor([request.prompt.tokens], device="cuda")
    count = {"max_new_tokens": PARAMS.max_tokens, "min_new_tokens": PARAMS.max_tokens}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **count)
    return out[0, ids.shape[1] :].tolist()


def test_mixed_ranks_equal_the_reference(base, tmp_path):
    source = Source(base, tmp_path / "bundles")
    options = EngineOptions(dtype="float32", device="cuda", kv_bytes=1 << 24, slots=2, max_step_tokens=48)
    engine = Engine(base, source, options)
    engine.start()
    adapters: list[str | None] = [None, *source.folders]
    requests = []
    for i, length in enumerate((3, 90, 17, 40, 64, 5, 130, 29)):
        digest = adapters[i % len(adapters)]
        message = Message("user", (Text(("tell me more " * length)[:length]),))
        prompt = engine.renderer.prompt([message])
        requests.append(Request(f"r{i}", prompt, AdapterRef("a", 1, digest) if digest else None, PARAMS))
    try:
        found = answers(engine, requests)
    finally:
        engine.stop()
    folders = [source.folders[r.adapter.digest] if r.adapter else None for r in requests]
    assert found == [reference(base, folder, r) for folder, r in zip(folders, requests, strict=True)]
    engine.core.scheduler.check_integrity()


def test_adapters_wait_page_locked_and_arrive_whole(base, tmp_path):
    source = Source(base, tmp_path / "bundles")
    options = EngineOptions(dtype="bfloat16", device="cuda", kv_bytes=1 << 24, slots=2, max_step_tokens=48)
    engine = Engine(base, source, options)
    engine.start()
    prompt = engine.renderer.prompt([Message("user", (Text("hello"),))])
    try:
        for i, digest in enumerate([*source.folders, *source.folders]):  # each swapped out and in again
            answers(engine, [Request(f"r{i}", prompt, AdapterRef("a", 1, digest), PARAMS)])
    finally:
        engine.stop()
    backend = engine.core.runner.backend
    last = engine.core.scheduler.slots._slots[digest]
    adapter = engine._host.peek(digest)
    assert adapter is not None
    factors = adapter.lora.factors
    assert len({tensor.untyped_storage().data_ptr() for pair in factors.values() for tensor in pair}) == 1
    expected = read_peft(source.folders[digest] / "decoder", engine.core.runner.targets).factors
    assert factors.keys() == expected.keys()
    for name, pair in factors.items():
        for tensor, arena, own in zip(pair, backend._arena.views(name), expected[name], strict=True):
            assert tensor.is_pinned()
            assert torch.equal(arena[last, : len(tensor)].cpu(), own.bfloat16())


def test_a_window_over_every_layer_equals_the_reference(tmp_path):
    base = write_tiny_base(tmp_path / "base", architecture="mistral", image=False)
    source = Source(base, tmp_path / "bundles")
    engine = Engine(base, source, EngineOptions(dtype="float32", device="cuda", kv_bytes=1 << 20))
    engine.start()
    requests = []
    for i, length in enumerate((300, 20, 230, 350)):
        text = ("pack my box with five dozen liquor jugs " * 9)[i : i + length]
        requests.append(
            Request(f"r{i}", engine.renderer.prompt([Message("user", (Text(text),))]), None, PARAMS)
        )
    try:
        found = answers(engine, requests)
    finally:
        engine.stop()
    assert found == [reference(base, None, request) for request in requests]
    engine.core.scheduler.check_integrity()
