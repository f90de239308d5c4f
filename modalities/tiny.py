"""The tiny base: random, real in every part, written in a moment, so that every flow runs on a CPU offline.

Its weights are spread wide enough that greedy answers to different prompts and pictures differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from okavango.modalities.base import Base
from okavango.modalities.build import DecoderShape, quiet_transformers, write_description, write_head
from okavango.modalities.tower import measure_tower, write_tower

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Architecture = Literal["llama", "gpt2", "qwen3"]
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
) -> Base:
    """Write a base of about 100,000 parameters into `folder`; the same bytes for the same arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = write_tiny_decoder(folder / "decoder", seed=seed, architecture=architecture)
    if not image:
        return write_description(folder, name, folder / "decoder", shape.context)
    tower = folder / "encoders" / "image"
    write_tower(tower, _TOWER, _PREPROCESS, seed=seed)
    encoder = measure_tower(tower)
    head = write_head(folder / "projectors" / "image.safetensors", encoder, shape, tokens=4, hidden=48)
    return write_description(
        folder, name, folder / "decoder", shape.context, {"image": encoder}, {"image": head}
    )


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
    grouped = {"num_key_value_heads": 2, "intermediate_size": 128}
    own: dict[str, dict[str, Any]] = {
        "llama": grouped,
        "qwen3": grouped | {"head_dim": 24},
        "gpt2": {"n_inner": 128, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    }
    return AutoConfig.for_model(architecture, **shared | own[architecture])
