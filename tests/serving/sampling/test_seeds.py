from __future__ import annotations

from okavango.serving.sampling.seeds import derive_seed, make_rng
from okavango.serving.types import SamplingParams


def test_samples_of_one_request_have_seeds_of_their_own():
    seeds = [derive_seed(seed, index) for seed in (0, 1, 2, -5, 2**63) for index in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert derive_seed(7, 0) == 7
    assert derive_seed(7, 3) == derive_seed(7, 3) >= 0


def test_no_seed_stays_none():
    assert derive_seed(None, 3) is None


def test_every_seed_makes_a_generator():
    for seed in (0, -1, 2**64):
        assert make_rng(SamplingParams(seed=seed)) is not None
    assert make_rng(SamplingParams(temperature=0)) is None
