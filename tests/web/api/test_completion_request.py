"""Fields of a completions request: honoured, or refused with the field named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from okavango.platform.errors import InputError
from okavango.serving.types import SamplingParams
from okavango.web.api.completion_request import Completion, parse_completion


def parse(**fields: Any) -> Completion:
    return parse_completion(json.dumps({"model": "tiny", "prompt": "hello", **fields}).encode())


def test_what_is_left_out_is_as_openai_has_it() -> None:
    asked = parse()
    assert asked.params == SamplingParams(16)
    assert (asked.prompts, asked.n, asked.best_of, asked.echo) == (("hello",), 1, 1, False)
    assert (asked.stream, asked.reports, asked.add_special_tokens) == (False, False, True)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_a_prompt_has_four_forms(prompt: Any, prompts: Any) -> None:
    assert parse(prompt=prompt).prompts == prompts


def test_what_load_generators_send_is_fine() -> None:
    """vLLM's, SGLang's and GuideLLM's, each with the fields that it adds by itself."""
    parse(temperature=0.0, repetition_penalty=1.0, max_tokens=5, logprobs=None, stream=True, ignore_eos=True)
    parse(temperature=0.0, best_of=1, max_tokens=5, stream=True, ignore_eos=False, use_beam_search=False)
    options = {"include_usage": True, "continuous_usage_stats": True}
    parse(max_tokens=5, min_tokens=5, stop=None, ignore_eos=True, stream=True, stream_options=options)


def test_the_best_is_found_by_log_probabilities_that_nobody_asked_for() -> None:
    asked = parse(n=2, best_of=4)
    assert (asked.best_of, asked.n, asked.params.logprobs, asked.reports) == (4, 2, 0, False)
    assert parse(n=2, best_of=2).params.logprobs is None
    assert parse(logprobs=3).reports


@pytest.mark.parametrize(
    ("fields", "where", "said"),
    [
        ({"prompt": []}, "prompt", "is empty"),
        ({"prompt": [1, "a"]}, "prompt[1]", "valid integer"),
        ({"prompt": ["a", 1]}, "prompt[1]", "valid string"),
        ({"prompt": [[1], ["a"]]}, "prompt[1][0]", "valid integer"),
        ({"prompt": ["a"] * 129}, "prompt", "over the limit of 128"),
        ({"prompt": ["a"] * 3, "n": 50}, "prompt", "3 prompts of 50 answers each"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"n": 3, "best_of": 2}, "best_of", "at least n, which is 3"),
        ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"echo": True, "logprobs": 1}, "logprobs", "not supported with echo"),
        ({"logprobs": 21}, "logprobs", "between 0 and 20"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"messages": []}, "messages", "no such field"),
        ({"promt": "a"}, "promt", "did you mean prompt"),
    ],
)
def test_a_fault_names_its_field(fields: dict[str, Any], where: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        parse(**fields)
    assert caught.value.where == where
