"""Which decoders the runner takes: those that compute in pieces, beside others, what they compute at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from okavango.modalities.base import Base
from okavango.modalities.build import quiet_transformers
from okavango.modalities.tiny import write_tiny_base
from okavango.platform.errors import ConfigError, UnsupportedError
from okavango.serving.backend import RunnerOptions
from okavango.serving.runner import Runner

OPTIONS = RunnerOptions(torch.float32, "cpu", block_size=4, kv_bytes=1 << 20, slots=2, max_rank=8)
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "initializer_range": 0.2,
}


@pytest.fixture
def make_base(tmp_path):
    """A base whose decoder is a random one of any architecture that transformers has."""

    def make(architecture: str, **own: Any) -> Base:
        base = write_tiny_base(tmp_path / "base", image=False)
        config = AutoConfig.for_model(architecture, **{**SIZES, **own})
        torch.manual_seed(0)
        with quiet_transformers():
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base.decoder.path)
        return base

    return make


LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 9,
    "head_dim": 4,
}
JAMBA = {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}


@pytest.mark.parametrize(
    ("architecture", "own"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 5}),
        ("qwen3", {}),
        ("phi3", {"pad_token_id": 0}),
        ("gemma3_text", {"sliding_window": 5}),
        ("deepseek_v3", LATENT),  # keys are wider than values
        ("gemma4_text", {"sliding_window": 5}),  # layers differ in width
        ("mixtral", {"num_local_experts": 2}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 48}),
    ],
)
def test_decoders_that_only_attend_are_served(make_base, architecture, own):
    runner = Runner(make_base(architecture, **own), OPTIONS)
    assert runner.num_blocks > 2


def test_the_cache_is_as_wide_as_each_layer(make_base):
    runner = Runner(make_base("deepseek_v3", **LATENT), OPTIONS)
    module = runner.decoder.get_submodule("model.layers.0.self_attn")
    assert module.okavango_cache.keys.shape == (4, runner.num_blocks, 4, 12)
    assert module.okavango_cache.values.shape == (4, runner.num_blocks, 4, 6)
    assert runner.num_blocks == OPTIONS.kv_bytes // (2 * 4 * 4 * (12 + 6) * 4)


@pytest.mark.parametrize(
    ("architecture", "own", "word"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "conv layers"),
        ("llama4_text", {"intermediate_size_mlp": 64, "num_local_experts": 2}, "chunked_attention"),
        ("diffllama", {}, "in pieces than at once"),
        ("jamba", JAMBA, "SlotLinear"),
        ("gemma2", {}, "softcap"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "interface in every layer"),
        ("gptj", {"rotary_dim": 4, "n_layer": 2, "n_head": 4}, "interface in every layer"),
        ("mamba", {}, "no attention layers"),
    ],
)
def test_decoders_that_share_more_between_tokens_are_refused(make_base, architecture, own, word):
    with pytest.raises(UnsupportedError, match=f"ForCausalLM: .*{word}"):
        Runner(make_base(architecture, **own), OPTIONS)


def test_memory_for_less_than_a_conversation_is_refused(make_base):
    with pytest.raises(ConfigError, match="--kv-memory"):
        Runner(make_base("llama"), replace(OPTIONS, kv_bytes=1 << 13))
