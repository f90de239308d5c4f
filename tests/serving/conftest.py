"""Engines over the tiny base, and the plain reference that they must equal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from okavango.modalities.base import Base, load_decoder, load_head
from okavango.modalities.content import Media, Message, Part, Text
from okavango.modalities.encoders import Encoder, load_encoder
from okavango.modalities.projector import ProjectionHead
from okavango.modalities.tiny_bundle import reference_embeddings
from okavango.platform.telemetry import Metrics
from okavango.serving.adapters.loading import load_adapter
from okavango.serving.engine import Engine, EngineOptions
from okavango.serving.types import AdapterRef, AdapterSource, Event, FinishReason, Request, SamplingParams

OPTIONS = {"dtype": "float32", "kv_bytes": 1 << 23, "max_step_tokens": 64, "max_sequences": 16}


def greedy(tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)


class Harness:
    """An engine whose step thread runs, with the reference beside it."""

    def __init__(
        self,
        base: Base,
        bundles,
        source: AdapterSource | None = None,
        metrics: Metrics | None = None,
        **options,
    ) -> None:
        self.base, self.bundles = base, bundles
        self.engine = Engine(base, source or bundles, EngineOptions(**{**OPTIONS, **options}), metrics)
        self._may_step = threading.Event()
        self._may_step.set()
        step = self.engine.core.step

        def checked_step() -> None:
            self._may_step.wait()
            step()
            self.engine.core.scheduler.check_integrity()

        self.engine.core.step = checked_step  # type: ignore[method-assign]
        self.engine.start()
        self._count = 0

    def ref(self, name: str | None) -> AdapterRef | None:
        return AdapterRef(name, 1, self.bundles.digests[name]) if name else None

    def request(
        self,
        text: str,
        adapter: str | None = None,
        pictures: Sequence[bytes] = (),
        params: SamplingParams | None = None,
    ) -> Request:
        self._count += 1
        parts: list[Part] = [Media("image", data) for data in pictures]
        prompt = self.engine.renderer.prompt([Message("user", (*parts, Text(text)))])
        return Request(f"request-{self._count}", prompt, self.ref(adapter), params or greedy())

    def run(self, requests: Sequence[Request]) -> list[list[Event]]:
        """The events of each request. The engine sees them at once, however slowly this thread runs."""
        events: list[list[Event]] = [[] for _ in requests]
        done = threading.Semaphore(0)

        def sink(i: int) -> Callable[[Event], None]:
            def take(event: Event) -> None:
                events[i].append(event)
                if event.finish is not None:
                    done.release()

            return take

        self._may_step.clear()
        try:
            for i, request in enumerate(requests):
                self.engine.submit(request, sink(i))
        finally:
            self._may_step.set()
        for _ in requests:
            assert done.acquire(timeout=60), "the engine did not finish"
        return events

    def tokens(self, requests: Sequence[Request]) -> list[list[int]]:
        found = []
        for events in self.run(requests):
            assert events[-1].finish in (FinishReason.STOP, FinishReason.LENGTH), events[-1].error
            found.append([token for event in events for token in event.tokens])
        return found


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for compiled kernels, so that they are compiled once a run."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(params=["torch", "native"])
def computing(request: pytest.FixtureRequest, kernels: Path) -> dict[str, Path | None]:
    """EngineOptions of both backends in turn."""
    return {"kernels": kernels if request.param == "native" else None}


@pytest.fixture
def make_harness(tiny_base, tiny_bundles, computing) -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def make(base: Base = tiny_base, bundles=tiny_bundles, **options) -> Harness:
        made.append(Harness(base, bundles, **{**computing, **options}))
        return made[-1]

    yield make
    for harness in made:
        harness.engine.stop()
        harness.engine.core.scheduler.check_integrity()


@pytest.fixture
def harness(make_harness) -> Harness:
    return make_harness()


class Reference:
    """transformers + PEFT in float32, one request at a time."""

    def __init__(self, base: Base, bundles) -> None:
        self.base, self.bundles = base, bundles
        self.models = {None: load_decoder(base, torch.float32)}
        for name, folder in bundles.folders.items():
            decoder = load_decoder(base, torch.float32)
            self.models[name] = PeftModel.from_pretrained(decoder, folder / "decoder").eval()

    def head(self, name: str | None) -> ProjectionHead:
        if name is None:
            return load_head(self.base.heads["image"])
        heads = load_adapter(self.bundles.folders[name], self.base, self._targets).heads
        return heads.get("image") or load_head(self.base.heads["image"])

    def encoder(self, name: str | None) -> Encoder | None:
        """The image encoder under PEFT's own layers, where the bundle adapts it."""
        folder = self.bundles.folders[name] / "encoders" / "image" if name else None
        if folder is None or not folder.is_dir():
            return None
        encoder = load_encoder(self.base.encoders["image"])
        PeftModel.from_pretrained(encoder.module, str(folder))
        return encoder

    @property
    def _targets(self):
        from okavango.modalities.lora import find_targets

        return find_targets(self.models[None])

    @torch.inference_mode()
    def tokens(self, request: Request) -> list[int]:
        """What generate gives for this request alone."""
        name = request.adapter.name if request.adapter else None
        model = self.models[name]
        head = self.head(name) if request.prompt.media else None
        encoder = self.encoder(name) if request.prompt.media else None
        embeddings = reference_embeddings(self.base, model, request.prompt, head, encoder)
        out = model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
            max_new_tokens=request.params.max_tokens,
            min_new_tokens=request.params.max_tokens if request.params.ignore_eos else None,
            do_sample=False,
            eos_token_id=None if request.params.ignore_eos else model.generation_config.eos_token_id,
        )
        return out[0].tolist()


@pytest.fixture(scope="session")
def make_reference() -> Callable[..., Reference]:
    """Of any base and its bundles."""
    return Reference


@pytest.fixture(scope="session")
def reference(tiny_base, tiny_bundles) -> Reference:
    return Reference(tiny_base, tiny_bundles)
