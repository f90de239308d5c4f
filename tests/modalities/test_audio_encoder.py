from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import WhisperFeatureExtractor

from okavango.modalities.adapted import encoder_targets
from okavango.modalities.audio import RATE, SILENCE, AudioEncoder, positions_of
from okavango.modalities.base import EncoderSpec
from okavango.modalities.content import Limits
from okavango.modalities.encoders import encode, load_encoder
from okavango.modalities.tiny_whisper import write_tiny_whisper
from okavango.platform.errors import ConfigError

WINDOW_S = 30


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> EncoderSpec:
    return write_tiny_whisper(tmp_path_factory.mktemp("encoders") / "tiny", layers=(-2, -1))


@pytest.fixture(scope="module")
def encoder(spec: EncoderSpec) -> AudioEncoder:
    return AudioEncoder.load(spec)


def sound(seconds: float, seed: int = 0) -> NDArray[np.float32]:
    """Tones that rise and fall, with some noise."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = 200 + 150 * np.sin(2 * np.pi * (0.7 + seed) * time)
    tone = np.sin(2 * np.pi * np.cumsum(pitch) / RATE) * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * time))
    return (0.3 * tone + 0.01 * random.standard_normal(len(time))).astype(np.float32)


def whole_window(encoder: AudioEncoder, samples: NDArray[np.float32]) -> torch.Tensor:
    """What transformers makes of a sound: 30 s of silence and all."""
    extractor = WhisperFeatureExtractor.from_pretrained(encoder.spec.path)
    mel = extractor(samples, sampling_rate=RATE, return_tensors="pt")["input_features"]
    with torch.no_grad():
        return encoder.module(mel).last_hidden_state[0]


@pytest.mark.parametrize(
    ("samples", "positions"), [(0, 1), (1, 1), (320, 1), (321, 2), (2 * RATE, 100), (31 * RATE + 1, 1551)]
)
def test_a_sound_has_a_position_each_20_ms(encoder: AudioEncoder, samples: int, positions: int) -> None:
    (found,) = encode(encoder, [sound(60)[:samples]])
    assert found.shape == (positions, encoder.spec.width) == (positions_of(samples), 64)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_the_header_tells_how_many_there_will_be(encoder: AudioEncoder, rate: int) -> None:
    from okavango.modalities.sound import decode_sound

    file = BytesIO()
    soundfile.write(file, np.zeros(rate * 3 + 17), rate, format="WAV")
    data = file.getvalue()
    (found,) = encode(encoder, [decode_sound(data)])
    assert AudioEncoder.layout(encoder.spec, data, Limits()) == (len(found),)


def test_a_whole_window_is_transformers_own(encoder: AudioEncoder) -> None:
    samples = sound(WINDOW_S)
    (found,) = encode(encoder, [samples])
    assert torch.equal(found[:, 32:], whole_window(encoder, samples))


def test_the_layers_are_those_of_transformers(encoder: AudioEncoder) -> None:
    samples = sound(WINDOW_S)
    seen = []
    hook = encoder.module.layers[0].register_forward_hook(lambda _, __, output: seen.append(output[0]))
    whole_window(encoder, samples)
    hook.remove()
    assert torch.equal(encode(encoder, [samples])[0][:, :32], seen[0])


@pytest.mark.parametrize("seconds", [0.3, 2, 17, 29.5])
def test_the_spectrogram_is_that_of_the_padded_window(encoder: AudioEncoder, seconds: float) -> None:
    samples = sound(seconds)
    extractor = WhisperFeatureExtractor.from_pretrained(encoder.spec.path)
    expected = extractor(samples, sampling_rate=RATE, return_tensors="pt")["input_features"][0]
    found = encoder.prepare(samples)[:, :3000]
    assert found.shape[1] == min(3000, 2 * (positions_of(len(samples)) + SILENCE))
    torch.testing.assert_close(found, expected[:, : found.shape[1]], rtol=0, atol=2e-5)


@pytest.mark.parametrize("seconds", [0.3, 2.0, 12])
def test_silence_that_is_counted_is_nearly_silence_that_is_computed(
    encoder: AudioEncoder, seconds: float
) -> None:
    samples = sound(seconds)
    found = encode(encoder, [samples])[0][:, 32:]
    expected = whole_window(encoder, samples)[: len(found)]
    cut = run_cut(encoder, samples)
    error = (found - expected).norm() / (expected - expected.mean(0)).norm()
    assert error < 0.3
    assert error < 0.5 * (cut - expected).norm() / (expected - expected.mean(0)).norm()


def run_cut(encoder: AudioEncoder, samples: NDArray[np.float32]) -> torch.Tensor:
    """The encoder over the sound alone, as if nothing came after it."""
    module = encoder.module
    with torch.no_grad():
        x = F.gelu(module.conv1(encoder.prepare(samples)[None, :, : -2 * SILENCE]))
        x = F.gelu(module.conv2(x)).transpose(1, 2)
        x = x + module.embed_positions.weight[: x.shape[1]]
        for layer in module.layers:
            x = layer(x, None)
        return module.layer_norm(x)[0]


def test_a_short_sound_costs_the_encoder_little_more_than_itself(encoder: AudioEncoder) -> None:
    sizes = []
    hook = encoder.module.layers[0].register_forward_hook(lambda _, __, output: sizes.append(output.shape[1]))
    encode(encoder, [sound(2), sound(29.2), sound(WINDOW_S), sound(32)])
    hook.remove()
    assert sizes == [100 + SILENCE - 1 + 14, 1500, 1500, 1500, 100 + SILENCE - 1 + 14]


def test_a_long_sound_is_its_windows(encoder: AudioEncoder) -> None:
    samples = sound(67)
    whole = encode(encoder, [samples])[0]
    parts = encode(encoder, [samples[i * WINDOW_S * RATE : (i + 1) * WINDOW_S * RATE] for i in range(3)])
    assert [len(part) for part in parts] == [1500, 1500, 350]
    assert torch.equal(whole, torch.cat(parts))


def test_features_do_not_hang_on_what_else_is_in_the_call(encoder: AudioEncoder) -> None:
    sounds = [sound(seconds, seed) for seed, seconds in enumerate((2.0, 0.02, 31, 2.0, 5))]
    together = encode(encoder, sounds)
    for samples, found in zip(sounds, together, strict=True):
        assert torch.equal(encode(encoder, [samples])[0], found)
    assert encode(encoder, []) == []


def test_different_sounds_have_different_features(encoder: AudioEncoder) -> None:
    first, second = encode(encoder, [sound(2, 0), sound(2, 1)])
    assert (first - second).norm() > 0.2 * first.norm()


def test_silence_and_noise_are_sounds(encoder: AudioEncoder) -> None:
    quiet = np.zeros(RATE, np.float32)
    loud = np.sign(sound(1)).astype(np.float32)
    assert all(found.isfinite().all() for found in encode(encoder, [quiet, loud]))


def test_a_lower_precision_is_near(spec: EncoderSpec, encoder: AudioEncoder) -> None:
    rough = AudioEncoder.load(spec, torch.bfloat16)
    assert next(rough.module.parameters()).dtype == torch.bfloat16
    (found,), (expected,) = encode(rough, [sound(2)]), encode(encoder, [sound(2)])
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()


def test_the_base_must_say_what_the_folder_holds(spec: EncoderSpec) -> None:
    for wrong in (replace(spec, width=32), replace(spec, grid=(1, 750)), replace(spec, layers=(-1,))):
        with pytest.raises(ConfigError, match="not width and grid"):
            AudioEncoder.load(wrong)


def test_its_linear_layers_can_be_adapted(spec: EncoderSpec) -> None:
    found = {target.name for target in encoder_targets(spec)}
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
    assert found == {f"layers.{i}.{part}" for i in range(2) for part in parts}


def test_a_gradient_reaches_what_is_adapted(spec: EncoderSpec) -> None:
    encoder = load_encoder(spec)
    weight = encoder.module.get_submodule("layers.0.self_attn.q_proj").weight.requires_grad_()
    (found,) = encoder.features([encoder.prepare(sound(0.5))])
    found.square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0
