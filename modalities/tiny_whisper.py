"""The tiny Whisper encoder: random, real in every part, written in a moment; see modalities/tiny.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from okavango.modalities.base import EncoderSpec
from okavango.modalities.whisper import measure_whisper, write_whisper

SHAPE: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "activation_function": "gelu",
    "scale_embedding": False,
}


def write_tiny_whisper(folder: Path, seed: int = 0, layers: tuple[int, ...] = (-1,)) -> EncoderSpec:
    """Write an encoder of about 80,000 parameters; the same bytes for the same seed."""
    write_whisper(folder, SHAPE, seed=seed)
    return measure_whisper(folder, layers)
