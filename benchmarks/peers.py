"""Peers that come with our dependencies: transformers' generate with PEFT, and its continuous batching."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from ours import Answer, Bundles
from peft import PeftModel
from timing import Trace
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from okavango.modalities.base import Base, load_decoder

PAGE = 256
# Fewer prompt tokens a step make its continuous batching slower.
LEAST_STEP_TOKENS = 2048


class Generate:
    """`generate` over one batch. One adapter is active in PEFT as usual, without the cost of choosing;
    several are mixed by PEFT's adapter_names, one name a row."""

    name = "generate + PEFT"

    def __init__(self, base: Base, bundles: Bundles, dtype: torch.dtype) -> None:
        first, *others = [str(bundles.fetch(ref.digest) / "decoder") for ref in bundles.refs]
        self.decoder = load_decoder(base, dtype)
        self.model = PeftModel.from_pretrained(load_decoder(base, dtype), first, adapter_name="a0")
        for number, folder in enumerate(others, start=1):
            self.model.load_adapter(folder, adapter_name=f"a{number}")
        self.model.to(dtype).eval()

    def can(self, adapters: int) -> bool:
        return True

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]], adapters: int, length: int) -> list[Answer]:
        """Answers of `length` tokens. Only a single prompt's is timed token by token."""
        ids = torch.tensor(prompts)
        clock = _Clock()
        options: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        options |= {"min_new_tokens": length, "max_new_tokens": length, "do_sample": False}
        if adapters > 1:
            options["adapter_names"] = [f"a{number % adapters}" for number in range(len(ids))]
        if len(ids) == 1:
            options["streamer"] = clock
        sent = time.perf_counter()
        found = (self.model if adapters else self.decoder).generate(**options)
        ended = time.perf_counter()
        trace = Trace("", sent, tuple(clock.times), ended, length, length, ids.shape[1])
        return [Answer(trace, tuple(row)) for row in found[:, ids.shape[1] :].tolist()]


class _Clock(BaseStreamer):
    """When tokens came. `generate` puts the prompt first."""

    def __init__(self) -> None:
        self._puts: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self._puts.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def times(self) -> list[float]:
        return self._puts[1:]


class Continuous:
    """`generate_batch`: continuous batching over paged keys and values, on the bare base."""

    name = "generate_batch"

    def __init__(self, base: Base, dtype: torch.dtype, requests: int, prompt: int, answer: int) -> None:
        self.decoder: Any = load_decoder(base, dtype)
        self._config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=2 * requests * -(-(prompt + answer) // PAGE),
            max_batch_tokens=max(LEAST_STEP_TOKENS, requests * prompt),
            max_requests_per_batch=requests,
        )
        # It says at each call that it was sized for another one.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)

    def can(self, adapters: int) -> bool:
        return adapters == 0

    def run(self, prompts: Sequence[Sequence[int]], adapters: int, length: int) -> list[Answer]:
        sent = time.perf_counter()
        found = self.decoder.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=length, eos_token_id=-1),
            continuous_batching_config=self._config,
            record_timestamps=True,
            persistent_manager=True,
        )
        ended = time.perf_counter()
        if len(found) != len(prompts) or any(output.error for output in found.values()):
            raise RuntimeError("transformers' continuous batching failed; its log above says why")
        return [_answer(output, sent, ended, length) for output in found.values()]

    def close(self) -> None:
        self.decoder.destroy_cached_continuous_batching_manager()


def _answer(output: Any, sent: float, ended: float, length: int) -> Answer:
    tokens = tuple(output.generated_tokens)
    return Answer(
        Trace("", sent, tuple(output.timestamps), ended, len(tokens), length, len(output.prompt_ids)), tokens
    )
