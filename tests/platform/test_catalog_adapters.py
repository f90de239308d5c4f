from __future__ import annotations

import math
from typing import Any

import pytest

from okavango.platform.catalog.store import Catalog
from okavango.platform.errors import ConflictError, InputError, NotFoundError, NotReadyError

VERIFIED = {"max_difference": 1e-5}


def test_a_version_keeps_what_it_was_registered_with(catalog: Catalog, register: Any) -> None:
    job = catalog.create_job("train", "emoji", {})
    version = register("emoji", "v1", lineage={"data": "t1"}, principal="ana", job_id=job.id)
    assert (version.adapter, version.version, version.digest, version.ref) == ("emoji", 1, "v1", "emoji@1")
    assert (version.base, version.base_digest, version.state) == ("starter", "base-1", "registered")
    assert (version.modalities, version.lineage, version.metrics) == (
        ("image",),
        {"data": "t1"},
        {"chrf": 21.5},
    )
    assert (version.principal, version.job_id, version.verification) == ("ana", job.id, None)
    assert catalog.resolve("emoji@1") == version


def test_versions_count_up_per_adapter(register: Any) -> None:
    assert [register(*each).ref for each in (("a", "x"), ("b", "x"), ("a", "y"), ("a", "z"))] == [
        "a@1",
        "b@1",
        "a@2",
        "a@3",
    ]


def test_the_same_bundle_again_is_the_same_version(catalog: Catalog, clock: Any, register: Any) -> None:
    first = register("emoji", "v1")
    clock.advance(60)
    assert register("emoji", "v1", metrics={"chrf": 1.0}) == first
    assert len(catalog.versions()) == 1


def test_an_adapter_stays_with_its_base(catalog: Catalog, register: Any) -> None:
    register("emoji", "v1")
    catalog.put_base("other", "base-o", {}, "/other")
    with pytest.raises(ConflictError, match="adapter 'emoji': belongs to base 'starter', not 'other'"):
        register("emoji", "v2", base="other")
    assert len(catalog.get_adapter("emoji").versions) == 1


@pytest.mark.parametrize("name", ["Emoji", "emoji@1", "", "starter"])
def test_names_that_no_adapter_may_have(catalog: Catalog, register: Any, name: str) -> None:
    with pytest.raises(InputError):
        register(name, "v1")
    assert catalog.list_adapters() == ()


def test_registering_needs_a_known_base_and_job(catalog: Catalog, register: Any) -> None:
    with pytest.raises(NotFoundError, match="did you mean starter"):
        register("emoji", "v1", base="start")
    with pytest.raises(NotFoundError, match="job-0"):
        register("emoji", "v1", job_id="job-0")
    assert catalog.list_adapters() == ()  # a refused registration leaves no adapter behind


def test_what_is_not_json_is_refused_by_name(register: Any) -> None:
    with pytest.raises(InputError, match=r"^metrics: "):
        register("emoji", "v1", metrics={"chrf": math.nan})
    with pytest.raises(InputError, match=r"^lineage: "):
        register("emoji", "v1", lineage={"path": object()})


def test_states_of_a_version(catalog: Catalog, register: Any) -> None:
    register("emoji", "v1")
    ready = catalog.set_version_state("emoji", 1, "ready", verification=VERIFIED)
    assert (ready.state, ready.verification) == ("ready", VERIFIED)
    again = catalog.set_version_state("emoji", 1, "ready")
    assert again.verification == VERIFIED
    with pytest.raises(ConflictError, match="emoji@1: is ready and cannot become refused"):
        catalog.set_version_state("emoji", 1, "refused")
    assert catalog.set_version_state("emoji", 1, "retired").verification == VERIFIED


def test_a_refused_version_says_why(catalog: Catalog, register: Any) -> None:
    register("emoji", "v1")
    refused = catalog.set_version_state("emoji", 1, "refused", error="two tensors did not bind")
    assert refused.error == "two tensors did not bind"
    with pytest.raises(ConflictError, match="two tensors did not bind"):
        catalog.promote("emoji", 1)


def test_versions_by_state(catalog: Catalog, clock: Any, register: Any) -> None:
    for adapter, digest in (("b", "x"), ("a", "x"), ("b", "y")):
        register(adapter, digest)
        clock.advance(1)
    catalog.set_version_state("b", 1, "bound")
    assert [version.ref for version in catalog.versions()] == ["b@1", "a@1", "b@2"]
    assert [version.ref for version in catalog.versions("registered")] == ["a@1", "b@2"]
    assert [version.ref for version in catalog.versions("bound")] == ["b@1"]


def test_a_bare_name_means_the_best_there_is(catalog: Catalog, register: Any) -> None:
    register("emoji", "v1")
    register("emoji", "v2")
    assert catalog.resolve("emoji").version == 2  # the newest registered
    catalog.set_version_state("emoji", 1, "bound")
    assert catalog.resolve("emoji").version == 1  # the newest that may take traffic
    catalog.set_version_state("emoji", 2, "ready")
    assert catalog.resolve("emoji").version == 2
    catalog.promote("emoji", 1)
    assert catalog.resolve("emoji").version == 1  # what prod names
    assert catalog.get_adapter("emoji").current == catalog.resolve("emoji")


