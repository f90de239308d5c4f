"""What requests ask of the sampler, through the engine."""

from __future__ import annotations

import pytest

from okavango.platform.errors import InputError
from okavango.serving.types import FinishReason, SamplingParams

ADAPTERS = [None, "r4", "r8", "r16"]


def text_of(events) -> str:
    return "".join(event.text for event in events)


def test_every_parameter_in_one_batch_gives_what_it_gives_alone(harness):
    asked = [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 0.0, "presence_penalty": 2.0, "frequency_penalty": 1.0},
        {"top_p": 0.9},
        {"top_p": 0.2, "logprobs": 3},
        {"top_k": 5},
        {"min_p": 0.1, "temperature": 1.5},
        {"top_k": 40, "top_p": 0.95, "logit_bias": ((65, 4.0),), "repetition_penalty": 1.2},
    ]

    def requests() -> list:
        return [
            harness.request(
                "tell me", ADAPTERS[i % 4], params=SamplingParams(20, seed=i, ignore_eos=True, **params)
            )
            for i, params in enumerate(asked)
        ]

    alone = [harness.tokens([request])[0] for request in requests()]
    assert harness.tokens(requests()) == alone
    assert len({tuple(tokens) for tokens in alone}) == len(alone)


def test_a_bias_rules_and_a_penalty_keeps_from_repeating(harness):
    always = SamplingParams(6, 0.0, logit_bias=((70, 1000.0),), ignore_eos=True)
    never = SamplingParams(40, 0.0, repetition_penalty=1e9, ignore_eos=True)
    prompt, answer = harness.request("hi", params=always), harness.request("hello", params=never)
    tokens, varied = harness.tokens([prompt, answer])
    assert tokens == [70] * 6
    assert len(set(varied)) == len(varied)


def test_nothing_ends_an_answer_before_min_tokens(harness):
    eos = harness.engine.tokenizer.eos_token_id
    ends = SamplingParams(30, 0.0, min_tokens=8, logit_bias=((eos, 1000.0),))
    stops = SamplingParams(30, 0.0, min_tokens=8, logit_bias=((65, 1000.0),), stop=(chr(33 + 65),))
    ended, stopped = harness.run([harness.request("hi", params=each) for each in (ends, stops)])
    assert [events[-1].finish for events in (ended, stopped)] == [FinishReason.STOP] * 2
    assert ended[-1].usage.completion_tokens == 9
    assert stopped[-1].usage.completion_tokens == 8
    assert text_of(stopped) == chr(33 + 65) * 7


def test_a_bias_on_a_token_that_does_not_exist_is_the_requests_error(harness):
    [events] = harness.run([harness.request("hi", params=SamplingParams(3, logit_bias=((259, 1.0),)))])
    assert isinstance(events[-1].error, InputError)
    assert events[-1].error.where == "logit_bias"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_do_not_count_what_stands_for_a_picture(harness, temperature):
    """Placeholders are some token's id, which nobody has said."""
    from okavango.modalities.tiny_bundle import picture_bytes

    params = SamplingParams(4, temperature, seed=1, repetition_penalty=2.0, ignore_eos=True)
    request = harness.request("hi", "r4", [picture_bytes(1)], params=params)
    [span] = request.prompt.spans
    placeholder = request.prompt.tokens[span.start]
    sequence = harness.engine._preparation.prepare(request, 4)
    assert placeholder not in sequence.sampling.penalties.repeated
    assert len(harness.tokens([request])[0]) == 4
