"""The tiny base: random, real in every part, written in a moment, so that every flow runs on a CPU offline.

Its weights are spread wide enough that greedy answers to different prompts and pictures differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from okavango.modalities.base import Base
from okavango.modalities.build import DecoderShape, quiet_transformers, write_description, write_head
from okavango.modalities.projector import HeadSpec
from okavango.modalities.tiny_whisper import write_tiny_whisper
from okavango.modalities.tower import measure_tower, write_tower

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Architecture = Literal[
    "llama", "mistral", "gpt2", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "deepseek_v3"
]
CONTEXT = 512
WIDTH = 64
SPREAD = 0.2
SPECIAL = ("<|im_start|>", "<|im_end|>", "<pad>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TOWER = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
}
_PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def write_tiny_base(
    folder: Path,
    *,
    seed: int = 0,
    name: str = "tiny",
    architecture: Architecture = "llama",
    image: bool = True,
    audio: bool = False,
) -> Base:
    """Write a base of about 100,000 parameters into `folder`; the same bytes for the same arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = write_tiny_decoder(folder / "decoder", seed=seed, architecture=architecture)
    encoders, specs = {}, {}
    if image:
        tower = folder / "encoders" / "image"
        write_tower(tower, _TOWER, _PREPROCESS, seed=seed)
        encoders["image"] = encoder = measure_tower(tower)
        specs["image"] = HeadSpec(encoder.width, shape.width, encoder.grid, tokens=4, hidden=48)
    if audio:
        encoders["audio"] = encoder = write_tiny_whisper(folder / "encoders" / "audio", seed)
        specs["audio"] = HeadSpec(
            encoder.width, shape.width, encoder.grid, tokens=150, hidden=48, pooling="stack", stride=10
        )
    heads = {
        modality: write_head(folder / "projectors" / f"{modality}.safetensors", spec, shape)
        for modality, spec in specs.items()
    }
    return write_description(folder, name, folder / "decoder", shape.context, encoders, heads)


def write_tiny_decoder(folder: Path, *, seed: int = 0, architecture: Architecture = "llama") -> DecoderShape:
    """A random decoder with its byte-level tokenizer, as a Hugging Face directory."""
    tokenizer = byte_tokenizer()
    model = _random_decoder(_config(architecture, tokenizer), seed)
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return DecoderShape.of(model)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A token a byte, and ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    start, end, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=start,
        eos_token=end,
        pad_token=pad,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _random_decoder(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _config(architecture: Architecture, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    from transformers import AutoConfig

    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": SPREAD,
        "tie_word_embeddings": architecture == "qwen3",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return AutoConfig.for_model(architecture, **shared | _OWN[architecture])


_GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 128}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_OWN: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    # a window in every layer, shorter than most prompts
    "mistral": _GROUPED | {"head_dim": 16, "sliding_window": 24},
    "qwen3": _GROUPED | {"head_dim": 24},
    "gpt2": {"n_inner": 128, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    # a window shorter than most prompts, and a layer of either kind
    "gemma3_text": _GROUPED
    | {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": _GROUPED | {"attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "mixtral": _GROUPED | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": _GROUPED | _EXPERTS | {"head_dim": 24, "num_experts": 4, "norm_topk_prob": True},
    # latent attention, whose keys are wider than its values; a dense layer, then one of experts
    "deepseek_v3": _EXPERTS
    | {
        "num_key_value_heads": 4,
        "intermediate_size": 128,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}
