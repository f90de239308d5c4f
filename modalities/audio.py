"""Sounds: samples at 16 kHz → a Whisper encoder's features, one every 20 ms.

Whisper's encoder was trained on windows of 30 s, mostly silence where somebody says a word, and it looks at
that silence: without it, features turn away from what they were. But stretches of silence differ in nothing
but their place. So after a second of it, two seconds are computed as one position, which counts for all of
its positions in every attention (the log of their number is added to its score, as if its key stood there so
often). A sound then costs its own length, a second more, and at most 15 positions for the rest of its window.

How near that comes to the whole window, with Whisper tiny.en on 200 recorded telephone prompts (cosine of a
position's features with those of the window: mean, and what 95 % of positions reach; word error rate of its
decoder, for which the features of the silence were those of the window):

                       under 1 s        longer         errors     a prompt on two cores
    window of 30 s     1                1              15.0 %     189 ms
    this               0.987, 0.972     0.995, 0.988   15.2 %      28 ms
    the sound alone    0.866, 0.698     0.970, 0.856   19.2 %

A sound longer than a window is encoded window by window, each as if nothing else was said.
"""

# Shapes: S samples, M mel bands, F frames of 10 ms, P positions of 20 ms that are computed, N those of the
# sound, C encoder width

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from okavango.modalities.content import Limits
from okavango.modalities.image import UNUSABLE
from okavango.modalities.sound import RATE, sound_samples
from okavango.platform.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from okavango.modalities.base import EncoderSpec

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MEL_FILE = "preprocessor_config.json"
POSITION = RATE // 50  # samples of a position: two frames
SILENCE = 50  # positions of silence after a sound that are computed one by one
STRETCH = 100  # positions of the silence after that which are computed as one
_SWITCHING = Lock()


class AudioEncoder:
    """A frozen Whisper encoder with its log-mel spectrograms: see modalities.encoders.Encoder."""

    def __init__(self, spec: EncoderSpec, module: WhisperEncoder, extractor: WhisperFeatureExtractor) -> None:
        self.spec = spec
        self.module = module
        self._extractor = extractor

    @classmethod
    def load(cls, spec: EncoderSpec, dtype: torch.dtype | None = None, device: str = "cpu") -> AudioEncoder:
        """The encoder that lies at `spec.path`; `dtype` is float32 by default.

        Raises:
            ConfigError: the folder is not what write_whisper writes, or not as the base says.
        """
        module = load_whisper(spec.path)
        config: WhisperConfig = module.config
        found = (config.d_model * len(spec.layers), (1, config.max_source_positions))
        if found != (spec.width, spec.grid):
            raise ConfigError(f"features are {found}, not width and grid of base.toml", where=str(spec.path))
        extractor = mel_extractor(spec.path, config)
        module.to(device=device, dtype=dtype)  # type: ignore[call-arg]  # the decorated stub has lost self
        return cls(spec, module, extractor)

    @staticmethod
    def skeleton(spec: EncoderSpec) -> tuple[nn.Module, Callable[[], object]]:
        """See modalities.encoders.Encoder."""
        import torch

        module = _empty(spec.path).eval()
        mel = torch.zeros(module.config.num_mel_bins, 2 * (1 + SILENCE), device="meta")
        return module, lambda: run_whisper(module, mel, spec.layers)

    @staticmethod
    def layout(spec: EncoderSpec, data: bytes, limits: Limits) -> tuple[int]:
        """The positions of a sound. Raises MediaError where its header cannot be read."""
        return (positions_of(sound_samples(data, limits)),)

    def prepare(self, decoded: NDArray[np.float32]) -> Tensor:
        """Samples [S] → a log-mel spectrogram [M, F] of the sound and SILENCE positions more, float32."""
        import torch
        import torch.nn.functional as F

        window = self._window * POSITION
        starts = range(0, max(1, len(decoded)), window)
        mel = torch.cat([self._mel(decoded[start : start + window]) for start in starts], dim=1)
        frames = 2 * (positions_of(len(decoded)) + SILENCE)
        # What lies past the last window only tells how long the sound is: see _parts.
        return F.pad(mel, (0, frames - mel.shape[1]))

    def features(self, prepared: Sequence[Tensor]) -> list[Tensor]:
        """Spectrograms [M, F] → features [N, C] each.

        One window after the other, so that a sound's features are the same to the bit whatever it comes with.
        """
        import torch

        return [torch.cat([run[:kept] for run, kept in self._runs(mel)]) for mel in prepared]

    @property
    def _window(self) -> int:
        """Positions of the longest stretch that the encoder takes."""
        return self.spec.grid[1]

    def _mel(self, samples: NDArray[np.float32]) -> Tensor:
        """[M, F] of a window's sound and of the silence after it, as far as the window goes."""
        import numpy as np
        import torch

        positions = min(self._window, positions_of(len(samples)) + SILENCE)
        # A position more, since the spectrogram mirrors what it ends in; at its window's end Whisper's does.
        length = min(self._window, positions + 1) * POSITION
        padded = np.pad(samples, (0, length - len(samples)))
        found = self._extractor(padded, padding="do_not_pad", truncation=False, sampling_rate=RATE)
        return torch.from_numpy(found["input_features"][0][:, : 2 * positions])

    def _runs(self, mel: Tensor) -> Iterator[tuple[Tensor, int]]:
        """What each window of a spectrogram gives [P, C], and how many of its positions are the sound's."""
        positions = mel.shape[1] // 2 - SILENCE
        for start in range(0, positions, self._window):
            kept = min(self._window, positions - start)
            end = start + min(self._window, kept + SILENCE)
            yield run_whisper(self.module, mel[:, 2 * start : 2 * end], self.spec.layers), kept


