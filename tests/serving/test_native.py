"""The native kernels: torch's numbers, the same in any company, and torch itself where they cannot be had."""

from __future__ import annotations

import itertools
import logging
import platform
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from okavango.modalities.base import Base
from okavango.modalities.build import quiet_transformers
from okavango.modalities.lora import LoraWeights, Target
from okavango.modalities.precision import PARITY_BOUNDS, relative_error
from okavango.modalities.prompt import Rendered
from okavango.modalities.tiny import write_tiny_base
from okavango.serving.backend import RunnerOptions
from okavango.serving.native import backend as native_backend
from okavango.serving.native import library
from okavango.serving.runner import Runner
from okavango.serving.scheduler import Chunk, Step
from okavango.serving.sequence import Sequence
from okavango.serving.types import Request

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}
BIASED = {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases and gelu, tied": ("llama", BIASED | {"tie_word_embeddings": True}),
    "llama with one query a head": ("llama", {"num_key_value_heads": 6}),
    "llama with scaled positions": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "mistral with a window": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {}),
    "qwen3 with wide heads": ("qwen3", {"head_dim": 48}),
}
SLOTS, RANKS = 3, (4, 16, 24)


def write_base(folder: Path, architecture: str, own: dict[str, Any]) -> Base:
    base = write_tiny_base(folder, image=False)
    config = AutoConfig.for_model(architecture, **{**SIZES, **own})
    torch.manual_seed(0)
    with quiet_transformers():
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base.decoder.path)
    return base


def make_runner(base: Base, kernels: Path | None, dtype: torch.dtype = torch.float32) -> Runner:
    runner = Runner(base, RunnerOptions(dtype, "cpu", 16, 1 << 22, SLOTS, 24, kernels))
    for slot, rank in enumerate(RANKS, start=1):
        put(runner, slot, random_weights(runner.targets, rank, seed=slot))
    return runner


def put(runner: Runner, slot: int, weights: LoraWeights) -> None:
    runner.load(slot, runner.pack(weights))


def random_weights(targets: tuple[Target, ...], rank: int, seed: int) -> LoraWeights:
    """Random factors for all targets but every fifth."""
    generator = torch.Generator().manual_seed(seed)

    def draw(features: int) -> Tensor:
        return torch.randn(rank, features, generator=generator) * 0.2

    chosen = [target for i, target in enumerate(targets) if (i + seed) % 5]
    return LoraWeights({t.name: (draw(t.in_features), draw(t.out_features)) for t in chosen}, rank)