def test_a_name_without_a_usable_version(catalog: Catalog, register: Any) -> None:
    register("emoji", "v1", state="refused")
    with pytest.raises(NotFoundError, match="okavango adapters show emoji"):
        catalog.resolve("emoji")
    assert catalog.get_adapter("emoji").current is None
    assert catalog.resolve("emoji@1").state == "refused"


def test_what_is_not_there_names_what_is_near(catalog: Catalog, register: Any) -> None:
    with pytest.raises(NotFoundError, match="there is no adapter yet"):
        catalog.resolve("emoji")
    register("emoji", "v1", state="ready")
    register("emoji", "v2")
    with pytest.raises(NotFoundError, match=r"adapter 'emojis': no such adapter .did you mean emoji"):
        catalog.resolve("emojis")
    with pytest.raises(NotFoundError, match=r"emoji@3: no such version .versions: 1, 2"):
        catalog.resolve("emoji@3")
    with pytest.raises(NotFoundError, match="okavango adapters promote"):
        catalog.resolve("emoji@prod")
    catalog.promote("emoji", 1)
    with pytest.raises(NotFoundError, match="did you mean prod"):
        catalog.resolve("emoji@prd")


@pytest.mark.parametrize("ref", ["emo\0ji", "emoji\ud800", "emoji@pr\0od", "emoji@\udfff", "x" * 100_000])
def test_any_text_is_just_not_there(catalog: Catalog, register: Any, ref: str) -> None:
    """What a request may carry reaches the database as a key."""
    register("emoji", "v1")
    with pytest.raises(NotFoundError):
        catalog.resolve(ref)


def test_version_numbers_without_bound_are_refused(catalog: Catalog, register: Any) -> None:
    register("emoji", "v1")
    with pytest.raises(NotFoundError, match="versions: 1"):
        catalog.resolve("emoji@999999999")
    for digits in (10, 5000):
        with pytest.raises(InputError, match="at most 9 digits"):
            catalog.resolve("emoji@" + "9" * digits)


def test_an_alias_moves_and_remembers(catalog: Catalog, clock: Any, register: Any) -> None:
    for digest in ("v1", "v2", "v3"):
        register("emoji", digest, state="ready")
    first = catalog.promote("emoji", 1)
    assert (first.name, first.version, first.previous) == ("prod", 1, None)
    clock.advance(60)
    second = catalog.promote("emoji", 3)
    assert (second.version, second.previous) == (3, 1)
    clock.advance(60)
    assert catalog.promote("emoji", 3) == second  # no move, so the way back is kept
    assert catalog.promote("emoji", 1).previous == 3
    assert catalog.resolve("emoji@prod").version == 1


def test_aliases_of_an_adapter(catalog: Catalog, register: Any) -> None:
    register("emoji", "v1", state="ready")
    register("tickets", "v1", state="ready")
    catalog.promote("emoji", 1, "prod")
    catalog.promote("emoji", 1, "canary")
    assert [alias.name for alias in catalog.aliases("emoji")] == ["canary", "prod"]
    assert catalog.aliases("tickets") == ()
    with pytest.raises(NotFoundError):
        catalog.aliases("nobody")


def test_only_verified_versions_take_traffic(catalog: Catalog, register: Any) -> None:
    register("emoji", "v1")
    with pytest.raises(NotReadyError, match="okavango serve"):
        catalog.promote("emoji", 1)
    register("emoji", "v2", state="ready")
    catalog.set_version_state("emoji", 2, "retired")
    with pytest.raises(ConflictError, match="is retired"):
        catalog.promote("emoji", 2)
    with pytest.raises(NotFoundError, match="emoji@3"):
        catalog.promote("emoji", 3)
    assert catalog.aliases("emoji") == ()


@pytest.mark.parametrize("alias", ["3", "", "Prod", "a@b"])
def test_what_no_alias_may_be_called(catalog: Catalog, register: Any, alias: str) -> None:
    register("emoji", "v1", state="ready")
    with pytest.raises(InputError, match="alias"):
        catalog.promote("emoji", 1, alias)


def test_a_version_with_a_name_does_not_retire(catalog: Catalog, register: Any) -> None:
    register("emoji", "v1", state="ready")
    register("emoji", "v2", state="bound")
    catalog.promote("emoji", 1)
    with pytest.raises(ConflictError, match="is what prod names"):
        catalog.set_version_state("emoji", 1, "retired")
    catalog.promote("emoji", 2)
    assert catalog.set_version_state("emoji", 1, "retired").state == "retired"


def test_adapters_come_with_versions_and_aliases(catalog: Catalog, register: Any) -> None:
    register("tickets", "v1")
    register("emoji", "v1", state="ready")
    register("emoji", "v2")
    catalog.promote("emoji", 1)
    emoji, tickets = catalog.list_adapters()
    assert [version.version for version in emoji.versions] == [1, 2]
    assert [alias.name for alias in emoji.aliases] == ["prod"]
    assert (tickets.name, tickets.aliases) == ("tickets", ())
    assert catalog.get_adapter("emoji") == emoji
