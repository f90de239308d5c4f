"""A decoder from a GGUF file: dequantised, saved as a Hugging Face directory like any other."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from okavango.modalities.build import DecoderShape, quiet_transformers
from okavango.platform.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_VOLATILE = {"transformers_version", "_model_name_or_path", "is_local", "local_files_only"}


def convert_gguf(file: Path, folder: Path) -> DecoderShape:
    """Write the decoder in `file` to `folder`: bfloat16 safetensors, tokenizer and chat template.

    Raises:
        UnsupportedError: transformers cannot read this architecture, or the file is no GGUF.
        ConfigError: the file brings no chat template.
    """
    with quiet_transformers():
        model, tokenizer = _load(file)
        if not tokenizer.chat_template:
            raise ConfigError("the GGUF file has no chat template", where=str(file))
        _forget_the_file(model)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    drop_volatile(folder)
    return DecoderShape.of(model)


def _load(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = {"gguf_file": file.name, "local_files_only": True}
    # Its dequantising bar asks no setting whether it may show itself.
    try:
        with redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **named)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.bfloat16, **named, **_unpacked()
            )
    # The readers raise nearly anything on torn files: struct.error, IndexError, tokenizers' bare Exception, …
    except Exception as error:
        raise UnsupportedError(
            f"transformers cannot read this GGUF file: {error!r}", where=str(file)
        ) from error
    return model, tokenizer


def _unpacked() -> dict[str, Any]:
    """Newer releases of transformers keep GGUF weights packed unless told otherwise; older ones never do."""
    import transformers

    packed = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": packed(dequantize=True)} if packed else {}


def _forget_the_file(model: PreTrainedModel) -> None:
    """Make the model save as an ordinary one."""
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)


def drop_volatile(folder: Path) -> None:
    """Library versions and load options would give one decoder another digest on another machine."""
    for file in folder.glob("*config.json"):
        kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in _VOLATILE}
        file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