def make_sequences(lengths: list[int], seed: int = 0) -> list[Sequence]:
    """Sequences of random tokens on blocks of their own, out of order, on slots in turn."""
    generator, found, first = random.Random(seed), [], 0
    for i, length in enumerate(lengths):
        tokens = tuple(generator.randrange(VOCABULARY) for _ in range(length))
        sequence = Sequence(Request(f"r{i}", Rendered(tokens)), max_tokens=1)
        sequence.slot = i % (SLOTS + 1)
        count = -(-length // 16)
        sequence.blocks = list(range(first + count - 1, first - 1, -1))
        first += count
        found.append(sequence)
    return found


def compute(runner: Runner, sequences: list[Sequence], cuts: list[list[int]]) -> list[Tensor]:
    """Every sequence's logits [length, V], the sequences cut into chunks at `cuts` and run side by side."""
    found: dict[str, list[Tensor]] = {s.request.id: [] for s in sequences}
    waiting = [
        list(itertools.pairwise([0, *cut, len(s.tokens)])) for s, cut in zip(sequences, cuts, strict=True)
    ]
    while any(waiting):
        chunks = [
            Chunk(sequence, start, end - start)
            for sequence, rest in zip(sequences, waiting, strict=True)
            if rest
            for start, end in [rest.pop(0)]
        ]
        step = Step((), tuple(sorted(chunks, key=lambda chunk: chunk.sequence.slot)))
        rows = runner.run(step, range(step.num_tokens)).split([chunk.count for chunk in step.chunks])
        for chunk, logits in zip(step.chunks, rows, strict=True):
            found[chunk.sequence.request.id].append(logits)
    return [torch.cat(found[s.request.id]) for s in sequences]


LENGTHS = [40, 1, 17, 150, 33, 64, 5]
CUTS: list[list[int]] = [[16, 30, 31, 32], [], [16], [130, 131], list(range(1, 33)), [7, 50], [1, 2]]


@pytest.mark.parametrize("name", DECODERS)
def test_it_computes_what_torch_computes(tmp_path: Path, kernels: Path, name: str) -> None:
    base = write_base(tmp_path / "base", *DECODERS[name])
    native, plain = make_runner(base, kernels), make_runner(base, None)
    assert (native.backend.name, plain.backend.name) == ("native", "torch")
    expected = compute(plain, make_sequences(LENGTHS), CUTS)
    for found, logits in zip(compute(native, make_sequences(LENGTHS), CUTS), expected, strict=True):
        assert relative_error(found, logits) < 1e-5

    half = compute(make_runner(base, kernels, torch.bfloat16), make_sequences(LENGTHS), CUTS)
    torchs = compute(make_runner(base, None, torch.bfloat16), make_sequences(LENGTHS), CUTS)
    ours = max(relative_error(h, e) for h, e in zip(half, expected, strict=True))
    theirs = max(relative_error(h.float(), e) for h, e in zip(torchs, expected, strict=True))
    assert ours < 1.2 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_bits_in_any_company(tmp_path: Path, kernels: Path, dtype: torch.dtype) -> None:
    base = write_base(tmp_path / "base", "mistral", {"sliding_window": 40})
    runner = make_runner(base, kernels, dtype)
    together = compute(runner, make_sequences(LENGTHS), CUTS)
    for sequence, cut, logits in zip(make_sequences(LENGTHS), reversed(CUTS), together, strict=True):
        other = [at for at in cut if at < len(sequence.tokens)]
        [alone] = compute(runner, [sequence], [other])
        assert torch.equal(alone, logits)


@pytest.fixture
def threads_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_back")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(tmp_path: Path, kernels: Path, dtype: torch.dtype) -> None:
    """Rows are split among few threads, columns among many, of which some have none."""
    base = write_base(tmp_path / "base", "llama", {})
    found = {}
    for threads in (1, 2, 3, 40):
        torch.set_num_threads(threads)
        runner = make_runner(base, kernels, dtype)
        together = compute(runner, make_sequences([129, 17, 200, 1, 33]), [[]] * 5)
        few = compute(runner, make_sequences([3, 31]), [[]] * 2)
        found[threads] = torch.cat([*together, *few])
    assert all(torch.equal(found[1], other) for other in found.values())


# Instruction sets that the code has ways of its own for, and how a processor names them. Other tests
# use only the best one of the processor that they run on.
SETS = {"x86-64": "sse2", "haswell": "avx2", "skylake-avx512": "avx512f", "cooperlake": "avx512_bf16"}
HERE = set(Path("/proc/cpuinfo").read_text().split()) if platform.system() == "Linux" else set()


@pytest.mark.parametrize("instructions", [name for name, flag in SETS.items() if flag in HERE])
def test_lesser_processors_compute_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instructions: str
) -> None:
    flags = [flag for flag in library._FLAGS if not flag.startswith("-march")]
    monkeypatch.setattr(library, "_FLAGS", (*flags, f"-march={instructions}"))
    base = write_base(tmp_path / "base", "mistral", {"sliding_window": 40})
    expected = compute(make_runner(base, None), make_sequences(LENGTHS), CUTS)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, PARITY_BOUNDS[torch.bfloat16])):
        runner = make_runner(base, tmp_path / "kernels", dtype)
        assert runner.backend.name == "native"
        together = compute(runner, make_sequences(LENGTHS), CUTS)
        for sequence, found, logits in zip(make_sequences(LENGTHS), together, expected, strict=True):
            assert relative_error(found, logits) < bound
            assert torch.equal(compute(runner, [sequence], [[]])[0], found)


