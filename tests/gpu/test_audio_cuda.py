"""Sounds on CUDA: the features of the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from okavango.modalities.audio import RATE, AudioEncoder
from okavango.modalities.encoders import encode
from okavango.modalities.tiny_whisper import write_tiny_whisper

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")


def test_a_gpu_hears_the_same(tmp_path: Path) -> None:
    spec = write_tiny_whisper(tmp_path / "e", layers=(-2, -1))
    noise = np.random.default_rng(0).standard_normal(31 * RATE).astype(np.float32) * 0.1
    sounds = [noise[: 2 * RATE], noise]
    here, there = AudioEncoder.load(spec), AudioEncoder.load(spec, device="cuda")
    for found, expected in zip(encode(there, sounds), encode(here, sounds), strict=True):
        assert (found - expected).norm() < 1e-3 * expected.norm()
    assert torch.equal(encode(there, sounds)[1], encode(there, sounds[1:])[0])


def test_a_lower_precision_is_near(tmp_path: Path) -> None:
    spec = write_tiny_whisper(tmp_path / "e")
    sound = np.random.default_rng(1).standard_normal(RATE).astype(np.float32) * 0.1
    (found,) = encode(AudioEncoder.load(spec, torch.bfloat16, "cuda"), [sound])
    (expected,) = encode(AudioEncoder.load(spec), [sound])
    assert (found - expected).norm() < 0.1 * expected.norm()
