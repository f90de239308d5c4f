"""Workloads are the same for the same seed, and have the statistics that they claim."""

from __future__ import annotations

import pytest
from workload import Prompts, poisson, spread


def test_a_prompt_depends_on_its_seed_and_number_alone() -> None:
    prompts = Prompts("s", 20)
    assert prompts.ids(3, 500) == Prompts("s", 20).ids(3, 500)
    assert len({tuple(prompts.ids(i, 500)) for i in range(5)}) == 5
    assert prompts.ids(3, 500) != Prompts("t", 20).ids(3, 500)
    assert len(prompts.text(3).split()) == 20


def test_ids_leave_special_tokens_out_and_fit_small_vocabularies() -> None:
    drawn = Prompts("s", 1000).ids(0, 120)
    assert (min(drawn), max(drawn)) == (60, 119)
    assert min(Prompts("s", 1000).ids(0, 500)) >= 100


def test_prompts_share_their_beginning_and_nothing_else() -> None:
    one, other = (Prompts("s", 40, shared=30).ids(i, 50_000) for i in (0, 1))
    assert one[:30] == other[:30]
    assert one[30:] != other[30:]
    assert len(Prompts("s", 10, shared=30).ids(0, 500)) == 10


def test_arrivals_come_at_the_rate() -> None:
    arrivals = poisson("s", 4000, rate=8.0)
    assert arrivals == sorted(arrivals) == poisson("s", 4000, rate=8.0)
    assert arrivals[-1] == pytest.approx(500, rel=0.1)


def test_traffic_is_spread_evenly_or_skewed() -> None:
    assert spread("s", 5, ["a", "b"]) == ["a", "b", "a", "b", "a"]
    assert len(set(spread("s", 50, range(1000), skew=0.0))) > 40
    skewed = spread("s", 6000, range(3), skew=1.0)
    shares = [skewed.count(each) / len(skewed) for each in range(3)]
    assert shares == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.03)
