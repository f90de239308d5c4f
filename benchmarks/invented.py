"""Bases and adapters of random numbers, made with what a bare GPU machine has: torch, transformers,
safetensors. The tiny base (okavango.modalities.tiny) needs more, and is far too small to fill a GPU.
"""

# Shapes: r an adapter's rank, I inputs, O outputs of a layer

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ours import Bundles, copy_of
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from okavango.modalities.base import BASE_FILE, Base, empty_decoder, read_base, tree_digest
from okavango.modalities.lora import Target, find_targets
from okavango.platform.bundle import Manifest, seal

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
END = "<end>"


def write_adapters(base: Base, folder: Path, ranks: Sequence[int], copies: int = 0) -> Bundles:
    """One of each rank, and more that share their weights on disk; no two have one digest."""
    targets = find_targets(empty_decoder(base))
    folders = [folder / f"a{number}" for number in range(len(ranks))]
    for seed, (path, rank) in enumerate(zip(folders, ranks, strict=True)):
        write_adapter(path, base, targets, rank, seed)
    own = len(folders)
    return Bundles(folders + [copy_of(folders[n % own], folder / f"copy{n}") for n in range(copies)])


def write_base(folder: Path, config: PreTrainedConfig, weights: PreTrainedModel | None = None) -> Base:
    """A base of that configuration; without weights it can be served only by what brings some."""
    decoder = folder / "decoder"
    tokenizer = word_tokenizer(config.vocab_size)
    config.eos_token_id = tokenizer.eos_token_id
    config.bos_token_id = config.pad_token_id = None
    if weights is not None:
        weights.save_pretrained(decoder)
    config.save_pretrained(decoder)
    tokenizer.save_pretrained(decoder)
    context, digest = config.max_position_embeddings, tree_digest(decoder)
    described = {"path": '"decoder"', "digest": f'"{digest}"', "context": context}
    lines = [
        "format = 1",
        f'name = "{folder.name}"',
        "[decoder]",
        *(f"{k} = {v}" for k, v in described.items()),
    ]
    (folder / BASE_FILE).write_text("\n".join(lines) + "\n")
    return read_base(folder)


def random_decoder(config: PreTrainedConfig, dtype: torch.dtype, device: str = "cpu", **more: Any) -> Any:
    """A decoder whose weights are drawn where it computes."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **more)
    return model.to(dtype).eval().requires_grad_(False)


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """`size` tokens: every byte, made-up words, and one that ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġw{number}" for number in range(size - len(alphabet) - 1)]
    vocabulary = {word: i for i, word in enumerate([*alphabet, *words])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def write_adapter(folder: Path, base: Base, targets: Sequence[Target], rank: int, seed: int) -> None:
    """A random adapter in PEFT's own files on all of these layers, sealed as a bundle."""
    decoder = folder / "decoder"
    decoder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for target in targets:
        for factor, shape in (("A", (rank, target.in_features)), ("B", (target.out_features, rank))):
            values = torch.randn(shape, generator=generator) * (0.3 / shape[1] ** 0.5)
            tensors[f"base_model.model.{target.name}.lora_{factor}.weight"] = values.bfloat16()
    save_file(tensors, decoder / "adapter_model.safetensors")
    names = sorted({target.name.rpartition(".")[2] for target in targets})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "target_modules": names}
    config |= {"r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": base.name}
    (decoder / "adapter_config.json").write_text(json.dumps(config))
    seal(folder, Manifest({"decoder": base.components["decoder"]}))
