"""From registered to ready, bound or refused, by the real gate over a real catalog."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from server_fixtures import Site, wait_until
from tiny_fixtures import Bundles

from okavango.modalities.probes import read_probes, write_probes
from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tiny_bundle import write_tiny_bundle
from okavango.platform.artifacts import ArtifactStore
from okavango.platform.bundle import read_manifest, seal
from okavango.platform.catalog.records import VersionRecord
from okavango.platform.catalog.store import Catalog, open_catalog
from okavango.platform.errors import NotReadyError
from okavango.serving.adapters.gate import ParityGate, Verdict
from okavango.web.verifier import Verifier


class Source:
    """The artifact store, which can be away; it notes what was fetched."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self.fetched: list[str] = []
        self.away = False

    def fetch(self, digest: str) -> Path:
        self.fetched.append(digest)
        if self.away:
            raise NotReadyError("the artifact store cannot be used: it is away")
        return self._store.fetch(digest)


@dataclass
class Bench:
    site: Site
    catalog: Catalog
    source: Source
    gate: Any
    verifier: Verifier

    def state(self, version: VersionRecord) -> VersionRecord:
        return self.catalog.resolve(version.ref)

    def settled(self, version: VersionRecord) -> VersionRecord:
        """The version once it is not registered any more."""
        wait_until(lambda: self.state(version).state != "registered")
        return self.state(version)


@pytest.fixture
def make_bench(site: Site) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(gate: Any = None) -> Bench:
        catalog = open_catalog(site.settings)
        source = Source(ArtifactStore(site.settings.artifacts, site.settings.cache / "artifacts"))
        gate = gate or ParityGate(site.base)
        verifier = Verifier(site.base, catalog, source, gate, poll_seconds=0.02)
        made.append(Bench(site, catalog, source, gate, verifier))
        return made[-1]

    yield make
    for bench in made:
        bench.verifier.stop()
        bench.catalog.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


