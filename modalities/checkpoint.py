"""A pretrained vision-language model of transformers → a base: its tower and connector become the encoder of
pictures, its language model the shared decoder, its processor's chat template the base's.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from okavango.modalities.base import Base, DefaultHead, EncoderSpec, encoder_digest, head_digest, read_base
from okavango.modalities.build import building, quiet_transformers, write_description
from okavango.modalities.decoders import check_decoder, find_decoder
from okavango.modalities.gguf import drop_volatile
from okavango.modalities.image import UNUSABLE
from okavango.modalities.projector import HeadSpec
from okavango.modalities.report import Report, silent
from okavango.modalities.rope import SECTIONS
from okavango.modalities.vision_language import KIND, LANGUAGE_MODELS, expansion
from okavango.platform.errors import BindError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

FAMILIES = ("gemma3", "idefics3", "internvl", "llava", "qwen2_5_vl", "qwen2_vl", "smolvlm")
_LOOKING_AHEAD = ("gemma3",)
_IN_THE_WAY = {
    "paligemma": "its decoder looks ahead within the prompt",
    "qwen3_vl": "pictures enter several of its decoder's layers",
    "mllama": "pictures enter its decoder through attention of their own",
}


def add_checkpoint(
    bases: Path, name: str, checkpoint: str, *, force: bool = False, report: Report = silent
) -> Base:
    """Write the base `name` below `bases`, of a Hugging Face directory or a model's id on the hub.

    Raises:
        NotFoundError: there is no such directory or model.
        UnsupportedError: its family is not served.
        ConfigError: it lacks a processor, a chat template, or config and weights.
        BindError: its weights are incomplete.
        ConflictError: the name is taken, and `force` is not set.
    """
    with building(bases, name, force=force) as draft, quiet_transformers():
        found = find_decoder(checkpoint)
        with report(f"Checkpoint {checkpoint}", None):
            _check_family(found)
            model, processor = _load(found)
            mark = _mark(processor)
        with report("Decoder", None):
            _write_decoder(draft / "decoder", model, processor, mark)
            shape = check_decoder(draft / "decoder")
        with report("Image encoder", None):
            _write_encoder(draft / "encoders" / "image", model, processor)
            encoder = _measure(draft / "encoders" / "image", mark, shape.width, model.config.model_type)
        with report("Digests", None):
            head = _identity(draft / "projectors" / "image.safetensors", encoder)
            write_description(
                draft, name, draft / "decoder", shape.context, {"image": encoder}, {"image": head}
            )
    return read_base(bases / name)


def _check_family(folder: Path) -> None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNUSABLE as error:
        raise ConfigError(f"not a model of transformers: {error}", where=str(folder)) from error
    family = config.model_type
    if family not in FAMILIES:
        reason = f"{_IN_THE_WAY[family]}; " if family in _IN_THE_WAY else ""
        raise UnsupportedError(
            f"a checkpoint of {family} cannot be a base: {reason}served are {', '.join(FAMILIES)}",
            where=str(folder),
        )


def _load(folder: Path) -> tuple[Any, ProcessorMixin]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype="auto", output_loading_info=True, **options
        )
        processor = AutoProcessor.from_pretrained(folder, **options)
    except (*UNUSABLE, ImportError) as error:
        raise ConfigError(f"transformers cannot load it: {error}", where=str(folder)) from error
    model, info = loaded
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise BindError(f"weights are missing: {missing}", where=str(folder))
    return model.eval(), processor


def _mark(processor: Any) -> str:
    """What its chat template writes for a picture, and its processor replaces."""
    mark = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
    if not isinstance(mark, str):
        raise UnsupportedError(f"{type(processor).__name__} names no image token")
    return mark


def _write_decoder(folder: Path, model: Any, processor: Any, mark: str) -> None:
    """The language model as a model of its own, with the checkpoint's tokenizer and template."""
    from transformers import AutoModelForCausalLM

    inner, head = _language_model(model), model.get_output_embeddings()
    config = _plain(model.config.get_text_config())
    config.tie_word_embeddings = head.weight is inner.get_input_embeddings().weight
    with torch.device("meta"):
        decoder: Any = AutoModelForCausalLM.from_config(config, dtype=inner.dtype)
    getattr(decoder, decoder.base_model_prefix).load_state_dict(inner.state_dict(), assign=True)
    if not config.tie_word_embeddings:
        decoder.set_output_embeddings(head)
    decoder.generation_config = model.generation_config
    decoder.save_pretrained(folder)
    tokenizer: PreTrainedTokenizerBase = processor.tokenizer
    tokenizer.chat_template = _template(processor, mark)
    tokenizer.save_pretrained(folder)
    drop_volatile(folder)


