"""The backend for GPUs behind an engine, without a GPU: its tables, slots, graphs' rooms and steps ahead.

Triton's interpreter computes the kernels, so models are tiny and answers short. What a graph would replay is
computed each time; tests/gpu has the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_fixtures import Bundles

from okavango.modalities.tiny import Architecture, write_tiny_base
from okavango.modalities.tiny_bundle import write_tiny_bundle
from okavango.serving.types import SamplingParams

TEXT = "sphinx of black quartz, judge my vow; the five boxing wizards jump quickly over"


@pytest.fixture
def computing(monkeypatch, tmp_path) -> dict[str, Any]:
    from okavango.serving import runner
    from okavango.serving.cuda.backend import CudaBackend

    def on_cpu(decoder, targets, options, quantised):
        return CudaBackend(decoder, targets, options)

    monkeypatch.setattr(runner, "NativeBackend", on_cpu)
    monkeypatch.setattr("okavango.serving.cuda.backend.install_forms", lambda decoder: False)
    return {"kernels": tmp_path, "kv_bytes": 1 << 20, "slots": 2, "max_rank": 16, "max_sequences": 4}


@pytest.fixture
def made(make_harness, make_reference, tmp_path) -> Callable[..., tuple[Any, Any]]:
    """made(architecture, options): a harness over the backend, and its reference."""

    def make(architecture: Architecture, **options: Any) -> tuple[Any, Any]:
        base = write_tiny_base(tmp_path / "base", architecture=architecture, image=False)
        folders = {f"r{rank}": tmp_path / f"r{rank}" for rank in (4, 16)}
        for rank in (4, 16):
            write_tiny_bundle(tmp_path / f"r{rank}", base, seed=rank, rank=rank, head=False, probes=False)
        bundles = Bundles(folders)
        harness = make_harness(base, bundles, **options)
        assert harness.engine.core.runner.backend.name == "cuda"
        return harness, make_reference(base, bundles)

    return make


def asked(harness: Any, tokens: int = 3) -> list:
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    adapters = [None, "r4", "r16", "r4"]
    return [harness.request(TEXT[: 4 + 17 * i], adapter, params=params) for i, adapter in enumerate(adapters)]


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
def test_mixed_adapters_answer_as_each_alone(made, architecture) -> None:
    harness, reference = made(architecture, max_step_tokens=40)
    requests = asked(harness)
    assert harness.tokens(requests) == [reference.tokens(request) for request in requests]


def test_an_adapter_that_takes_anothers_slot(made) -> None:
    harness, reference = made("llama", slots=1)
    for _ in range(2):
        for request in asked(harness, tokens=2)[1:3]:
            assert harness.tokens([request]) == [reference.tokens(request)]


def test_rooms_of_graphs_serve_steps_and_are_checked_first(made) -> None:
    harness, reference = made("llama", max_step_tokens=72)
    backend = harness.engine.core.runner.backend
    with torch.inference_mode():
        for room, uses_slots in backend.rooms():
            if room.rows in (4, 72):
                backend.capture(room, uses_slots=uses_slots)
    ready = list(backend._graphs._ready)
    assert len(ready) == 4
    requests = asked(harness)
    assert harness.tokens(requests) == [reference.tokens(request) for request in requests]
    assert backend._graphs._ready == ready
    assert sum(graph.expected is None for graph in ready) >= 2, "no graph was used"


def test_a_graph_that_is_wrong_is_not_used(made, caplog) -> None:
    harness, reference = made("llama")
    backend = harness.engine.core.runner.backend
    with torch.inference_mode():
        room = next(room for room, _ in backend.rooms() if room.rows == 4)
        backend.capture(room, uses_slots=True)
    graph = backend._graphs._ready[0]
    graph.expected = graph.expected.clone() + 1
    requests = asked(harness)
    assert harness.tokens(requests) == [reference.tokens(request) for request in requests]
    assert len(backend._graphs) == 0
    assert "differs by" in caplog.text
