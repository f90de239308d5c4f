"""Encoders are there when they are needed, gone when they are not, and never more than the budget allows."""

from __future__ import annotations

import dataclasses
import gc
import random
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

from okavango.modalities.encoders import load_encoder
from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tiny_bundle import picture_bytes
from okavango.platform.errors import ConfigError, NotReadyError, OkavangoError, UnsupportedError
from okavango.platform.telemetry import PrometheusMetrics
from okavango.serving import encoders as module
from okavango.serving.cache.features import FeatureCache, FeatureKey
from okavango.serving.encoders import EncoderOptions, Encoders, weights_bytes
from okavango.serving.types import FinishReason

SECONDS = 30


class Clock:
    """Time that goes on when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Loads:
    """The real loader, which counts, and waits or fails where it is told to."""

    def __init__(self) -> None:
        self.of: list[str] = []
        self.failures: list[Exception] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()

    def __call__(self, spec, dtype=None, device="cpu"):
        self.of.append(spec.path.name)
        self.begun.set()
        assert self.gate.wait(SECONDS)
        if self.failures:
            raise self.failures.pop()
        return load_encoder(spec, dtype, device)


@dataclasses.dataclass
class Pool:
    encoders: Encoders
    features: FeatureCache
    metrics: PrometheusMetrics
    clock: Clock
    loads: Loads

    def counted(self, name: str, **labels: str) -> float:
        """A metric's value as a scrape shows it."""
        text = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        lines = self.metrics.render().decode().splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{{text}}}")), 0.0)

    def use(self, modality: str) -> None:
        with self.encoders.use(modality):
            self.encoders.check_integrity()
        self.encoders.check_integrity()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A base that sees and hears."""
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "both", audio=True, name="both")


@pytest.fixture(scope="module")
def sizes(both) -> dict[str, int]:
    return {name: weights_bytes(spec.path) for name, spec in both.encoders.items()}


@pytest.fixture
def loads(monkeypatch) -> Loads:
    found = Loads()
    monkeypatch.setattr(module, "load_encoder", found)
    return found


@pytest.fixture
def make_pool(both, loads) -> Iterator[Callable[..., Pool]]:
    made: list[Pool] = []

    def make(feature_bytes: int = 1 << 20, specs=None, **options) -> Pool:
        features, metrics, clock = FeatureCache(feature_bytes), PrometheusMetrics(), Clock()
        encoders = Encoders(
            both.encoders if specs is None else specs,
            features,
            metrics,
            options=EncoderOptions(**options),
            clock=clock,
        )
        made.append(Pool(encoders, features, metrics, clock, loads))
        return made[-1]

    yield make
    for pool in made:
        pool.encoders.check_integrity()
        pool.encoders.close()
        assert pool.encoders.loaded == ()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as found:
        yield found


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.001)


def waiters(pool: Pool) -> int:
    """Threads that wait for an encoder or for memory."""
    return len(pool.encoders._changed._waiters)


def key(name: str) -> FeatureKey:
    return FeatureKey("e", "", name, "float32")


def put(pool: Pool, name: str, nbytes: int) -> None:
    pool.features.put(key(name), torch.zeros(nbytes // 4, 1))


def test_sizes_are_those_of_the_loaded_weights(both, sizes):
    for name, spec in both.encoders.items():
        loaded = sum(p.nbytes for p in load_encoder(spec).module.parameters())
        assert loaded <= sizes[name] <= 1.5 * loaded


def test_first_users_that_come_at_once_load_once(make_pool, threads):
    pool = make_pool()
    pool.loads.gate.clear()
    seen: list[object] = []

    def use(_: int) -> None:
        with pool.encoders.use("image") as encoder:
            seen.append(encoder)

    users = [threads.submit(use, i) for i in range(6)]
    eventually(lambda: waiters(pool) == 5)
    assert pool.encoders.loaded == ()
    pool.loads.gate.set()
    for user in users:
        user.result(SECONDS)
    assert pool.loads.of == ["image"]
    assert len(seen) == 6
    assert all(encoder is seen[0] for encoder in seen)
    assert pool.encoders.loaded == ("image",)
    assert pool.counted("okavango_encoder_loads_total", modality="image") == 1
    assert pool.counted("okavango_encoder_loaded", modality="image") == 1
    assert pool.counted("okavango_encoder_loaded", modality="audio") == 0


def test_two_encoders_load_beside_each_other(make_pool, threads):
    pool = make_pool()
    pool.loads.gate.clear()
    users = [threads.submit(pool.use, name) for name in ("image", "audio")]
    eventually(lambda: len(pool.loads.of) == 2)
    pool.loads.gate.set()
    for user in users:
        user.result(SECONDS)
    assert sorted(pool.encoders.loaded) == ["audio", "image"]


def test_a_load_that_fails_fails_all_who_wait_for_it_and_the_next_one_tries_again(make_pool, threads, sizes):
    pool = make_pool(capacity_bytes=sum(sizes.values()))
    pool.loads.gate.clear()
    pool.loads.failures = [MemoryError("no room on the device")]
    users = [threads.submit(pool.use, "image") for _ in range(4)]
    eventually(lambda: waiters(pool) == 3)
    pool.loads.gate.set()
    for user in users:
        with pytest.raises(
            OkavangoError, match=r"the image encoder cannot be loaded: .*no room on the device"
        ):
            user.result(SECONDS)
    assert pool.loads.of == ["image"]
    assert pool.features.capacity_bytes == min(1 << 20, sum(sizes.values())), "the promised bytes are lost"
    assert pool.counted("okavango_encoder_loaded", modality="image") == 0
    pool.use("image")
    assert pool.encoders.loaded == ("image",)


def test_a_damaged_encoder_is_named_and_served_once_it_is_whole(make_pool, both, tmp_path):
    folder = tmp_path / "image"
    shutil.copytree(both.encoders["image"].path, folder)
    weights = folder / "open_clip_model.safetensors"
    whole = weights.read_bytes()
    pool = make_pool(specs={"image": dataclasses.replace(both.encoders["image"], path=folder)})
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=str(weights)):
        pool.use("image")
    weights.write_bytes(whole)
    pool.use("image")


def test_what_is_to_be_there_is_loaded_at_the_start_and_stays(make_pool, sizes):
    pool = make_pool(preload=("image",), idle_seconds=5.0, capacity_bytes=sum(sizes.values()))
    assert pool.loads.of == []
    pool.encoders.preload()
    pool.use("audio")
    assert pool.loads.of == ["image", "audio"]
    pool.clock.now += 5
    pool.encoders.unload_idle()
    assert pool.encoders.loaded == ("image",)


def test_a_modality_that_is_switched_off_or_unknown_is_refused_by_name(make_pool):
    pool = make_pool(disabled=("audio",))
    with pytest.raises(UnsupportedError, match="audio is switched off"):
        pool.use("audio")
    with pytest.raises(UnsupportedError, match="no video encoder"):
        pool.use("video")
    pool.use("image")
    assert pool.loads.of == ["image"]


@pytest.mark.parametrize("option", ["preload", "disabled"])
def test_an_option_for_an_encoder_that_is_not_there_is_refused(make_pool, option):
    with pytest.raises(ConfigError, match="no video encoder; it has image, audio"):
        make_pool(**{option: ("video",)})


def test_after_the_idle_time_an_encoder_goes_and_its_memory_with_it(make_pool):
    pool = make_pool(idle_seconds=10.0)
    with pool.encoders.use("image") as encoder:
        alive = weakref.ref(encoder.module)
        del encoder
        pool.clock.now += 60
        assert pool.encoders.unload_idle() is None
        assert pool.encoders.loaded == ("image",), "it is in use"
    pool.clock.now += 9
    assert pool.encoders.unload_idle() == pytest.approx(1)
    pool.clock.now += 1
    gc.disable()  # memory has to be free before others take it, not when the collector comes by
    try:
        assert pool.encoders.unload_idle() is None
        assert alive() is None
    finally:
        gc.enable()
    assert pool.encoders.loaded == ()
    assert pool.counted("okavango_encoder_unloads_total", modality="image", reason="idle") == 1
    pool.use("image")
    assert pool.loads.of == ["image", "image"]


def test_each_use_begins_the_idle_time_anew(make_pool):
    pool = make_pool(idle_seconds=10.0)
    pool.use("image")
    pool.clock.now += 6
    pool.use("image")
    pool.use("audio")
    pool.clock.now += 6
    assert pool.encoders.unload_idle() == pytest.approx(4)
    pool.use("audio")
    pool.clock.now += 4
    assert pool.encoders.unload_idle() == pytest.approx(6)
    assert pool.encoders.loaded == ("audio",)


def sweepers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "okavango-encoders"]


def test_encoders_are_swept_without_being_asked_and_the_sweeper_ends(make_pool):
    pool = make_pool(idle_seconds=10.0)
    assert sweepers() == []
    pool.use("image")
    (sweeper,) = sweepers()
    eventually(lambda: waiters(pool) == 1)
    with pool.encoders.use("audio"):
        pool.clock.now += 11
    # Of the two only the picture's is due; the end of the other's use has woken the sweeper.
    eventually(lambda: pool.encoders.loaded == ("audio",))
    pool.encoders.close()
    assert not sweeper.is_alive()
    assert pool.encoders.loaded == ()


def test_with_no_idle_time_at_all_an_encoder_goes_with_its_last_user_and_nothing_spins(
    make_pool, monkeypatch
):
    pool = make_pool(idle_seconds=0.0)
    with pool.encoders.use("image"):
        assert pool.encoders.loaded == ("image",)
    eventually(lambda: pool.encoders.loaded == () and waiters(pool) == 1)
    looks: list[int] = []
    monkeypatch.setattr(pool.encoders, "unload_idle", lambda: looks.append(1))
    time.sleep(0.05)
    assert looks == []


def test_nothing_is_swept_without_an_idle_time(make_pool):
    pool = make_pool()
    pool.use("image")
    pool.clock.now += 1e9
    assert pool.encoders.unload_idle() is None
    assert sweepers() == []
    assert pool.encoders.loaded == ("image",)


def test_close_waits_for_loads_and_uses_and_then_nothing_is_loaded(make_pool, threads):
    pool = make_pool(idle_seconds=10.0)
    pool.loads.gate.clear()
    in_use, done = threading.Event(), threading.Event()

    def use() -> None:
        with pool.encoders.use("image"):
            in_use.set()
            assert done.wait(SECONDS)
            assert pool.encoders.loaded == ("image",)

    user = threads.submit(use)
    assert pool.loads.begun.wait(SECONDS)
    late = threads.submit(pool.use, "image")
    eventually(lambda: waiters(pool) == 1)
    closing = threads.submit(pool.encoders.close)
    with pytest.raises(NotReadyError, match="stopping"):
        late.result(SECONDS)
    pool.loads.gate.set()
    assert in_use.wait(SECONDS)
    assert not closing.done()
    done.set()
    user.result(SECONDS)
    closing.result(SECONDS)
    assert pool.encoders.loaded == ()
    assert sweepers() == []
    with pytest.raises(NotReadyError, match="stopping"):
        pool.use("image")


def test_features_give_way_to_an_encoder_and_come_back_when_it_goes(make_pool, sizes):
    spare = 4000
    pool = make_pool(capacity_bytes=sizes["image"] + spare, idle_seconds=10.0)
    for i in range(10):
        put(pool, str(i), sizes["image"] // 10)
    put(pool, "last", spare // 2)
    assert pool.features.used_bytes > spare
    pool.use("image")
    assert pool.features.capacity_bytes == spare
    assert pool.features.get(key("last")) is not None
    assert pool.features.used_bytes <= spare
    pool.clock.now += 10
    pool.encoders.unload_idle()
    assert pool.features.capacity_bytes == sizes["image"] + spare


def test_features_never_get_more_than_their_own_limit(make_pool, sizes):
    pool = make_pool(feature_bytes=1000, capacity_bytes=10 * sum(sizes.values()))
    assert pool.features.capacity_bytes == 1000
    pool.use("image")
    assert pool.features.capacity_bytes == 1000


def test_an_encoder_that_nobody_uses_gives_way_to_another(make_pool, sizes):
    pool = make_pool(capacity_bytes=max(sizes.values()))
    pool.use("image")
    pool.use("audio")
    assert pool.encoders.loaded == ("audio",)
    assert pool.counted("okavango_encoder_unloads_total", modality="image", reason="memory") == 1
    pool.use("image")
    assert pool.encoders.loaded == ("image",)


def test_while_there_is_room_no_encoder_gives_way(make_pool, sizes):
    pool = make_pool(capacity_bytes=sum(sizes.values()))
    pool.use("image")
    pool.use("audio")
    assert sorted(pool.encoders.loaded) == ["audio", "image"]
    assert pool.features.capacity_bytes == 0


def test_who_finds_no_room_beside_a_busy_encoder_waits_and_goes_on(make_pool, threads, sizes):
    pool = make_pool(capacity_bytes=max(sizes.values()))
    with pool.encoders.use("image"), pool.encoders.use("image"):
        other = threads.submit(pool.use, "audio")
        eventually(lambda: waiters(pool) == 1)
        pool.encoders.check_integrity()
        assert pool.encoders.loaded == ("image",)
        assert not other.done()
    other.result(SECONDS)
    assert pool.encoders.loaded == ("audio",)


def test_what_never_fits_is_refused_with_both_sizes(make_pool, sizes):
    small, large = sorted(sizes, key=lambda name: sizes[name])
    pool = make_pool(capacity_bytes=sizes[large] - 1)
    with pytest.raises(UnsupportedError) as raised:
        pool.use(large)
    assert f"{sizes[large]:,}" in str(raised.value)
    assert f"{sizes[large] - 1:,}" in str(raised.value)
    assert "--memory" in str(raised.value)
    pool.use(small)


def test_what_never_fits_beside_the_preloaded_is_refused_not_kept_waiting(make_pool, sizes):
    pool = make_pool(preload=("image",), capacity_bytes=sum(sizes.values()) - 1)
    pool.encoders.preload()
    with pytest.raises(UnsupportedError, match=f"{sizes['audio']:,} bytes.*{sizes['audio'] - 1:,} beside"):
        pool.use("audio")
    assert pool.encoders.loaded == ("image",)
    pool.use("image")


def test_preloaded_encoders_that_do_not_fit_are_refused_at_the_start(make_pool, sizes):
    with pytest.raises(ConfigError, match=f"{sum(sizes.values()):,} bytes"):
        make_pool(preload=("image", "audio"), capacity_bytes=sum(sizes.values()) - 1)


class Budget:
    """Looks at what really is in memory whenever an encoder is about to be loaded."""

    def __init__(self, pool: Pool, sizes: dict[str, int]) -> None:
        self._pool, self._sizes = pool, sizes
        self._alive: list[tuple[str, weakref.ref]] = []
        self._promised: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, spec, dtype=None, device="cpu"):
        name = spec.path.name
        with self._lock:
            self._promised.append(name)
            self._check()
        try:
            encoder = self._pool.loads(spec, dtype, device)
            with self._lock:
                self._alive.append((name, weakref.ref(encoder.module)))
            return encoder
        finally:
            with self._lock:
                self._promised.remove(name)

    def _check(self) -> None:
        capacity = self._pool.encoders.options.capacity_bytes
        names = [*self._promised, *(name for name, module in self._alive if module() is not None)]
        used = sum(self._sizes[name] for name in names) + self._pool.features.used_bytes
        assert capacity is None or used <= capacity, f"{used} bytes of {capacity}: {names}"


class WantedError(OkavangoError):
    """A failure that the test wanted."""


def act(pool: Pool, rng: random.Random) -> None:
    """One of the threads: anything, in any order."""
    for _ in range(25):
        what = rng.choice(["use", "use", "use", "fail", "put", "idle"])
        if what == "fail":
            pool.loads.failures.append(WantedError("no"))
        elif what == "use":
            with suppress(WantedError):
                use_for_a_while(pool, rng)
        elif what == "put":
            put(pool, str(rng.random()), rng.choice([400, 4000, 40_000]))
        else:
            pool.clock.now += rng.random() * 4
            pool.encoders.unload_idle()
        pool.encoders.check_integrity()


def use_for_a_while(pool: Pool, rng: random.Random) -> None:
    modality = rng.choice(["image", "audio"])
    with pool.encoders.use(modality) as encoder:
        assert encoder.spec.path.name == modality
        del encoder
        pool.encoders.check_integrity()
        time.sleep(rng.choice([0, 0.001]))
        assert modality in pool.encoders.loaded, "it went while it was in use"


@pytest.mark.parametrize("seed", range(16))
def test_whatever_several_threads_do_the_budget_holds(make_pool, threads, sizes, seed, monkeypatch):
    rng = random.Random(seed)
    both = sum(sizes.values())
    capacity = [max(sizes.values()), both - 1, both + 50_000, None][seed % 4]
    preload = ("image",) if capacity == both + 50_000 and seed % 8 > 3 else ()
    pool = make_pool(
        rng.choice([0, 10_000, 1 << 20]), capacity_bytes=capacity, idle_seconds=3.0, preload=preload
    )
    monkeypatch.setattr(module, "load_encoder", Budget(pool, sizes))
    pool.encoders.preload()
    users = [threads.submit(act, pool, random.Random(rng.random())) for _ in range(6)]
    for user in users:
        user.result(SECONDS)
    pool.loads.failures.clear()
    pool.use("image")
    pool.use("audio")


def test_text_alone_loads_no_encoder_and_a_picture_only_its_own(make_harness, both, tiny_bundles):
    metrics = PrometheusMetrics()
    harness = make_harness(both, tiny_bundles, metrics=metrics)
    harness.tokens([harness.request("only words"), harness.request("and more of them")])
    assert harness.engine.stats().encoders_loaded == ()
    assert 'okavango_encoder_loaded{modality="image"} 0.0' in metrics.render().decode()
    harness.tokens([harness.request("what is this?", pictures=[picture_bytes(1)])])
    assert harness.engine.stats().encoders_loaded == ("image",)
    assert 'okavango_encoder_loaded{modality="image"} 1.0' in metrics.render().decode()
    harness.engine.stop()
    assert harness.engine.stats().encoders_loaded == ()


def test_an_engine_loads_at_its_start_what_it_is_told_to(make_harness, both, tiny_bundles):
    harness = make_harness(both, tiny_bundles, preload=("audio",))
    assert harness.engine.stats().encoders_loaded == ("audio",)


def test_a_picture_for_an_engine_that_sees_none_is_refused_and_text_goes_on(make_harness):
    harness = make_harness(disabled=("image",))
    seeing, reading = harness.run(
        [harness.request("what is this?", pictures=[picture_bytes(1)]), harness.request("and in words?")]
    )
    assert isinstance(seeing[-1].error, UnsupportedError)
    assert "image is switched off" in str(seeing[-1].error)
    assert reading[-1].finish is FinishReason.LENGTH
    assert harness.engine.stats().encoders_loaded == ()


def test_memory_that_keys_and_values_use_up_is_refused_by_name(make_harness):
    with pytest.raises(ConfigError, match=r"memory_bytes: 1,000,000 bytes .* --kv-memory"):
        make_harness(memory_bytes=1_000_000, host_cache_bytes=0)


def test_one_budget_covers_keys_values_adapters_and_encoders(make_harness, tiny_base):
    need = weights_bytes(tiny_base.encoders["image"].path)
    fixed = {"kv_bytes": 1 << 20, "host_cache_bytes": 1 << 20, "parking_bytes": 1 << 20}
    plain = make_harness(**fixed).engine.core.runner
    taken = plain.num_blocks * plain.block_bytes + (2 << 20)
    short = make_harness(**fixed, memory_bytes=taken + need - 1)
    (events,) = short.run([short.request("what is this?", pictures=[picture_bytes(1)])])
    assert isinstance(events[-1].error, UnsupportedError)
    assert f"takes {need:,} bytes, and media have {need - 1:,}" in str(events[-1].error)
    enough = make_harness(**fixed, memory_bytes=taken + need)
    enough.tokens([enough.request("what is this?", pictures=[picture_bytes(1)])])
    enough.engine.media.encoders.check_integrity()
    assert enough.engine.stats().encoders_loaded == ("image",)
