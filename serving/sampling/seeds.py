"""Generators: every request draws from one of its own, so that nothing that shares its batch matters."""

from __future__ import annotations

import hashlib

import torch

from okavango.serving.types import SamplingParams


def make_rng(params: SamplingParams) -> torch.Generator | None:
    """The request's own generator; None for greedy. Without a seed it is drawn from the system's entropy."""
    if params.temperature == 0:
        return None
    rng = torch.Generator()
    if params.seed is None:
        rng.seed()
    else:
        rng.manual_seed(params.seed % 2**63)
    return rng


def derive_seed(seed: int | None, index: int) -> int | None:
    """The seed of sample `index` of several: the first has the request's own, None stays None.

    Neighbouring seeds of one user do not collide with each other's samples, as `seed + index` would.
    """
    if seed is None or index == 0:
        return seed
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
