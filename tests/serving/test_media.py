"""Features are computed once, and kept within bounds."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from okavango.modalities.content import Media
from okavango.modalities.prompt import Rendered, Span
from okavango.modalities.tiny_bundle import picture_bytes
from okavango.platform.telemetry import PrometheusMetrics
from okavango.serving.cache.features import FeatureCache, FeatureKey
from okavango.serving.media import MediaRuntime


def features(floats: int) -> torch.Tensor:
    return torch.zeros(floats, 1)


def keys(cache: FeatureCache, *names: str) -> list[bool]:
    return [cache.get(key(name)) is not None for name in names]


def key(name: str) -> FeatureKey:
    return FeatureKey("e", "", name, "float32")


def prompt(*media: Media) -> Rendered:
    spans = tuple(Span(medium.modality, 4 * i, 4) for i, medium in enumerate(media))
    return Rendered((0,) * 4 * len(media), spans, media)


def put(cache: FeatureCache, name: str, floats: int) -> None:
    cache.put(key(name), features(floats))
    cache.check_integrity()


def test_the_longest_unused_features_go_first_and_bytes_are_counted():
    cache = FeatureCache(4 * 100)
    put(cache, "a", 40)
    put(cache, "b", 40)
    assert keys(cache, "a") == [True]
    put(cache, "c", 40)
    assert keys(cache, "a", "b", "c") == [True, False, True]
    assert cache.used_bytes == 4 * 80
    put(cache, "a", 40)  # the same again changes nothing
    put(cache, "huge", 101)
    assert keys(cache, "a", "c", "huge") == [True, True, False]
    assert cache.used_bytes == 4 * 80


class MeetingCache(FeatureCache):
    """Lets nobody past its first look before everybody has looked."""

    def __init__(self, readers: int) -> None:
        super().__init__(1 << 20)
        self._looks = 0
        self._readers = readers
        self._all_looked = threading.Barrier(readers)

    def get(self, key):
        found = super().get(key)
        self._looks += 1
        if self._looks <= self._readers:
            self._all_looked.wait(30)
        return found


def test_requests_that_come_at_once_with_one_picture_encode_it_once(tiny_base):
    metrics = PrometheusMetrics()
    runtime = MediaRuntime(tiny_base, MeetingCache(3), metrics)
    picture = Media("image", picture_bytes(1))
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda _: runtime.embed(prompt(picture), None), range(3)))
    assert sorted(hits for _, hits in found) == [0, 1, 1]
    assert 'okavango_encoder_runs_total{modality="image"} 1.0' in metrics.render().decode()
    assert all(torch.equal(vectors[0], found[0][0][0]) for vectors, _ in found)
    runtime.close()


def test_a_picture_twice_in_one_request_is_encoded_once_even_without_a_cache(tiny_base):
    runtime = MediaRuntime(tiny_base, FeatureCache(0), PrometheusMetrics())
    one, other = Media("image", picture_bytes(1)), Media("image", picture_bytes(2))
    found, hits = runtime.embed(prompt(one, other, one), None)
    assert hits == 1
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
