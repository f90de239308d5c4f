"""Peers on the same GPU in the same run: transformers' continuous batching, and PEFT's mixed batches."""

from __future__ import annotations

import inspect
import logging
import statistics
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from comparison import Work
from gpu_engine import RANK, Shape, common_gaps
from invented import random_decoder
from ours import Answer
from peft import LoraConfig, get_peft_model
from timing import Trace
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import ContinuousBatchingConfig

STEP_TOKENS = 4096
PAGE = 256
# transformers 5.23 has the first of these names, 5.17 the second.
_OPTIONS = inspect.signature(ContinuousBatchingConfig).parameters
PAGE_SIZE = "page_size" if "page_size" in _OPTIONS else "block_size"
COMPILED: dict[str, Any] = (
    {"default_compile_level": 2}
    if "default_compile_level" in _OPTIONS
    else {"use_default_compile_configs": True}
)
# What may make it quicker; which of them work is up to the machine.
SETTINGS: dict[str, dict[str, Any]] = {
    "graphs, compiled, steps ahead": {"use_cuda_graph": True, "use_async_batching": True, **COMPILED},
    "graphs, steps ahead": {"use_cuda_graph": True, "use_async_batching": True},
    "as it comes": {},
}
ATTENTIONS = ("flash_attention_3", "flash_attention_2", "sdpa")


def continuous(shape: Shape, batches: Iterable[int], context: int = 512, answer: int = 64) -> dict[str, Any]:
    """Median seconds a step of `generate_batch` on the bare base, by batch, in the settings that were the
    quickest there."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    decoder, attention = _decoder(shape)
    found: dict[str, Any] = {}
    for batch in batches:
        prompts = Work(batch, context - answer // 2, 1).prompts(
            f"peer{batch}", batch, decoder.config.vocab_size
        )
        tried = {}
        for name, settings in SETTINGS.items():
            try:
                tried[name] = _steps(decoder, prompts, settings, answer)
            except Exception as error:
                tried[name] = None
                print(f"generate_batch, {name}: {error!r}", flush=True)
        works = {name: seconds for name, seconds in tried.items() if seconds is not None}
        best = min(works, key=works.__getitem__, default=None)
        found[str(batch)] = {"seconds": works[best], "settings": f"{attention}, {best}"} if best else None
    return found


def mixed_peft(shape: Shape, adapters: int, context: int = 512, tokens: int = 4) -> float:
    """Median seconds a step of `generate` with PEFT's `adapter_names`, a row an adapter."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
    names = [f"a{number}" for number in range(adapters)]
    with torch.device("cuda"):
        decoder = random_decoder(shape.decoder, torch.bfloat16, "cuda", attn_implementation="sdpa")
        model: Any = get_peft_model(decoder, config, adapter_name=names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            model.add_adapter(name, config)
    model.to(torch.bfloat16).eval()
    ids = torch.tensor(Work(adapters, context, 1).prompts("peft", adapters, decoder.config.vocab_size))
    clock = _Clock()
    with torch.inference_mode():
        model.generate(
            input_ids=ids.cuda(),
            attention_mask=torch.ones_like(ids).cuda(),
            adapter_names=names,
            do_sample=False,
            min_new_tokens=tokens + 1,
            max_new_tokens=tokens + 1,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    return statistics.median(after - before for before, after in pairwise(clock.times))


class _Clock(StoppingCriteria):
    """When steps ended; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _decoder(shape: Shape) -> tuple[Any, str]:
    """With the first attention that is installed."""
    for attention in ATTENTIONS:
        try:
            made = random_decoder(shape.decoder, torch.bfloat16, "cuda", attn_implementation=attention)
        except (ImportError, ValueError):
            continue
        return made, attention
    raise RuntimeError("transformers has no attention here")


def _steps(decoder: Any, prompts: Sequence[Sequence[int]], settings: dict[str, Any], answer: int) -> float:
    config = ContinuousBatchingConfig(
        num_blocks=2 * len(prompts) * -(-(len(prompts[0]) + answer) // PAGE),
        max_batch_tokens=STEP_TOKENS,
        max_requests_per_batch=len(prompts),
        **{PAGE_SIZE: PAGE},
        **settings,
    )
    for _ in range(2):  # the first one compiles
        outputs = decoder.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=answer, eos_token_id=-1),
            continuous_batching_config=config,
            record_timestamps=True,
        )
        if len(outputs) != len(prompts) or any(output.error for output in outputs.values()):
            raise RuntimeError("requests failed")
    traces = (Trace("", 0.0, tuple(output.timestamps), 0.0, answer, answer) for output in outputs.values())
    return statistics.median(common_gaps([Answer(trace, ()) for trace in traces]))