def _plain(config: Any) -> PreTrainedConfig:
    """The config of a decoder that stands alone. Qwen's has no model of its own: it is Qwen 2's with another
    rotary embedding, which modalities.rope puts in."""
    if not config.model_type.startswith(("qwen2_vl", "qwen2_5_vl")):
        found: PreTrainedConfig = config
        return found
    from transformers import Qwen2Config

    values = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    rope = dict(values["rope_parameters"])
    sections = rope.pop("mrope_section")
    return Qwen2Config(**{**values, "rope_parameters": {**rope, "rope_type": "default"}, SECTIONS: sections})


def _language_model(model: Any) -> PreTrainedModel:
    for name in LANGUAGE_MODELS:
        if hasattr(model.model, name):
            found: PreTrainedModel = getattr(model.model, name)
            return found
    raise UnsupportedError(f"{type(model).__name__} has no language model of its own")


def _template(processor: Any, mark: str) -> str:
    """The chat template, led by what the processor itself would put before a text.

    Raises:
        ConfigError: there is none, or it shows no picture.
    """
    tokenizer = processor.tokenizer
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise ConfigError(
            "the checkpoint has no chat template", remedy="save a chat_template.jinja beside it"
        )
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    try:
        shown = tokenizer.apply_chat_template(asked, chat_template=template, tokenize=False)
    except Exception as error:  # jinja's own, and whatever a template raises
        raise ConfigError(f"its chat template does not take a picture and a text: {error}") from error
    if shown.count(mark) != 1:
        raise ConfigError(f"its chat template shows {mark} {shown.count(mark)} times for one picture")
    bos = tokenizer.bos_token
    leads = bos is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return f"{{{{ bos_token }}}}{template}" if leads and not shown.startswith(bos) else template


def _write_encoder(folder: Path, model: Any, processor: ProcessorMixin) -> None:
    """Tower and connector; of the language model only a vocabulary of one, without layers."""
    from transformers import AutoModel

    config = type(model.config).from_dict(model.config.to_dict())
    text = config.get_text_config()
    named = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    text.update({"num_hidden_layers": 0, "vocab_size": 1, **named})
    if getattr(text, "layer_types", None):
        text.layer_types = []
    with torch.device("meta"):
        module: Any = AutoModel.from_config(config, dtype=model.dtype)
    inner = model.model
    own = {
        name: tensor for name, tensor in inner.state_dict().items() if not name.startswith(LANGUAGE_MODELS)
    }
    language = {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
        for name, tensor in module.state_dict().items()
        if name.startswith(LANGUAGE_MODELS)
    }
    module.load_state_dict(own | language, assign=True)
    module.save_pretrained(folder)
    processor.save_pretrained(folder)
    drop_volatile(folder)


def _measure(folder: Path, mark: str, width: int, family: str) -> EncoderSpec:
    """By the smallest picture that there is: one tile, or a tile and the whole."""
    layout = expansion(folder, mark, (1, 1))
    first = next(piece for piece in layout if not isinstance(piece, str))
    grid = (1, first if isinstance(first, int) else prod(first))
    digest = encoder_digest(folder, 0, (-1,), KIND)
    ahead = family in _LOOKING_AHEAD
    return EncoderSpec(folder, digest, 0, width, grid, kind=KIND, mark=mark, looks_ahead=ahead)


def _identity(path: Path, encoder: EncoderSpec) -> DefaultHead:
    from safetensors.torch import save_file

    spec = HeadSpec(encoder.width, encoder.width, encoder.grid, encoder.grid[1], 0, "identity")
    path.parent.mkdir(parents=True)
    save_file({}, path)
    return DefaultHead(path, head_digest(path, spec), spec, trained=True)
