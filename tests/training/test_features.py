from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_fixtures import Workshop, picture_row, write_rows

from okavango.modalities.encoders import decode, encode, load_encoder
from okavango.modalities.image import ImageEncoder
from okavango.modalities.projector import HeadSpec, pool
from okavango.platform.errors import DataError
from okavango.training.dataset import Dataset, open_dataset
from okavango.training.features import FeatureCache, fill_cache
from okavango.training.monitor import Monitor, Reason, Stopped


def cache_of(workshop: Workshop, **changes: object) -> FeatureCache:
    head = workshop.base.heads["image"].spec
    arguments: dict[str, object] = {"dtype": torch.float32, "head": head}
    arguments |= changes
    encoder = workshop.base.encoders["image"]
    return FeatureCache(workshop.settings.features, "image", encoder, **arguments)  # type: ignore[arg-type]


def digests(dataset: Dataset) -> list[str]:
    return [m.digest for example in dataset.rows() for message in example.messages for m in message.media]


def test_features_are_what_the_encoder_and_pooling_give(workshop: Workshop) -> None:
    dataset, cache = open_dataset(workshop.folder / "pictures.jsonl"), cache_of(workshop)
    assert fill_cache(cache, [dataset], "cpu", Monitor()) == 8
    encoder = load_encoder(workshop.base.encoders["image"])
    for example in dataset.rows():
        medium = example.messages[0].media[0]
        expected = pool(encode(encoder, [decode(medium)])[0], cache.head)
        torch.testing.assert_close(cache.load(medium.digest), expected, rtol=1e-5, atol=1e-5)


def test_a_second_run_computes_nothing(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(workshop.folder / "pictures.jsonl")
    fill_cache(cache_of(workshop), [dataset], "cpu", Monitor())
    monkeypatch.setattr(ImageEncoder, "load", None)
    assert fill_cache(cache_of(workshop), [dataset, dataset], "cpu", Monitor()) == 0


def test_a_picture_that_two_rows_share_is_encoded_once(workshop: Workshop) -> None:
    rows = [picture_row("images/1.png", "a"), picture_row("images/1.png", "b")]
    dataset = open_dataset(write_rows(workshop.folder / "twice.jsonl", rows))
    assert fill_cache(cache_of(workshop), [dataset], "cpu", Monitor()) == 1


def test_what_features_depend_on_keeps_them_apart(workshop: Workshop) -> None:
    spec = workshop.base.heads["image"].spec
    fewer = HeadSpec(spec.in_width, spec.out_width, spec.grid, 1, spec.hidden)
    caches = [cache_of(workshop), cache_of(workshop, dtype=torch.bfloat16), cache_of(workshop, head=fewer)]
    for i, cache in enumerate(caches):
        cache.save("ab" * 32, torch.full((1, cache.head.tokens, spec.in_width), float(i)))
    assert [cache.load("ab" * 32)[0, 0, 0].item() for cache in caches] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\x01\x00v\x00", b"nonsense"])
def test_a_damaged_file_is_computed_anew(workshop: Workshop, damage: bytes) -> None:
    dataset, cache = open_dataset(workshop.folder / "pictures.jsonl"), cache_of(workshop)
    fill_cache(cache, [dataset], "cpu", Monitor())
    digest = digests(dataset)[3]
    before = cache.load(digest)
    path = next(workshop.settings.features.rglob(f"{digest}.npy"))
    path.write_bytes(damage)
    assert fill_cache(cache, [dataset], "cpu", Monitor()) == 1
    torch.testing.assert_close(cache.load(digest), before)


def test_a_stop_keeps_what_is_done(workshop: Workshop) -> None:
    many = [picture_row(f"images/{i % 8}.png", "x") for i in range(8)]
    dataset = open_dataset(write_rows(workshop.folder / "many.jsonl", many))
    monitor = Monitor()
    monitor.stop(Reason.INTERRUPT)
    with pytest.raises(Stopped):
        fill_cache(cache_of(workshop), [dataset], "cpu", monitor)
    assert all(cache_of(workshop).has(digest) for digest in digests(dataset))
    assert not list(workshop.settings.features.rglob(".*.npy"))


def test_a_picture_that_vanishes_is_named_with_its_line(workshop: Workshop) -> None:
    dataset = open_dataset(workshop.folder / "pictures.jsonl")
    (workshop.folder / "images" / "2.png").unlink()
    with pytest.raises(DataError, match=r"pictures\.jsonl:3: .*images/2\.png"):
        fill_cache(cache_of(workshop), [dataset], "cpu", Monitor())
    assert Path(dataset.path).is_file()