def changed(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle, to be changed and sealed anew."""
    return Path(shutil.copytree(bundle, folder))


def reseal(folder: Path) -> Path:
    seal(folder, read_manifest(folder))
    return folder


def test_probes_that_serving_reproduces_make_a_version_ready(bench: Bench, tiny_bundles: Bundles) -> None:
    version = bench.site.publish("emoji", tiny_bundles.folders["r4"])
    bench.verifier.start()
    found = bench.settled(version)
    assert (found.state, found.error) == ("ready", None)
    assert found.verification is not None
    assert found.verification["probes"] == 2
    assert found.verification["float32"] < 1e-3


def test_a_version_that_comes_later_is_found(bench: Bench, tiny_bundles: Bundles) -> None:
    bench.verifier.start()
    version = bench.site.publish("emoji", tiny_bundles.folders["r8"])
    assert bench.settled(version).state == "ready"


def test_a_bundle_without_probes_is_bound(bench: Bench, tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle", bench.site.base, rank=4, probes=False)
    version = bench.site.publish("emoji", tmp_path / "bundle")
    bench.verifier.start()
    assert bench.settled(version).state == "bound"


def test_probes_that_serving_does_not_reproduce_refuse_a_version(
    bench: Bench, tiny_bundles: Bundles, tmp_path: Path
) -> None:
    folder = changed(tiny_bundles.folders["r4"], tmp_path / "bundle")
    write_probes(folder, [replace(probe, logits=probe.logits * 1.1) for probe in read_probes(folder)])
    version = bench.site.publish("emoji", reseal(folder))
    bench.verifier.start()
    found = bench.settled(version)
    assert found.state == "refused"
    assert "serving differs from training by" in str(found.error)


def test_tensors_that_do_not_bind_refuse_a_version(
    bench: Bench, tiny_bundles: Bundles, tmp_path: Path
) -> None:
    folder = changed(tiny_bundles.folders["r4"], tmp_path / "bundle")
    config = folder / "decoder" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 5'))
    version = bench.site.publish("emoji", reseal(folder))
    bench.verifier.start()
    found = bench.settled(version)
    assert (found.state, "expected A" in str(found.error)) == ("refused", True)


def test_bytes_that_changed_in_the_store_refuse_a_version(bench: Bench, tiny_bundles: Bundles) -> None:
    version = bench.site.publish("emoji", tiny_bundles.folders["r4"])
    weights = Path(bench.site.settings.artifacts) / version.digest / "decoder" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    bench.verifier.start()
    found = bench.settled(version)
    assert (found.state, "differs from the digest" in str(found.error)) == ("refused", True)


def test_versions_of_another_base_are_left_alone(bench: Bench, tiny_bundles: Bundles, tmp_path: Path) -> None:
    other = write_tiny_base(tmp_path / "other", name="other", seed=1)
    write_tiny_bundle(tmp_path / "bundle", other, rank=4)
    foreign = replace(bench.site, base=other).publish("foreign", tmp_path / "bundle")
    ours = bench.site.publish("emoji", tiny_bundles.folders["r4"])
    bench.verifier.start()
    bench.settled(ours)
    assert bench.state(foreign).state == "registered"
    assert foreign.digest not in bench.source.fetched


def test_a_store_that_is_away_refuses_nothing(bench: Bench, tiny_bundles: Bundles) -> None:
    version = bench.site.publish("emoji", tiny_bundles.folders["r4"])
    bench.source.away = True
    bench.verifier.start()
    wait_until(lambda: len(bench.source.fetched) > 0)
    with pytest.raises(NotReadyError, match="it is away"):
        asyncio.run(bench.verifier.verified(version, timeout=10))
    assert bench.state(version).state == "registered"
    bench.source.away = False
    assert asyncio.run(bench.verifier.verified(version, timeout=10)).state == "ready"


class SlowGate:
    """Passes every bundle when it is let."""

    def __init__(self) -> None:
        self.checked: list[str] = []
        self.open = False
        self.broken = False

    def check(self, folder: Path) -> Verdict:
        self.checked.append(folder.name)
        wait_until(lambda: self.open)
        if self.broken:
            raise RuntimeError("out of memory, or so")
        return Verdict("bound", {"probes": 0})

    def close(self) -> None:
        pass


def test_a_version_that_a_request_waits_for_goes_first(
    make_bench: Callable[..., Bench], tiny_bundles: Bundles
) -> None:
    gate = SlowGate()
    bench = make_bench(gate)
    versions = [bench.site.publish(name, folder) for name, folder in tiny_bundles.folders.items()]
    bench.verifier.start()
    wait_until(lambda: len(gate.checked) == 1)

    async def wait_for_the_last() -> str:
        waiting = asyncio.create_task(bench.verifier.verified(versions[2], timeout=10))
        await asyncio.sleep(0.05)
        gate.open = True
        return (await waiting).state

    assert asyncio.run(wait_for_the_last()) == "bound"
    bench.settled(versions[1])
    assert gate.checked == [versions[0].digest, versions[2].digest, versions[1].digest]


def test_waiting_is_bounded_and_ends_with_the_server(
    make_bench: Callable[..., Bench], tiny_bundles: Bundles
) -> None:
    gate = SlowGate()
    bench = make_bench(gate)
    versions = [bench.site.publish(name, folder) for name, folder in tiny_bundles.folders.items()]
    bench.verifier.start()
    wait_until(lambda: len(gate.checked) == 1)
    with pytest.raises(NotReadyError, match=r"r8@1 is still being verified"):
        asyncio.run(bench.verifier.verified(versions[1], timeout=0.05))

    async def wait_and_stop() -> None:
        waiting = asyncio.create_task(bench.verifier.verified(versions[1], timeout=10))
        await asyncio.sleep(0.05)
        stopping = asyncio.create_task(asyncio.to_thread(bench.verifier.stop))
        message = ""
        while "stopping" not in message:
            with pytest.raises(NotReadyError) as caught:
                await bench.verifier.verified(versions[2], timeout=0.01)
            message = str(caught.value)
        gate.open = True
        await stopping
        await waiting

    with pytest.raises(NotReadyError, match="the server is stopping"):
        asyncio.run(wait_and_stop())
    with pytest.raises(NotReadyError, match="the server is stopping"):
        asyncio.run(bench.verifier.verified(versions[1], timeout=10))


def test_a_gate_that_breaks_refuses_nothing_and_goes_on(
    make_bench: Callable[..., Bench], tiny_bundles: Bundles
) -> None:
    gate = SlowGate()
    gate.open = gate.broken = True
    bench = make_bench(gate)
    version = bench.site.publish("emoji", tiny_bundles.folders["r4"])
    bench.verifier.start()
    wait_until(lambda: len(gate.checked) > 0)
    with pytest.raises(NotReadyError, match="see the server's log"):
        asyncio.run(bench.verifier.verified(version, timeout=10))
    assert bench.state(version).state == "registered"
    gate.broken = False
    assert asyncio.run(bench.verifier.verified(version, timeout=10)).state == "bound"


def test_what_another_server_found_meanwhile_holds(
    make_bench: Callable[..., Bench], tiny_bundles: Bundles
) -> None:
    gate = SlowGate()
    bench = make_bench(gate)
    version = bench.site.publish("emoji", tiny_bundles.folders["r4"])
    bench.verifier.start()
    wait_until(lambda: len(gate.checked) == 1)
    bench.catalog.set_version_state("emoji", 1, "refused", error="by another server")
    gate.open = True
    found = asyncio.run(bench.verifier.verified(version, timeout=10))
    assert (found.state, found.error) == ("refused", "by another server")
