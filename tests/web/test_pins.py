"""`--pin`: names that are followed through the catalog of a running server."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from server_fixtures import RunningServer, Site, user, wait_until
from tiny_fixtures import Bundles

from okavango.platform.catalog.store import Catalog, open_catalog
from okavango.platform.errors import ConfigError, NotReadyError
from okavango.serving.types import AdapterRef
from okavango.web.pins import Pins

Make = Callable[..., RunningServer]


@pytest.fixture
def catalog(site: Site) -> Catalog:
    return open_catalog(site.settings)


def ready(site: Site, catalog: Catalog, name: str, bundle: str, bundles: Bundles) -> str:
    """A version that some server has found ready; its digest."""
    version = site.publish(name, bundles.folders[bundle])
    catalog.set_version_state(name, version.version, "ready", verification={"probes": 1})
    return version.digest


def slots(server: RunningServer) -> set[str]:
    return set(server.services.engine.stats().slots)


def test_pins_are_there_before_any_request_and_follow_their_alias(
    make_server: Make, site: Site, catalog: Catalog, tiny_bundles: Bundles
) -> None:
    first = ready(site, catalog, "emoji", "r4", tiny_bundles)
    words = ready(site, catalog, "words", "r16", tiny_bundles)
    catalog.promote("emoji", 1, "production")
    server = make_server(pins=("emoji@production", "words@1"), engine={"slots": 3})
    wait_until(lambda: slots(server) == {first, words})
    second = ready(site, catalog, "emoji", "r8", tiny_bundles)
    catalog.promote("emoji", 2, "production")
    wait_until(lambda: slots(server) == {first, second, words})
    assert server.services.engine.core.scheduler.slots.pinned == {second, words}


def test_a_version_has_its_pin_once_it_is_verified(
    make_server: Make, site: Site, tiny_bundles: Bundles
) -> None:
    digest = site.publish("emoji", tiny_bundles.folders["r4"]).digest
    server = make_server(pins=("emoji@1",))
    wait_until(lambda: slots(server) == {digest})
    answer = server.client().chat.completions.create(model="emoji", messages=user("hi"), max_tokens=2)
    assert answer.okavango["adapter"] == "emoji@1"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        (("nobody",), "--pin nobody: the model 'nobody' does not exist"),
        (("tiny",), "--pin tiny: is the base"),
        (("emoji@3",), "--pin emoji@3: no such version"),
        (("emoji@1",), "--pin emoji@1: emoji@1 is refused"),
        (("a", "b", "c", "d", "d"), "--pin: 4 adapters leave none of 4 slots for others .*--slots 5"),
    ],
)
def test_what_cannot_be_pinned_ends_the_start(
    make_server: Make, site: Site, catalog: Catalog, tiny_bundles: Bundles, pins: tuple[str, ...], said: str
) -> None:
    site.publish("emoji", tiny_bundles.folders["r4"])
    catalog.set_version_state("emoji", 1, "refused", error="differs")
    with pytest.raises(ConfigError, match=said):
        make_server(pins=pins)


def test_an_adapter_over_the_rank_limit_ends_the_start(
    make_server: Make, site: Site, catalog: Catalog, tiny_bundles: Bundles
) -> None:
    ready(site, catalog, "emoji", "r16", tiny_bundles)
    with pytest.raises(ConfigError, match=r"--pin emoji: adapter emoji@1 has rank 16.*--max-rank 16"):
        make_server(pins=("emoji",), engine={"max_rank": 8})


class Shelf:
    """An engine whose adapters cannot always be had."""

    def __init__(self) -> None:
        self.pinned: set[str] = set()
        self.away: set[str] = set()
        self.calls = 0

    def pin(self, adapters) -> None:
        self.calls += 1
        found = {ref.digest for ref in adapters}
        if found & self.away:
            raise NotReadyError("the store is away")
        self.pinned = found


def test_what_cannot_be_loaded_now_is_tried_again_and_told_once(
    make_server: Make,
    site: Site,
    catalog: Catalog,
    tiny_bundles: Bundles,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = ready(site, catalog, "emoji", "r4", tiny_bundles)
    models, shelf, now = make_server().services.models, Shelf(), [0.0]
    pins = Pins(("emoji",), models, shelf, poll_seconds=0.001, clock=lambda: now[0])
    pins.begin()
    assert shelf.pinned == {first}
    second = ready(site, catalog, "emoji", "r8", tiny_bundles)
    shelf.away = {second}
    with caplog.at_level(logging.WARNING, "okavango.web.pins"):
        pins.start()
        for calls in range(2, 5):
            wait_until(lambda calls=calls: shelf.calls == calls)
            now[0] += 30
    assert shelf.pinned == {first}
    assert [record.message for record in caplog.records] == [
        "--pin emoji stays where it is: the store is away"
    ]
    shelf.away = set()
    wait_until(lambda: now.__setitem__(0, now[0] + 30) or shelf.pinned == {second})
    pins.stop()


def test_the_engine_is_told_of_one_adapter_under_two_names_once(
    make_server: Make, site: Site, catalog: Catalog, tiny_bundles: Bundles
) -> None:
    digest = ready(site, catalog, "emoji", "r4", tiny_bundles)
    told: list[list[AdapterRef]] = []

    class Listener:
        def pin(self, adapters) -> None:
            told.append(list(adapters))

    Pins(("emoji", "emoji@1"), make_server().services.models, Listener()).begin()
    assert [[ref.digest for ref in refs] for refs in told] == [[digest]]
