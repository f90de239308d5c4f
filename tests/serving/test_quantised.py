"""Weights in eight bits: what is left of them, and that the kernels compute with exactly that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from okavango.modalities.base import Base, load_decoder
from okavango.modalities.build import quiet_transformers
from okavango.modalities.lora import LoraWeights
from okavango.modalities.prompt import Rendered
from okavango.modalities.tiny import write_tiny_base
from okavango.platform.errors import ConfigError, UnsupportedError
from okavango.serving.backend import RunnerOptions
from okavango.serving.options import EngineOptions
from okavango.serving.quantised import Int8, quantise
from okavango.serving.runner import Runner
from okavango.serving.scheduler import Chunk, Step
from okavango.serving.sequence import Sequence
from okavango.serving.types import Request

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}
LENGTHS, SINGLE = (150, 5, 33, 64, 17), 3  # of these tokens, so many are computed one by one


def write_base(folder: Path, architecture: str, own: dict[str, Any]) -> Base:
    base = write_tiny_base(folder, image=False)
    torch.manual_seed(0)
    with quiet_transformers():
        decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **{**SIZES, **own}))
        decoder.save_pretrained(base.decoder.path)
    return base


def make_runner(
    base: Base, kernels: Path | None, dtype: torch.dtype, quantization: str | None = None
) -> Runner:
    """With an adapter in its first slot."""
    runner = Runner(base, RunnerOptions(dtype, "cpu", 16, 1 << 22, 2, 8, kernels, quantization))
    draw = torch.Generator().manual_seed(1)
    factors = {
        t.name: tuple(torch.randn(8, n, generator=draw) * 0.2 for n in (t.in_features, t.out_features))
        for t in runner.targets
    }
    runner.load(1, runner.pack(LoraWeights(factors, 8)))  # type: ignore[arg-type]
    return runner


def compute(runner: Runner, numbers: range = range(len(LENGTHS))) -> dict[int, Tensor]:
    """These sequences' logits [length, V], every second one's on the adapter: prompts, then single tokens."""
    sequences, first = {}, 0
    for i in numbers:
        tokens = tuple((7 * i + 11 * at) % SIZES["vocab_size"] for at in range(LENGTHS[i]))
        sequences[i] = sequence = Sequence(Request(f"r{i}", Rendered(tokens)), max_tokens=1)
        sequence.slot = i % 2
        sequence.blocks = list(range(first, first + -(-LENGTHS[i] // 16)))
        first += len(sequence.blocks)
    order = sorted(sequences, key=lambda i: sequences[i].slot)
    found: dict[int, list[Tensor]] = {i: [] for i in numbers}
    for rest in range(SINGLE, -1, -1):
        cuts = {
            i: (0, LENGTHS[i] - SINGLE) if rest == SINGLE else (LENGTHS[i] - rest - 1, LENGTHS[i] - rest)
            for i in order
        }
        step = Step((), tuple(Chunk(sequences[i], start, end - start) for i, (start, end) in cuts.items()))
        rows = runner.run(step, range(step.num_tokens)).split([chunk.count for chunk in step.chunks])
        for i, logits in zip(order, rows, strict=True):
            found[i].append(logits)
    return {i: torch.cat(parts) for i, parts in found.items()}


def write_restored(base: Base, folder: Path, dtype: torch.dtype) -> Base:
    """A base whose linear layers hold what eight bits leave of the other's."""
    restored = write_tiny_base(folder, image=False)
    decoder: PreTrainedModel = load_decoder(base, dtype, "cpu")
    quantise(decoder)
    decoder.config.tie_word_embeddings = False
    decoder.save_pretrained(restored.decoder.path)
    return restored


def test_eight_bits_are_nearest_and_keep_each_rows_greatest() -> None:
    weight = torch.randn(40, 96) * torch.logspace(-3, 3, 40)[:, None]
    weight[7] = 0
    int8 = Int8.of(weight)
    steps = weight.abs().amax(-1, keepdim=True) / 127
    assert int8.values.dtype == torch.int8
    assert ((int8.restore(torch.float32) - weight).abs() <= steps * 0.5001).all()
    torch.testing.assert_close(int8.restore(torch.float32).abs().amax(-1), weight.abs().amax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "own", [{}, {"tie_word_embeddings": True, "attention_bias": True}], ids=["llama", "tied"]
)
def test_kernels_compute_with_what_eight_bits_leave(
    tmp_path: Path, kernels: Path, own: dict[str, Any], dtype: torch.dtype
) -> None:
    base = write_base(tmp_path / "base", "llama", own)
    restored = write_restored(base, tmp_path / "restored", dtype)
    expected = compute(make_runner(restored, kernels, dtype))
    full = compute(make_runner(base, kernels, dtype))
    runner = make_runner(base, kernels, dtype, "int8")
    for i, logits in compute(runner).items():
        assert torch.equal(logits, expected[i])
        assert not torch.equal(logits, full[i])
        assert torch.equal(compute(runner, range(i, i + 1))[i], logits)


def test_the_weights_take_half_the_memory(tmp_path: Path, kernels: Path) -> None:
    base = write_base(tmp_path / "base", "llama", {})
    sizes = [
        make_runner(base, kernels, torch.bfloat16, quantization).backend._weights._tensor.nbytes  # type: ignore[attr-defined]
        for quantization in (None, "int8")
    ]
    assert sizes[1] * 2 == sizes[0]


def test_without_the_kernels_they_are_refused(tmp_path: Path, kernels: Path) -> None:
    llama = write_base(tmp_path / "llama", "llama", {})
    with pytest.raises(UnsupportedError, match="they are off") as refused:
        make_runner(llama, None, torch.float32, "int8")
    assert "--quantization" in (refused.value.remedy or "")
    gpt2 = write_base(tmp_path / "gpt2", "gpt2", {"n_inner": 128})
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel"):
        make_runner(gpt2, kernels, torch.float32, "int8")
    with pytest.raises(ConfigError, match="int4"):
        EngineOptions(quantization="int4")


def test_embeddings_stay_as_they_are(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", {"tie_word_embeddings": True})
    decoder: PreTrainedModel = load_decoder(base, torch.float32, "cpu")
    before = decoder.get_input_embeddings().weight.clone()
    quantise(decoder)
    assert torch.equal(decoder.get_input_embeddings().weight, before)
    assert not torch.equal(decoder.get_output_embeddings().weight, before)
