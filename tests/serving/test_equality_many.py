"""Hundreds of adapters on a few slots: every answer as PEFT gives it alone, and nothing left over."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_fixtures import Bundles

from okavango.modalities.base import Base, load_decoder
from okavango.modalities.peft_files import CONFIG, WEIGHTS
from okavango.platform.bundle import Manifest, seal
from okavango.serving.types import SamplingParams

MANY, SLOTS = 200, 4
CONFIGURATION = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
PARAMS = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


class Alone:
    """PEFT over one decoder, whose factors are replaced by those of one adapter at a time."""

    def __init__(self, base: Base, bundles: Bundles) -> None:
        self.bundles = bundles
        self.plain = load_decoder(base, torch.float32)
        self.adapted = get_peft_model(load_decoder(base, torch.float32), LoraConfig(**CONFIGURATION)).eval()

    @torch.inference_mode()
    def tokens(self, request) -> list[int]:
        model = self.plain
        if request.adapter is not None:
            model = self.adapted
            folder = self.bundles.folders[request.adapter.name]
            set_peft_model_state_dict(model, load_file(folder / "decoder" / WEIGHTS))
        ids = torch.tensor([request.prompt.tokens])
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()


def write_adapter(folder: Path, base: Base, shapes: dict[str, torch.Size], seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        key: torch.randn(shape, generator=generator) * 0.6 / shape[1] ** 0.5 for key, shape in shapes.items()
    }
    decoder = folder / "decoder"
    decoder.mkdir(parents=True)
    (decoder / CONFIG).write_text(json.dumps({"peft_type": "LORA", **CONFIGURATION}))
    save_file(tensors, decoder / WEIGHTS)
    seal(folder, Manifest({"decoder": base.components["decoder"]}))
    return folder


@pytest.fixture(scope="module")
def many(tiny_base, tmp_path_factory) -> Bundles:
    folder = tmp_path_factory.mktemp("many")
    model = get_peft_model(load_decoder(tiny_base, torch.float32), LoraConfig(**CONFIGURATION))
    model.save_pretrained(str(folder / "shape"), save_embedding_layers=False)
    shapes = {key: tensor.shape for key, tensor in load_file(folder / "shape" / WEIGHTS).items()}
    return Bundles({f"a{i}": write_adapter(folder / f"a{i}", tiny_base, shapes, seed=i) for i in range(MANY)})


@pytest.fixture(scope="module")
def alone(tiny_base, many) -> Alone:
    return Alone(tiny_base, many)


def test_two_hundred_adapters_take_turns_on_four_slots(make_harness, tiny_base, many, alone):
    harness = make_harness(bundles=many, slots=SLOTS, host_cache_bytes=150_000, max_waiting=1000)
    draw = random.Random(3)
    names = [f"a{i}" for i in range(MANY)] + [draw.choice([None, *many.folders]) for _ in range(100)]
    draw.shuffle(names)
    requests = [harness.request(f"number {i % 9}", name, params=PARAMS) for i, name in enumerate(names)]
    found = harness.tokens(requests)
    assert found == [alone.tokens(request) for request in requests]
    assert len({tuple(tokens) for tokens in found}) > MANY / 2  # the adapters matter
    stats = harness.engine.stats()
    assert (stats.running, stats.waiting, len(stats.slots)) == (0, 0, SLOTS)
    host = harness.engine._host
    host.check_integrity()
    assert 100_000 < host.nbytes <= 150_000  # of a megabyte and more that all would take


def test_a_batch_whose_adapters_all_differ(make_harness, many, alone):
    harness = make_harness(bundles=many, slots=16, max_sequences=16)
    widest = 0
    run = harness.engine.core.runner.run

    def watched(step, *rest):
        nonlocal widest
        widest = max(widest, len({chunk.sequence.slot for chunk in step.chunks}))
        return run(step, *rest)

    harness.engine.core.runner.run = watched
    requests = [harness.request("x" * (1 + i), f"a{i}", params=PARAMS) for i in range(16)]
    for request in requests:  # on the host already, so that all arrive at once
        harness.tokens([request])
    again = [harness.request("x" * (1 + i), f"a{i}", params=PARAMS) for i in range(16)]
    assert harness.tokens(again) == [alone.tokens(request) for request in again]
    assert widest > SLOTS


class SlowSource:
    """A store that does not give one of its bundles before it is let."""

    def __init__(self, bundles: Bundles, slow: str) -> None:
        self.bundles, self.slow = bundles, bundles.digests[slow]
        self.asked, self.let = threading.Event(), threading.Event()

    def fetch(self, digest: str) -> Path:
        if digest == self.slow:
            self.asked.set()
            assert self.let.wait(60)
        return self.bundles.fetch(digest)


def test_who_waits_for_an_adapters_load_holds_up_nobody(make_harness, many, alone):
    source = SlowSource(many, "a0")
    harness = make_harness(bundles=many, source=source)
    slow = [harness.request("slow", "a0", params=PARAMS) for _ in range(8)]
    answers: list[list[int]] = []
    patient = threading.Thread(target=lambda: answers.extend(harness.tokens(slow)))
    patient.start()
    try:
        assert source.asked.wait(60)
        others = [harness.request("quick", name, params=PARAMS) for name in (None, "a1", "a2", "a1", None)]
        assert harness.tokens(others) == [alone.tokens(request) for request in others]
        assert not answers
    finally:
        source.let.set()
        patient.join(60)
    assert answers == [alone.tokens(request) for request in slow]
