"""The contract over architectures: mixed adapters, base rows and chunked prompts answer as transformers with
PEFT does for each request alone: in float32, token by token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_fixtures import Bundles

from okavango.modalities.base import load_decoder
from okavango.modalities.lora import Target, find_targets
from okavango.modalities.peft_files import CONFIG, WEIGHTS, read_peft
from okavango.modalities.tiny import Architecture, write_tiny_base
from okavango.modalities.tiny_bundle import random_peft, write_tiny_bundle
from okavango.platform.bundle import Manifest, seal
from okavango.platform.errors import UnsupportedError

RANKS = (4, 8, 16)
WORDS = "pack my box with five dozen liquor jugs; how vexingly quick daft zebras jump over them all! "
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")

# What adapters adapt. On a mixture, PEFT reads every other name as its routed experts'.
TARGETS: dict[Architecture, str | tuple[str, ...]] = {
    "llama": "all-linear",
    "mistral": "all-linear",
    "qwen3": "all-linear",
    "gemma3_text": "all-linear",
    "gpt2": "all-linear",
    "phi3": "all-linear",
    "mixtral": ATTENTION,
    "qwen3_moe": ATTENTION,
    "deepseek_v3": LATENT,
}


def write_bundles(folder: Path, base, targets) -> Bundles:
    for rank in RANKS:
        write_tiny_bundle(
            folder / f"r{rank}", base, seed=rank, rank=rank, targets=targets, head=False, probes=False
        )
    return Bundles({f"r{rank}": folder / f"r{rank}" for rank in RANKS})


@pytest.mark.parametrize("architecture", TARGETS)
def test_mixed_adapters_answer_as_each_alone(
    architecture: Architecture, make_harness, make_reference, tmp_path
) -> None:
    base = write_tiny_base(tmp_path / "base", architecture=architecture, image=False)
    bundles = write_bundles(tmp_path, base, TARGETS[architecture])
    # a step shorter than most prompts, fewer slots than adapters, prompts of several of Gemma's windows
    harness = make_harness(base, bundles, slots=2, max_step_tokens=40, max_sequences=6, kv_bytes=1 << 21)
    reference = make_reference(base, bundles)
    adapters = [None, "r4", "r8", "r16"]
    requests = [
        harness.request((WORDS * 2)[:length], adapters[i % 4])
        for i, length in enumerate([1, 70, 9, 31, 55, 16, 100, 2])
    ]
    assert harness.tokens(requests) == [reference.tokens(request) for request in requests]
    # the adapters must matter, or the comparison shows nothing
    same_text = [harness.request(WORDS[:60], adapter) for adapter in adapters]
    assert len({tuple(tokens) for tokens in harness.tokens(same_text)}) == len(adapters)


def write_peft(folder: Path, config: dict, factors: dict[str, torch.Tensor]) -> Path:
    """An adapter as PEFT wrote it when experts were still modules; today's PEFT cannot make one of them."""
    folder.mkdir(parents=True)
    shared = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"}
    (folder / CONFIG).write_text(json.dumps(shared | config))
    save_file(
        {f"base_model.model.{name}.weight": tensor for name, tensor in factors.items()}, folder / WEIGHTS
    )
    return folder


def random_factors(targets: Iterable[Target]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    factors = {}
    for target in targets:
        for factor, shape in (("A", (4, target.in_features)), ("B", (target.out_features, 4))):
            factors[f"{target.name}.lora_{factor}"] = 0.1 * torch.randn(shape, generator=generator)
    return factors


def test_a_mixtures_dense_and_shared_layers_are_adapted(make_harness, make_reference, tmp_path) -> None:
    base = write_tiny_base(tmp_path / "base", architecture="deepseek_v3", image=False)
    merged = load_decoder(base, torch.float32)
    targets = [target for target in find_targets(merged) if ".mlp." in target.name]
    assert {".".join(target.name.split(".")[3:]) for target in targets} == {
        f"mlp.{part}{name}_proj" for part in ("", "shared_experts.") for name in ("gate", "up", "down")
    }
    factors = random_factors(targets)
    for target in targets:
        delta = factors[f"{target.name}.lora_B"] @ factors[f"{target.name}.lora_A"] * 2
        merged.get_submodule(target.name).weight.data += delta
    names = [target.name for target in targets]
    write_peft(tmp_path / "shared" / "decoder", {"target_modules": names}, factors)
    seal(tmp_path / "shared", Manifest({"decoder": base.components["decoder"]}))
    bundles = Bundles({"shared": tmp_path / "shared"})
    harness, reference = make_harness(base, bundles), make_reference(base, Bundles({}))
    reference.models["shared"] = merged
    requests = [harness.request(WORDS[:n], name) for n in (5, 40, 80) for name in ("shared", None)]
    expected = [reference.tokens(request) for request in requests]
    assert harness.tokens(requests) == expected
    assert expected[::2] != expected[1::2]


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_routed_experts_and_routers_are_no_targets_and_refused(architecture, tmp_path) -> None:
    base = write_tiny_base(tmp_path / "base", architecture=architecture, image=False)
    targets = find_targets(load_decoder(base, torch.float32))
    assert not [t.name for t in targets if ".experts" in t.name or t.name.endswith(".gate")]
    everything = random_peft(base, seed=1, rank=4, targets="all-linear")
    everything.save_pretrained(str(tmp_path / "all"), save_embedding_layers=False)
    with pytest.raises(UnsupportedError, match=r"target_parameters: .* routed experts"):
        read_peft(tmp_path / "all", targets)
    for name in ("mlp.experts.3.up_proj", "block_sparse_moe.experts.0.w1"):
        factors = random_factors([Target(f"model.layers.0.{name}", 64, 32)])
        folder = write_peft(tmp_path / name, {"target_modules": ["up_proj", "w1"]}, factors)
        with pytest.raises(UnsupportedError, match=f"routed experts is not served: model.layers.0.{name}"):
            read_peft(folder, targets)
