"""The contract: in float32 every answer is what transformers and PEFT give for that request alone."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from okavango.modalities.tiny_bundle import picture_bytes
from okavango.serving.types import SamplingParams

ADAPTERS = [None, "r4", "r8", "r16"]
WORDS = "the quick brown fox jumps over a lazy dog and some more words that make prompts of mixed lengths"


def prompt(length: int) -> str:
    return (WORDS * (1 + length // len(WORDS)))[:length]


def test_mixed_lengths_and_ranks_equal_the_reference(harness, reference):
    requests = [
        harness.request(prompt(length), ADAPTERS[i % 4])
        for i, length in enumerate([1, 150, 7, 33, 90, 16, 64, 2, 201, 48, 5, 120])
    ]
    expected = [reference.tokens(request) for request in requests]
    assert harness.tokens(requests) == expected
    # the adapters must matter, or the comparison shows nothing
    same_text = [harness.request("tell me", adapter) for adapter in ADAPTERS]
    assert len({tuple(tokens) for tokens in harness.tokens(same_text)}) == len(ADAPTERS)


def test_pictures_equal_the_reference_each_with_its_adapters_head(harness, reference):
    requests = [
        harness.request("what is this?", adapter, [picture_bytes(seed) for seed in seeds])
        for adapter, seeds in zip(
            ADAPTERS * 2, [(1,), (1,), (2,), (1, 2), (), (3,), (3, 1), (2,)], strict=True
        )
    ]
    assert harness.tokens(requests) == [reference.tokens(request) for request in requests]


def test_a_prompt_longer_than_a_step_is_chunked_through_its_picture(make_harness, reference):
    harness = make_harness(max_step_tokens=17, max_sequences=3)
    picture = picture_bytes(5)
    requests = [harness.request(prompt(n), "r8", [picture]) for n in (3, 40, 11)]
    assert harness.tokens(requests) == [reference.tokens(request) for request in requests]


def test_alone_in_a_batch_and_after_eviction_the_same(make_harness):
    harness = make_harness(slots=1, kv_bytes=1 << 22)

    def asked() -> list:
        return [
            harness.request(prompt(20 + 9 * i), name, params=params)
            for i, name in enumerate(["r4", "r8", None, "r16", "r4"])
            for params in (
                SamplingParams(max_tokens=10, temperature=0),
                SamplingParams(max_tokens=10, temperature=0.8, top_p=0.9, seed=i),
            )
        ]

    alone = [harness.tokens([request])[0] for request in asked()]
    # one slot for three adapters: every change of adapter evicts another and loads anew
    together = harness.tokens(asked())
    assert together == alone
    assert [harness.tokens([request])[0] for request in reversed(asked())] == alone[::-1]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(1, 120), st.sampled_from(ADAPTERS), st.integers(0, 2), st.integers(1, 8)),
        min_size=1,
        max_size=10,
    )
)
def test_random_mixes_equal_the_reference(make_harness, reference, mix):
    harness = make_harness(slots=2, max_step_tokens=40, max_sequences=5, kv_bytes=1 << 22)
    requests = [
        harness.request(
            prompt(length),
            adapter,
            [picture_bytes(pictures)] * pictures,
            SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True),
        )
        for length, adapter, pictures, tokens in mix
    ]
    assert harness.tokens(requests) == [reference.tokens(request) for request in requests]


def test_bfloat16_logits_stay_near_float32(make_harness, tiny_base, tiny_bundles):
    """Tokens may differ where the best two are close; logits stay within the gate's stated bound."""
    from okavango.modalities.precision import PARITY_BOUNDS
    from okavango.serving.adapters.gate import ParityGate

    verdict = ParityGate(tiny_base, torch.bfloat16).check(tiny_bundles.folders["r16"])
    assert 0 < verdict.verification["bfloat16"] < PARITY_BOUNDS[torch.bfloat16]
