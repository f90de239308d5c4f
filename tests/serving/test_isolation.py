"""Nothing of one request reaches another: neither through what it leaves, nor through numbers that break."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from okavango.modalities.tiny_bundle import write_tiny_bundle
from okavango.platform.bundle import read_manifest, seal
from okavango.serving.types import FinishReason, SamplingParams


def caches(harness) -> list:
    return [
        m.okavango_cache for m in harness.engine.core.runner.decoder.modules() if hasattr(m, "okavango_cache")
    ]


def test_what_former_requests_left_in_the_cache_is_never_read(harness, reference):
    for cache in caches(harness):
        cache.keys.fill_(float("nan"))
        cache.values.fill_(float("nan"))
    lengths = [1, 15, 16, 17, 32, 64, 5]
    requests = [harness.request("x" * n, [None, "r4"][n % 2]) for n in lengths]
    assert harness.tokens(requests) == [reference.tokens(request) for request in requests]


@pytest.fixture
def broken(tiny_base, tiny_bundles, tmp_path):
    """An adapter that binds, and whose update overflows: without probes nothing could tell."""
    folder = tmp_path / "broken"
    write_tiny_bundle(folder, tiny_base, rank=4, head=False, probes=False)
    path = folder / "decoder" / "adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(path).items()}, path)
    tiny_bundles.folders["broken"] = folder
    tiny_bundles.digests["broken"] = seal(folder, read_manifest(folder)).digest
    yield "broken"
    del tiny_bundles.folders["broken"], tiny_bundles.digests["broken"]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_adapter_whose_numbers_overflow_fails_its_own_requests_only(harness, broken, temperature):
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=3, ignore_eos=True)

    def mix() -> list:
        names = [None, broken, "r4", broken, "r16"]
        return [harness.request("tell me more", name, params=params) for name in names]

    sound = [request for request in mix() if request.adapter is None or request.adapter.name != broken]
    alone = [harness.tokens([request])[0] for request in sound]
    for _ in range(3):  # later rounds get the blocks that the broken ones had
        answers = harness.run(mix())
        for i in (1, 3):
            assert answers[i][-1].finish is FinishReason.ERROR
            assert "broken@1" in str(answers[i][-1].error)
            assert "not finite" in str(answers[i][-1].error)
        good = [answers[i] for i in (0, 2, 4)]
        assert [[token for event in events for token in event.tokens] for events in good] == alone


def test_one_row_that_is_not_finite_fails_alone(harness):
    run = harness.engine.core.runner.run

    def spoil(step, rows):
        logits = run(step, rows).clone()
        sampled = [chunk for chunk in step.chunks if chunk.samples]
        for row, chunk in enumerate(sampled):
            if chunk.sequence.request.params.seed == 13:
                logits[row, 5] = torch.nan
        return logits

    harness.engine.core.runner.run = spoil
    for temperature in (0.0, 1.0):
        params = [
            SamplingParams(max_tokens=5, temperature=temperature, seed=s, ignore_eos=True) for s in (12, 13)
        ]
        fine, bad = harness.run([harness.request("hi", params=each) for each in params])
        assert fine[-1].finish is FinishReason.LENGTH
        assert bad[-1].finish is FinishReason.ERROR
        assert "the base" in str(bad[-1].error)
