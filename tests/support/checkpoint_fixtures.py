"""Tiny random vision-language checkpoints, each as transformers saves one of its family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerBase, ProcessorMixin

from okavango.modalities.tiny import byte_tokenizer

WIDTH = 32
_TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}MARK"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer(special: list[str], **named: str) -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    for name, token in named.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def _name(tokenizer: PreTrainedTokenizerBase, **tokens: str) -> None:
    """Tokens by names of their own, which are saved along."""
    for name, token in tokens.items():
        tokenizer.init_kwargs[name] = token
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))


def _text(kind: str, tokenizer: PreTrainedTokenizerBase, **more: Any) -> dict[str, Any]:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {**_TEXT, "model_type": kind, "vocab_size": len(tokenizer), **ends, **more}


def idefics3(kind: str = "idefics3") -> tuple[Any, ProcessorMixin]:
    """SmolVLM's elder brother: a picture in tiles of 16 pixels and the whole, four positions each."""
    from transformers import Idefics3Config, Idefics3ImageProcessor, Idefics3Processor

    rows = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = _tokenizer(
        ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows]
    )
    pixels = Idefics3ImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 16}, do_image_splitting=True
    )
    processor = Idefics3Processor(pixels, tokenizer, image_seq_len=4, chat_template=_chat("<image>"))
    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = Idefics3Config(
        vision_config=vision,
        text_config=_text("llama", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return config, processor


def smolvlm() -> tuple[Any, ProcessorMixin]:
    """As SmolVLM 2 names itself; its own processor would want a package more, for videos."""
    from transformers import SmolVLMConfig

    config, processor = idefics3()
    values = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    values["vision_config"] = {**values["vision_config"], "model_type": "smolvlm_vision"}
    return SmolVLMConfig(**values), processor


def llava() -> tuple[Any, ProcessorMixin]:
    """The last layer but one of a CLIP tower; its tokenizer begins texts with <s>, its template does not."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaProcessor

    tokenizer = _tokenizer(["<image>", "<s>"], bos_token="<s>")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    pixels = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chat("<image>\n"),
    )
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "projection_dim": 16,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=_text("mistral", tokenizer, bos_token_id=tokenizer.bos_token_id),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return config, processor


def internvl() -> tuple[Any, ProcessorMixin]:
    """Up to four tiles of 16 pixels and a thumbnail, four positions each, before a Qwen 2 decoder."""
    from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLProcessor, InternVLVideoProcessor

    tokenizer = _tokenizer(["<IMG_CONTEXT>", "<img>", "</img>", "<video>"])
    _name(
        tokenizer,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    pixels = GotOcr2ImageProcessor(
        size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = InternVLProcessor(
        pixels,
        tokenizer,
        InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=_chat("<IMG_CONTEXT>\n"),
    )
    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [16, 16],
        "patch_size": [4, 4],
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config=_text("qwen2", tokenizer, rms_norm_eps=1e-6),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return config, processor


def gemma3() -> tuple[Any, ProcessorMixin]:
    """Positions of a picture see each other, in a layer with a window, too, that is shorter than prompts."""
    from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor

    tokenizer = _tokenizer(["<start_of_image>", "<end_of_image>", "<image_soft_token>"])
    _name(
        tokenizer,
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    pixels = Gemma3ImageProcessor(size={"height": 24, "width": 24})
    processor = Gemma3Processor(
        pixels, tokenizer, image_seq_length=9, chat_template=_chat("<start_of_image>")
    )
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 4,
        "vision_use_head": False,
    }
    layers = ["sliding_attention", "full_attention"]
    text = _text("gemma3_text", tokenizer, sliding_window=6, layer_types=layers, query_pre_attn_scalar=8)
    config = Gemma3Config(
        vision_config=vision,
        text_config=text,
        mm_tokens_per_image=9,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        tie_word_embeddings=False,
    )
    return config, processor


def qwen2_5_vl(kind: str = "qwen2_5_vl") -> tuple[Any, ProcessorMixin]:
    """Pictures of any shape; positions in three dimensions."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLConfig,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    new = kind == "qwen2_5_vl"
    tokenizer = _tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    _name(tokenizer, image_token="<|image_pad|>", video_token="<|video_pad|>")
    sizes = {"shortest_edge": 64, "longest_edge": 4096}
    pixels = Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=sizes)
    made = Qwen2_5_VLProcessor if new else Qwen2VLProcessor
    template = _chat("<|vision_start|><|image_pad|><|vision_end|>")
    processor = made(pixels, tokenizer, Qwen2VLVideoProcessor(), chat_template=template)
    vision: dict[str, Any] = {"depth": 2, "patch_size": 4, "spatial_merge_size": 2, "num_heads": 2}
    if new:
        own = {"hidden_size": 24, "intermediate_size": 40, "out_hidden_size": WIDTH, "window_size": 16}
        vision |= {**own, "fullatt_block_indexes": [1]}
    else:
        vision |= {"embed_dim": 24, "hidden_size": WIDTH, "mlp_ratio": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    named = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        "tie_word_embeddings": False,
    }
    text = _text(f"{kind}_text", tokenizer, rope_parameters=rope)
    config = (Qwen2_5_VLConfig if new else Qwen2VLConfig)(vision_config=vision, text_config=text, **named)
    return config, processor


def qwen2_vl() -> tuple[Any, ProcessorMixin]:
    return qwen2_5_vl("qwen2_vl")


FAMILIES: dict[str, Callable[[], tuple[Any, ProcessorMixin]]] = {
    "gemma3": gemma3,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "llava": llava,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_vl": qwen2_vl,
    "internvl": internvl,
}


def write_checkpoint(folder: Path, family: str, seed: int = 2) -> Path:
    """A checkpoint whose weights are loud enough that pictures change what it says."""
    config, processor = FAMILIES[family]()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoints("llava"): the folder of one, written once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(family: str) -> Path:
        folder = root / family
        return folder if folder.is_dir() else write_checkpoint(folder, family)

    return get


def _chat(mark: str) -> str:
    return _CHAT.replace("MARK", mark)
