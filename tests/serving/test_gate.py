"""The parity gate lets through what serving reproduces, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from okavango.modalities.precision import PARITY_BOUNDS
from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tiny_bundle import write_tiny_bundle
from okavango.platform.bundle import PROBES, read_manifest, seal
from okavango.platform.errors import BindError, IntegrityError, ParityError
from okavango.serving.adapters.gate import ParityGate


@pytest.fixture(scope="module")
def gate(tiny_base) -> ParityGate:
    return ParityGate(tiny_base)


@pytest.fixture
def bundle(tiny_bundles, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_bundles.folders["r8"], tmp_path / "bundle"))


def spoil(bundle: Path, name: str, change) -> None:
    """Change one tensor file and seal the bundle anew, as a wrong exporter would."""
    tensors = load_file(bundle / name)
    change(tensors)
    save_file(tensors, bundle / name)
    seal(bundle, read_manifest(bundle))


def test_a_whole_bundle_is_ready_with_its_errors_stated(gate, tiny_bundles):
    for folder in tiny_bundles.folders.values():
        verdict = gate.check(folder)
        assert verdict.state == "ready"
        assert verdict.verification["probes"] == 2
        assert verdict.verification["float32"] < 1e-5


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_other_architectures_pass_through_the_same_code(architecture, tmp_path):
    base = write_tiny_base(tmp_path / "base", architecture=architecture)
    write_tiny_bundle(tmp_path / "bundle", base, rank=4)
    verdict = ParityGate(base, torch.bfloat16).check(tmp_path / "bundle")
    assert verdict.verification["float32"] < 1e-5
    assert verdict.verification["bfloat16"] < PARITY_BOUNDS[torch.bfloat16]


def test_without_probes_a_bundle_is_only_bound(gate, tiny_base, tmp_path):
    write_tiny_bundle(tmp_path / "bundle", tiny_base, probes=False)
    assert gate.check(tmp_path / "bundle").state == "bound"


def test_a_wrong_scale_is_caught(gate, bundle):
    path = bundle / "decoder" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * 1.05}))
    seal(bundle, read_manifest(bundle))
    with pytest.raises(ParityError, match="differs from training"):
        gate.check(bundle)


def test_one_changed_factor_is_caught(gate, bundle):
    def change(tensors) -> None:
        tensors[min(tensors)] *= -1

    spoil(bundle, "decoder/adapter_model.safetensors", change)
    with pytest.raises(ParityError):
        gate.check(bundle)


def test_a_wrong_head_is_caught_by_the_picture_probe(gate, bundle):
    spoil(bundle, "projectors/image.safetensors", lambda t: t["down.bias"][0].add_(0.5))
    with pytest.raises(ParityError, match="probe 1"):
        gate.check(bundle)


def test_another_rendering_is_caught(gate, bundle):
    spoil(bundle, PROBES, lambda t: t["0.tokens"].add_(1))
    with pytest.raises((ParityError, IntegrityError)):
        gate.check(bundle)


def test_probes_that_are_not_finite_do_not_pass(gate, bundle):
    from okavango.modalities.probes import read_probes, write_probes

    probes = read_probes(bundle)
    probes[0].logits[0, 0] = float("nan")
    write_probes(bundle, probes)
    seal(bundle, read_manifest(bundle))
    with pytest.raises(ParityError):
        gate.check(bundle)


def test_an_altered_file_is_caught_before_anything_is_run(gate, bundle):
    with (bundle / "decoder" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors"):
        gate.check(bundle)


def test_a_bundle_of_another_base_does_not_bind(gate, tmp_path):
    other = write_tiny_base(tmp_path / "other", seed=3, name="other")
    write_tiny_bundle(tmp_path / "bundle", other)
    with pytest.raises(BindError, match="made for decoder"):
        gate.check(tmp_path / "bundle")


def test_new_default_heads_orphan_no_adapter_that_brings_its_own(tiny_base, tiny_bundles):
    manifest = read_manifest(tiny_bundles.folders["r8"])
    assert "projectors.image" not in manifest.components
    assert set(manifest.components) == {"decoder", "encoders.image"}


def test_a_head_of_another_shape_does_not_bind(gate, bundle):
    path = bundle / "projectors" / "image.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": 16}))
    seal(bundle, read_manifest(bundle))
    with pytest.raises(BindError, match=r"position: shape \(4, 64\), expected \(16, 64\)"):
        gate.check(bundle)
