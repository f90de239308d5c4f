"""The host cache: bounded, one load a digest, errors not remembered."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from okavango.modalities.lora import LoraWeights
from okavango.platform.errors import NotFoundError
from okavango.serving.adapters.loading import Adapter, HostCache

STATUS = Path("/proc/self/status")
MIB = 1 << 20


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
    assert cache.get("a").digest == "a"


def test_those_who_wait_for_one_adapter_keep_nobody_from_another():
    arrived = threading.Event()

    def load(digest: str) -> Adapter:
        if digest == "slow":
            assert arrived.wait(60)
        return adapter(digest)

    cache = HostCache(10_000, load, threads=2)
    waiting = [cache.load("slow") for _ in range(10)]
    assert cache.load("quick").result(60).digest == "quick"
    assert not any(future.done() for future in waiting)
    arrived.set()
    assert len({id(future.result(60)) for future in waiting}) == 1
    cache.close()


def test_its_bytes_are_those_of_what_it_holds():
    cache = HostCache(1000, adapter)
    for i in range(50):
        cache.get(f"a{i % 7}")
        cache.check_integrity()
    assert cache.nbytes == 800


@pytest.mark.skipif(not STATUS.is_file(), reason="only Linux says what a process has written")
def test_what_a_load_needed_beside_the_adapter_goes_back_to_the_system():
    def load(digest: str) -> Adapter:
        passing = [torch.ones(16_384) for _ in range(1600)]  # 100 MiB
        kept = adapter(digest)  # stands behind them, so that the C library would hold on to all
        assert anonymous() > before + 80 * MIB
        del passing
        return kept

    cache, before = HostCache(1000, load), anonymous()
    cache.get("a")
    assert anonymous() < before + 20 * MIB


def anonymous() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_pinned_adapters_stay_and_go_again_when_they_are_not():
    cache = HostCache(1000, adapter)
    pinned = [adapter("a"), adapter("b"), adapter("c")]  # over the capacity
    cache.pin(pinned)
    for digest in "defd":
        cache.get(digest)
        cache.check_integrity()
    assert [cache.peek(digest) is not None for digest in "abcdef"] == [True] * 4 + [False] * 2
    cache.pin(pinned[:1])
    cache.check_integrity()
    assert [cache.peek(digest) is not None for digest in "abcd"] == [True, False, False, True]
    assert cache.nbytes == 800