def positions_of(samples: int) -> int:
    """Positions of 20 ms that a sound takes: one at least."""
    return max(1, -(-samples // POSITION))


def run_whisper(encoder: Any, mel: Tensor, layers: tuple[int, ...] = (-1,)) -> Tensor:
    """[M, F] → [P, C]: what WhisperEncoder.forward does, which takes whole windows only, for a spectrogram
    that is one, or ends in silence. Features of several layers are joined; the last one's are normed."""
    import torch
    import torch.nn.functional as F

    at, window = encoder.conv1.weight, encoder.config.max_source_positions
    # cuDNN would round float32 to ten bits of mantissa, and features move by a five-hundredth. Its switch is
    # the process's own: two threads that put it back must not cross.
    with _SWITCHING, torch.backends.cudnn.flags(enabled=False):
        x = F.gelu(encoder.conv1(mel[None].to(at.device, at.dtype)))
        x = F.gelu(encoder.conv2(x)).transpose(1, 2)
    places, bias = torch.arange(x.shape[1]), None
    if x.shape[1] < window:
        # The last position has the spectrogram's end in its view; the one before sees silence alone.
        places, counts = _stretches(x.shape[1] - 1, window)
        x = torch.cat([x[:, :-1], x[:, -2:-1].expand(-1, len(places) - x.shape[1] + 1, -1)], dim=1)
        bias = counts.log().to(at).expand(1, 1, len(places), -1)
    x = x + encoder.embed_positions(places.to(at.device))
    seen = []
    for layer in encoder.layers:
        x = layer(x, bias)
        seen.append(x)
    seen[-1] = encoder.layer_norm(x)
    return torch.cat([seen[layer][0] for layer in layers], dim=1)


def _stretches(dense: int, window: int) -> tuple[Tensor, Tensor]:
    """Places of the positions that are computed, and how many each stands for: the first `dense` ones for
    themselves, then the middle of every stretch up to the window's end."""
    import torch

    edges = torch.tensor([*range(dense, window, STRETCH), window])
    places = torch.cat([torch.arange(dense), (edges[:-1] + edges[1:]) // 2])
    return places, torch.cat([torch.ones(dense), edges.diff()])


def load_whisper(folder: Path) -> WhisperEncoder:
    """A frozen Whisper encoder in float32.

    Raises:
        ConfigError: the folder holds none, or its weights do not fit its config.
    """
    from safetensors.torch import load_file

    with _usable(folder):
        module = _empty(folder)
        module.load_state_dict(
            {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS_FILE).items()},
            strict=True,
            assign=True,
        )
    return module.eval().requires_grad_(False)


def mel_extractor(folder: Path, config: WhisperConfig) -> WhisperFeatureExtractor:
    """What makes the spectrograms of an encoder.

    Raises:
        ConfigError: it does not fit the encoder, or sounds at 16 kHz.
    """
    from transformers import WhisperFeatureExtractor

    with _usable(folder):
        extractor = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
    found = (extractor.feature_size, extractor.sampling_rate, extractor.hop_length, extractor.n_samples)
    expected = (config.num_mel_bins, RATE, POSITION // 2, config.max_source_positions * POSITION)
    if found != expected:
        raise ConfigError(
            f"mel bands, rate, hop and window are {found}, the encoder takes {expected}",
            where=str(folder / MEL_FILE),
        )
    return extractor


def empty_whisper(config: WhisperConfig) -> WhisperEncoder:
    """An encoder's modules without weights, on torch's meta device."""
    import torch
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    with torch.device("meta"):
        return WhisperEncoder(config)


def _empty(folder: Path) -> WhisperEncoder:
    from transformers import WhisperConfig

    with _usable(folder):
        return empty_whisper(WhisperConfig(**json.loads((folder / CONFIG_FILE).read_text())))


@contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """Raises ConfigError for what goes wrong when an encoder's directory is loaded."""
    try:
        yield
    except UNUSABLE as error:
        raise ConfigError(f"not a usable Whisper encoder: {error}", where=str(folder)) from error
