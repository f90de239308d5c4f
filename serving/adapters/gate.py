"""The parity gate: a bundle becomes routable only when serving reproduces what training saw.

Every tensor must bind; then the bundle's probes are rendered, their media encoded and projected, and run
through the serving runner, in float32. A bundle without probes is `bound`: complete binding alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from okavango.modalities.base import Base, load_tokenizer
from okavango.modalities.encoders import make_renderer
from okavango.modalities.lora import LoraWeights
from okavango.modalities.precision import PARITY_BOUNDS, relative_error
from okavango.modalities.probes import Probe, read_probes
from okavango.platform.bundle import verify
from okavango.platform.errors import ParityError
from okavango.platform.telemetry import NullMetrics
from okavango.serving.adapters.loading import Adapter, load_adapter
from okavango.serving.backend import RunnerOptions
from okavango.serving.cache.features import FeatureCache
from okavango.serving.media import MediaRuntime
from okavango.serving.runner import Runner
from okavango.serving.scheduler import Chunk, Step
from okavango.serving.sequence import Sequence as EngineSequence
from okavango.serving.types import Request

_BLOCK = 16
_KV_BYTES = 1 << 29
_MAX_RANK = 256


@dataclass(frozen=True)
class Verdict:
    """`ready`: probes reproduced. `bound`: every tensor bound, and no probes to compare.

    `verification` holds the number of probes, and the worst relative error of the logits by precision.
    """

    state: Literal["ready", "bound"]
    verification: dict[str, float | str]


class ParityGate:
    """Checks bundles against one base. Its decoders are its own, loaded on the first check.

    Args:
        dtype: what the server computes in; probes are compared in it, too, within its own bound.
        kernels: as in EngineOptions; what serves is what is checked.
    """

    def __init__(self, base: Base, dtype: torch.dtype = torch.float32, kernels: Path | None = None) -> None:
        self.base = base
        self._kernels = kernels
        self._dtypes = tuple(dict.fromkeys((torch.float32, dtype)))
        self._runners: dict[torch.dtype, Runner] = {}
        self._lock = threading.Lock()
        self._tokenizer = load_tokenizer(base)
        self._media = MediaRuntime(base, FeatureCache(0), NullMetrics())

    def check(self, folder: Path) -> Verdict:
        """Verify, bind and run a bundle.

        Raises:
            IntegrityError: its files are not as its manifest says.
            BindError, UnsupportedError: it does not fit this base.
            ParityError: serving does not reproduce its probes.
        """
        with self._lock:
            manifest = verify(folder)
            adapter = load_adapter(folder, self.base, self._runner(torch.float32).targets)
            if not manifest.has_probes:
                return Verdict("bound", {"probes": 0})
            probes = read_probes(folder)
            if not probes:
                raise ParityError("the probe file holds no probes", where=str(folder))
            errors = {dtype: self._worst(probes, adapter, dtype) for dtype in self._dtypes}
            return Verdict("ready", {"probes": len(probes), **{_name(d): e for d, e in errors.items()}})

    def close(self) -> None:
        """Drop the decoders and encoders; the next check loads them anew."""
        with self._lock:
            self._runners.clear()
            self._media.close()
            self._media = MediaRuntime(self.base, FeatureCache(0), NullMetrics())

    def _worst(self, probes: Sequence[Probe], adapter: Adapter, dtype: torch.dtype) -> float:
        runner = self._runner(dtype)
        assert isinstance(adapter.lora, LoraWeights)
        runner.load(1, runner.pack(adapter.lora))
        worst = 0.0
        for i, probe in enumerate(probes):
            found = self._logits(runner, i, probe, adapter)
            error = relative_error(found, probe.logits)
            if not error <= PARITY_BOUNDS[dtype]:
                raise ParityError(
                    f"serving differs from training by {error:.2g} in {_name(dtype)}, "
                    f"over the bound of {PARITY_BOUNDS[dtype]:g}",
                    where=f"probe {i}",
                )
            worst = max(worst, error)
        return worst

    def _logits(self, runner: Runner, i: int, probe: Probe, adapter: Adapter) -> Tensor:
        heads = {name: head.spec for name, head in adapter.heads.items()}
        renderer = make_renderer(self.base, self._tokenizer, heads)
        rendered = renderer.conversation(probe.messages, probe.system)
        if list(rendered.tokens) != probe.tokens.tolist():
            raise ParityError("serving renders the conversation into other tokens", where=f"probe {i}")
        embeds, _ = self._media.embed(rendered, adapter)
        sequence = EngineSequence(Request(f"probe-{i}", rendered), max_tokens=1, embeds=embeds)
        sequence.slot = 1
        sequence.blocks = list(range(-(-len(rendered.tokens) // _BLOCK)))
        step = Step((), (Chunk(sequence, 0, len(rendered.tokens)),))
        return runner.run(step, probe.positions.tolist()).float().cpu()

    def _runner(self, dtype: torch.dtype) -> Runner:
        if dtype not in self._runners:
            options = RunnerOptions(
                dtype, "cpu", _BLOCK, _KV_BYTES, slots=1, max_rank=_MAX_RANK, kernels=self._kernels
            )
            self._runners[dtype] = Runner(self.base, options)
        return self._runners[dtype]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