def test_a_slot_keeps_nothing_of_its_former_tenant(tmp_path: Path, kernels: Path) -> None:
    runner = make_runner(write_base(tmp_path / "base", "llama", {}), kernels)
    [before] = compute(runner, make_sequences([20, 20])[1:], [[]])
    wide = random_weights(runner.targets, 24, seed=9)
    put(runner, 1, wide)
    [other] = compute(runner, make_sequences([20, 20])[1:], [[]])
    assert not torch.allclose(before, other)
    put(runner, 1, random_weights(runner.targets, RANKS[0], seed=1))
    [after] = compute(runner, make_sequences([20, 20])[1:], [[]])
    assert torch.equal(before, after)


def test_stale_blocks_are_not_read(tmp_path: Path, kernels: Path) -> None:
    runner = make_runner(write_base(tmp_path / "base", "llama", {}), kernels)
    expected = compute(runner, make_sequences(LENGTHS), CUTS)
    for cache in runner.backend.caches:
        cache.keys.fill_(float("nan"))
        cache.values.fill_(float("nan"))
    for found, logits in zip(compute(runner, make_sequences(LENGTHS), CUTS), expected, strict=True):
        assert torch.equal(found, logits)


def test_numbers_that_overflow_stay_in_their_own_rows(tmp_path: Path, kernels: Path) -> None:
    runner = make_runner(write_base(tmp_path / "base", "llama", {}), kernels)
    expected = compute(runner, make_sequences(LENGTHS), CUTS)
    wild = random_weights(runner.targets, 24, seed=2)
    put(runner, 2, LoraWeights({n: (a * 1e20, b * 1e20) for n, (a, b) in wild.factors.items()}, 24))
    for sequence, found, logits in zip(
        make_sequences(LENGTHS), compute(runner, make_sequences(LENGTHS), CUTS), expected, strict=True
    ):
        if sequence.slot == 2:
            assert not found.isfinite().all()
        else:
            assert torch.equal(found, logits)


@pytest.mark.parametrize(
    ("architecture", "own", "reason"),
    [
        ("gpt2", {"n_inner": 128}, "GPT2LMHeadModel"),
        ("llama", {"hidden_size": 72, "head_dim": 12}, "multiples of 16"),
        ("llama", {"hidden_act": "relu"}, "relu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
    ],
)
def test_other_decoders_are_left_to_torch(
    tmp_path: Path, kernels: Path, caplog: pytest.LogCaptureFixture, architecture: str, own: Any, reason: str
) -> None:
    caplog.set_level(logging.INFO, "okavango")
    base = write_base(tmp_path / "base", architecture, own)
    assert (
        Runner(base, RunnerOptions(torch.float32, "cpu", 16, 1 << 22, 1, 8, kernels)).backend.name == "torch"
    )
    assert reason in caplog.text


def test_without_a_compiler_torch_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "okavango")
    base = write_base(tmp_path / "base", "llama", {})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert make_runner(base, tmp_path / "kernels").backend.name == "torch"
    assert "there is no C++ compiler" in caplog.text


def test_a_compiler_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "okavango")
    base = write_base(tmp_path / "base", "llama", {})
    monkeypatch.setattr(library, "_FLAGS", ("-fno-such-thing",))
    folder = tmp_path / "kernels"
    assert make_runner(base, folder).backend.name == "torch"
    assert "no-such-thing" in caplog.text
    assert list(folder.glob("*.so*")) == []


def test_kernels_that_compute_something_else_are_not_used(
    tmp_path: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "okavango")
    base = write_base(tmp_path / "base", "llama", {})
    expected = compute(make_runner(base, None), make_sequences(LENGTHS), CUTS)
    pack = native_backend.pack
    monkeypatch.setattr(native_backend, "pack", lambda weights, dtype: pack(weights * 1.01, dtype))
    runner = make_runner(base, kernels)
    assert runner.backend.name == "torch"
    assert "logits differ" in caplog.text
    for found, logits in zip(compute(runner, make_sequences(LENGTHS), CUTS), expected, strict=True):
        assert relative_error(found, logits) < 1e-6
