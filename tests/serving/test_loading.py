"""The host cache: bounded, one load a digest, errors not remembered."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from okavango.modalities.lora import LoraWeights
from okavango.platform.errors import NotFoundError
from okavango.serving.adapters.loading import Adapter, HostCache


def adapter(digest: str, floats: int = 100) -> Adapter:
    return Adapter(digest, LoraWeights({"m": (torch.zeros(1, floats), torch.zeros(1, 0))}, 1))


def test_the_longest_unused_goes_first_and_the_newest_always_fits():
    cache = HostCache(1000, adapter)
    for digest in ("a", "b", "a", "c"):
        cache.get(digest)
    assert [cache.peek(digest) is not None for digest in "abc"] == [True, False, True]
    big = HostCache(10, adapter)
    big.get("a")
    assert big.peek("a") is not None


def test_many_who_want_one_adapter_load_it_once():
    loads, entered = [], threading.Barrier(8)

    def load(digest: str) -> Adapter:
        loads.append(digest)
        return adapter(digest)

    cache = HostCache(10_000, load)

    def get(i: int) -> Adapter:
        entered.wait()
        return cache.get("ab"[i % 2])

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(get, range(8)))
    assert sorted(loads) == ["a", "b"]
    assert len({id(each) for each in found}) == 2


def test_a_failed_load_is_tried_again_and_leaves_nothing_behind():
    loads = []

    def load(digest: str) -> Adapter:
        loads.append(digest)
        if len(loads) == 1:
            raise NotFoundError("away")
        return adapter(digest)

    cache = HostCache(10_000, load)
    with pytest.raises(NotFoundError):
        cache.get("a")
    gc.collect()  # the error's traceback
    assert not cache._turns
    assert cache.get("a").digest == "a"
