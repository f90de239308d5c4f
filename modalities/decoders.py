"""Decoders that the user names: where they lie, and whether they can serve as one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from okavango.modalities.build import DecoderShape, quiet_transformers
from okavango.modalities.image import UNUSABLE
from okavango.platform.errors import BindError, ConfigError, NotFoundError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def find_decoder(named: str) -> Path:
    """The directory or .gguf file that is named, or the hub's snapshot of that id.

    Raises:
        NotFoundError: there is none.
    """
    path = Path(named).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path.absolute()
    if path.exists():
        raise ConfigError("is neither a directory nor a .gguf file", where=str(path))
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(named):
        raise NotFoundError("no decoder lies here", where=named)
    return _snapshot(named)


def check_decoder(folder: Path) -> DecoderShape:
    """The shape of the decoder in a Hugging Face directory, which is loaded once to be sure of it.

    Raises:
        ConfigError: config, weights, tokenizer or chat template are missing.
        BindError: the weights are incomplete.
        UnsupportedError: transformers has no decoder of this architecture.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError("not a decoder's directory: it has no config.json", where=str(folder))
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            "holds no safetensors weights",
            where=str(folder),
            remedy="load it with transformers and save_pretrained it again",
        )
    with quiet_transformers():
        _check_tokenizer(folder)
        return DecoderShape.of(_load(folder))


def _snapshot(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES))
    # The hub's own errors are OSErrors (among them: offline and not cached, gated, no such repository).
    except (OSError, ValueError) as error:
        raise NotFoundError(
            f"no decoder lies at this path, and the hub gives none: {str(error).splitlines()[0]}",
            where=repository,
            remedy="name a directory, a .gguf file, or a model's id on the hub",
        ) from error


def _check_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    if not any(folder.glob("tokenizer*")):
        raise ConfigError(
            "has no tokenizer", where=str(folder), remedy="save the tokenizer beside the weights"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare ones
        raise ConfigError(f"its tokenizer cannot be loaded: {error!r}", where=str(folder)) from error
    if not tokenizer.chat_template:
        raise ConfigError(
            "its tokenizer has no chat template",
            where=str(folder),
            remedy="take an instruction-tuned decoder, or save a chat_template.jinja beside it",
        )


def _load(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except UNUSABLE as error:
        raise UnsupportedError(
            f"transformers cannot load it as a decoder: {error}", where=str(folder)
        ) from error
    model, found = loaded
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise BindError(f"weights are missing: {missing}", where=str(folder))
    return model
