"""Adapters that change what an encoder sees, beside others that do not, in one batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tiny_bundle import picture_bytes, write_tiny_bundle
from okavango.platform.bundle import read_manifest, seal
from okavango.platform.errors import BindError
from okavango.platform.telemetry import PrometheusMetrics
from okavango.serving.adapters.gate import ParityGate

ADAPTERS = [None, "plain", "sees", "sees through the base's head", "plain again"]


@pytest.fixture(scope="module")
def seeing(tiny_base, tiny_bundles, tmp_path_factory):
    """Two adapters with factors for the image encoder, with and without their own head, and two without."""
    folder = tmp_path_factory.mktemp("seeing")
    write_tiny_bundle(folder / "sees", tiny_base, seed=21, rank=4, encoder=True)
    write_tiny_bundle(folder / "base-head", tiny_base, seed=22, rank=8, encoder=True, head=False)
    folders = {
        "plain": tiny_bundles.folders["r4"],
        "plain again": tiny_bundles.folders["r16"],
        "sees": folder / "sees",
        "sees through the base's head": folder / "base-head",
    }
    return type(tiny_bundles)(folders)


def test_mixed_in_one_batch_each_equals_peft(make_harness, make_reference, tiny_base, seeing):
    metrics = PrometheusMetrics()
    harness = make_harness(tiny_base, seeing, metrics=metrics)
    reference = make_reference(tiny_base, seeing)
    requests = [
        harness.request(f"what is picture {seed}?", adapter, [picture_bytes(seed)])
        for seed in (1, 2)
        for adapter in ADAPTERS
    ]
    expected = [reference.tokens(request) for request in requests]
    assert harness.tokens(requests) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    # the base and the two that leave the encoder alone share features; each of the others has its own
    assert 'okavango_encoder_runs_total{modality="image"} 6.0' in metrics.render().decode()
    harness.engine.media.encoders.check_integrity()


def test_the_encoder_is_the_bases_again_after_an_adapter(make_harness, make_reference, tiny_base, seeing):
    harness = make_harness(tiny_base, seeing, feature_cache_bytes=0)
    reference = make_reference(tiny_base, seeing)
    for adapter in ("sees", None, "sees", "plain"):
        request = harness.request("and this?", adapter, [picture_bytes(3)])
        assert harness.tokens([request]) == [reference.tokens(request)]


def test_the_gate_reproduces_what_peft_saw(tiny_base, seeing):
    gate = ParityGate(tiny_base)
    for name in ("sees", "sees through the base's head"):
        verdict = gate.check(seeing.folders[name])
        assert verdict.state == "ready"
        assert verdict.verification["float32"] < 1e-5


def spoil(folder: Path, change) -> None:
    path = folder / "encoders" / "image" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    seal(folder, read_manifest(folder))


def test_factors_for_modules_that_the_encoder_lacks_are_listed(tiny_base, tmp_path):
    folder = tmp_path / "bundle"
    write_tiny_bundle(folder, tiny_base, encoder=True)

    def rename(tensors):
        for name in [name for name in tensors if ".c_fc." in name]:
            tensors[name.replace("c_fc", "c_up")] = tensors.pop(name)

    spoil(folder, rename)
    with pytest.raises(BindError) as raised:
        ParityGate(tiny_base).check(folder)
    assert "transformer.resblocks.0.mlp.c_up" in str(raised.value)
    assert "transformer.resblocks.1.mlp.c_up" in str(raised.value)


def test_a_base_without_the_encoder_refuses_it_by_name(tiny_base, tmp_path):
    folder = tmp_path / "bundle"
    write_tiny_bundle(folder, tiny_base, encoder=True, probes=False)
    blind = write_tiny_base(tmp_path / "blind", image=False)
    with pytest.raises(BindError, match=r"encoders\.image .* has none"):
        ParityGate(blind).check(folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"components": {"decoder": blind.components["decoder"]}}))
    with pytest.raises(BindError, match="has no image encoder"):
        ParityGate(blind).check(folder)
