from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_fixtures import Workshop, write_pictures

from okavango.modalities.image import decode_image
from okavango.modalities.tiny_bundle import picture_bytes
from okavango.training.dataset import open_dataset
from okavango.training.features import FeatureCache, fill_cache, view_key
from okavango.training.loop import TrainingSet
from okavango.training.monitor import Monitor
from okavango.training.views import view

DIGEST = "5a" * 32


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)


def test_view_0_is_the_picture_itself() -> None:
    picture = decode_image(picture_bytes(1))
    assert view(picture, DIGEST, 0, 32) is picture


def test_views_differ_are_drawn_at_the_encoders_size_and_repeat() -> None:
    picture = decode_image(picture_bytes(1)).resize((90, 45))
    views = [view(picture, DIGEST, number, 32) for number in range(1, 6)]
    assert {each.size for each in views} == {(32, 16)}
    assert len({each.tobytes() for each in views}) == 5
    again = view(picture, DIGEST, 3, 32)
    assert np.array_equal(pixels(again), pixels(views[2]))
    other = view(picture, "6b" * 32, 3, 32)
    assert not np.array_equal(pixels(other), pixels(again))


def test_nothing_is_mirrored() -> None:
    """Black on the left stays on the left, however a view turns and stretches it."""
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("black", (0, 0, 24, 64))
    for number in range(1, 40):
        grey = pixels(view(picture, DIGEST, number, 64)).mean(2)
        assert grey[:, :32].mean() < grey[:, 32:].mean()


@pytest.mark.usefixtures("one_thread")
def test_features_of_views_are_computed_once_and_drawn_by_seed_and_step(
    tmp_path: Path, workshop: Workshop
) -> None:
    base = workshop.base
    cache = FeatureCache(
        workshop.settings.features,
        "image",
        base.encoders["image"],
        base.heads["image"].spec,
        dtype=torch.float32,
    )
    dataset = open_dataset(write_pictures(tmp_path))
    assert fill_cache(cache, [dataset], "cpu", Monitor(), views=2) == 3 * len(dataset)
    assert fill_cache(cache, [dataset], "cpu", Monitor(), views=2) == 0
    digest = dataset.row(0).messages[0].media[0].digest
    plain, one, two = (cache.load(view_key(digest, k)) for k in range(3))
    assert not plain.equal(one)
    assert not one.equal(two)

    def load(modality: str, key: str) -> torch.Tensor:
        return cache.load(key)

    data = TrainingSet([], load, views=2)
    drawn = [data.load_at(step, seed=0)("image", digest) for step in range(30)]
    assert {t.sum().item() for t in drawn} == {t.sum().item() for t in (plain, one, two)}
    assert all(t.equal(data.load_at(step, seed=0)("image", digest)) for step, t in enumerate(drawn))
    assert any(not t.equal(data.load_at(step, seed=1)("image", digest)) for step, t in enumerate(drawn))
    assert TrainingSet([], load).load_at(3, 0)("image", digest).equal(plain)
