"""Embeddings: what the plain computation gives, whoever asks beside it, and refusals that say why."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from okavango.modalities.aligned import AlignedHeads, base_with
from okavango.modalities.base import Base, load_decoder, load_head
from okavango.modalities.content import Media
from okavango.modalities.embedding import EmbeddingHead, read_embedding
from okavango.modalities.encoders import decode, encode, load_encoder
from okavango.modalities.head_files import read_head
from okavango.modalities.projector import pool
from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tiny_bundle import (
    adapt_encoder,
    picture_bytes,
    random_space,
    sound_bytes,
    write_tiny_bundle,
)
from okavango.platform.bundle import read_manifest
from okavango.platform.errors import BusyError, InputError, MediaError, NotReadyError, UnsupportedError
from okavango.platform.telemetry import PrometheusMetrics
from okavango.serving.engine import Engine, EngineOptions
from okavango.serving.types import AdapterRef

PICTURE, SOUND = Media("image", picture_bytes(3)), Media("audio", sound_bytes(4, 0.7))
TEXTS = [(5, 6, 7), (200,), tuple(range(40, 140))]
OPTIONS = EngineOptions(dtype="float32", kv_bytes=1 << 22, max_waiting=3)


class Folders:
    """Bundles by name, as an engine fetches them."""

    def __init__(self, **folders: Path) -> None:
        self.folders = folders
        self.digests = {name: read_manifest(folder).digest for name, folder in folders.items()}

    def fetch(self, digest: str) -> Path:
        return next(self.folders[name] for name, known in self.digests.items() if known == digest)

    def ref(self, name: str) -> AdapterRef:
        return AdapterRef(name, 1, self.digests[name])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """One that sees and hears, with a space of its own."""
    folder = tmp_path_factory.mktemp("base")
    plain = write_tiny_base(folder / "plain", audio=True)
    return base_with(folder, "both", plain, AlignedHeads({}, {}, embedding=random_space(plain, 9)))


@pytest.fixture(scope="module")
def bundles(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("bundles")
    write_tiny_bundle(folder / "joint", base, seed=2, joint=True, probes=False)
    write_tiny_bundle(folder / "deep", base, seed=3, joint=True, encoder=True, probes=False)
    write_tiny_bundle(folder / "plain", base, seed=4, probes=False)
    return Folders(**{name: folder / name for name in ("joint", "deep", "plain")})


@pytest.fixture
def engine(base: Base, bundles: Folders) -> Iterator[Engine]:
    made = Engine(base, bundles, OPTIONS, PrometheusMetrics())
    made.start()
    yield made
    made.stop()


def expected(base: Base, folder: Path | None, inputs: list[Media | tuple[int, ...]], scratch: Path) -> Tensor:
    """By hand: means of what table or head give, less what texts share, through one layer, of length one."""
    table = load_decoder(base, torch.float32).get_input_embeddings()
    space = read_embedding(folder or base.folder, base.width or 0)
    assert isinstance(space, EmbeddingHead)
    rows = []
    for each in inputs:
        if isinstance(each, Media):
            brings = folder is not None and (folder / "projectors" / f"{each.modality}.safetensors").exists()
            head = (
                read_head(folder, each.modality)
                if folder and brings
                else load_head(base.heads[each.modality])
            )
            encoder = load_encoder(base.encoders[each.modality])
            if folder is not None and (folder / "encoders" / each.modality).is_dir():
                scratch.mkdir()
                encoder = adapt_encoder(scratch, base, seed=3)
            features = encode(encoder, [decode(each)])[0]
            mean = head(pool(features, head.spec)).flatten(0, 1).mean(0)
            layer = space.media[each.modality]
        else:
            mean, layer = table(torch.tensor(each)).mean(0), space.text
        rows.append(F.normalize((mean - space.common) @ layer.weight.T, dim=0))
    return torch.stack(rows).detach()


@pytest.mark.parametrize("name", [None, "joint", "deep"])
def test_vectors_are_those_of_the_plain_computation(
    base: Base, engine: Engine, bundles: Folders, tmp_path: Path, name: str | None
) -> None:
    inputs = [TEXTS[0], PICTURE, TEXTS[1], SOUND, TEXTS[2]]
    found = asyncio.run(engine.embed(inputs, bundles.ref(name) if name else None))
    folder = bundles.folders[name] if name else None
    torch.testing.assert_close(found.vectors, expected(base, folder, inputs, tmp_path / "scratch"))
    torch.testing.assert_close(found.vectors.norm(dim=1), torch.ones(5))
    assert found.tokens == (3, 4, 1, found.tokens[3], 100)
    assert found.features_cached == 0
    again = asyncio.run(engine.embed(inputs[::-1], bundles.ref(name) if name else None))
    assert torch.equal(again.vectors, found.vectors.flip(0))
    assert again.features_cached == 2


def test_calls_beside_each_other_change_no_bit(engine: Engine, bundles: Folders) -> None:
    async def all_at_once() -> list[Tensor]:
        models = [None, bundles.ref("joint"), bundles.ref("deep")]
        calls = [engine.embed([PICTURE, *TEXTS], model) for model in models]
        return [found.vectors for found in await asyncio.gather(*calls)]

    async def one_by_one() -> list[Tensor]:
        models = [None, bundles.ref("joint"), bundles.ref("deep")]
        return [(await engine.embed([each], model)).vectors for model in models for each in (PICTURE, *TEXTS)]

    together = asyncio.run(all_at_once())
    assert torch.equal(torch.cat(together), torch.cat(asyncio.run(one_by_one())))
    assert not torch.equal(together[0], together[1])


def test_no_decoder_step_and_no_idle_encoder_is_needed(engine: Engine) -> None:
    asyncio.run(engine.embed(TEXTS))
    assert engine.stats().encoders_loaded == ()
    assert engine.core.scheduler.running == []


def test_who_was_not_trained_to_embed_is_refused(engine: Engine, bundles: Folders) -> None:
    with pytest.raises(UnsupportedError, match="plain@1 has no space of embeddings"):
        asyncio.run(engine.embed(TEXTS, bundles.ref("plain")))


def test_a_medium_outside_the_space_is_refused(base: Base, bundles: Folders, tmp_path: Path) -> None:
    seeing = random_space(base, 1)
    spec = seeing.spec.__class__(seeing.spec.in_width, 8, ("image",))
    made = base_with(tmp_path, "seeing", base, AlignedHeads({}, {}, embedding=EmbeddingHead(spec)))
    engine = Engine(made, bundles, OPTIONS)
    engine.start()
    try:
        with pytest.raises(InputError, match="embeds text, image, and no audio") as raised:
            asyncio.run(engine.embed([PICTURE, SOUND]))
        assert raised.value.where == "input[1]"
    finally:
        engine.stop()


def test_a_medium_that_cannot_be_decoded_is_the_callers_error(engine: Engine) -> None:
    with pytest.raises(MediaError):
        asyncio.run(engine.embed([Media("image", b"no picture")]))


def test_too_many_calls_are_refused_and_leave_room_when_they_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go = threading.Event()
    vectors = engine.media.vectors
    monkeypatch.setattr(engine.media, "vectors", lambda *rest: may_go.wait(20) and vectors(*rest))

    async def crowd() -> None:
        waiting = [asyncio.create_task(engine.embed([PICTURE])) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await engine.embed(TEXTS)
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        await engine.embed(TEXTS)
        may_go.set()
        await asyncio.gather(*waiting[1:])

    asyncio.run(crowd())


def test_a_stopping_engine_tells_those_who_wait(
    base: Base, bundles: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(base, bundles, EngineOptions(dtype="float32", kv_bytes=1 << 22, max_waiting=20))
    with pytest.raises(NotReadyError):
        asyncio.run(engine.embed(TEXTS))
    engine.start()
    may_go = threading.Event()
    vectors = engine.media.vectors
    monkeypatch.setattr(engine.media, "vectors", lambda *rest: may_go.wait(20) and vectors(*rest))

    async def stopped() -> list[object]:
        calls = [asyncio.create_task(engine.embed([PICTURE])) for _ in range(9)]
        await asyncio.sleep(0.05)
        threading.Timer(0.2, may_go.set).start()
        await asyncio.to_thread(engine.stop)
        return list(await asyncio.gather(*calls, return_exceptions=True))

    found = asyncio.run(stopped())
    assert any(isinstance(each, NotReadyError) for each in found)
    assert all(not isinstance(each, BaseException) or isinstance(each, NotReadyError) for each in found)
