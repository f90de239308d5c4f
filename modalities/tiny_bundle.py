"""A random adapter for the tiny base, as training would publish it: made by PEFT, sealed, with probes.

The factors are drawn wide, so that every adapter answers differently from the base and from every other.
"""

# Shapes: N tokens, P positions

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from okavango.modalities.adapted import encoder_targets
from okavango.modalities.base import Base, load_decoder, load_head, load_tokenizer
from okavango.modalities.content import Media, Message, Text
from okavango.modalities.embed import embedding_std, place
from okavango.modalities.embedding import EmbeddingHead, EmbeddingSpec, new_embedding, write_embedding
from okavango.modalities.encoders import Encoder, decode, encode, load_encoder, make_renderer
from okavango.modalities.head_files import write_head
from okavango.modalities.probes import Probe, write_probes
from okavango.modalities.projector import ProjectionHead, new_head, pool
from okavango.modalities.prompt import Rendered
from okavango.platform.bundle import Manifest, seal


def write_tiny_bundle(
    folder: Path,
    base: Base,
    *,
    seed: int = 1,
    rank: int = 8,
    targets: str | Sequence[str] = "all-linear",
    head: bool = True,
    probes: bool = True,
    encoder: bool = False,
    joint: bool = False,
) -> Manifest:
    """Write and seal a random adapter of one rank, with its own image head if the base has an encoder, and if
    asked for with factors for that, too, and with a space of embeddings."""
    folder.mkdir(parents=True, exist_ok=True)
    model = random_peft(base, seed=seed, rank=rank, targets=targets)
    model.save_pretrained(str(folder / "decoder"), save_embedding_layers=False)
    (folder / "decoder" / "README.md").unlink(missing_ok=True)
    own_head = _write_head(folder, base, model, seed) if head and "image" in base.heads else None
    adapted = adapt_encoder(folder, base, seed) if encoder else None
    if joint:
        write_embedding(folder, random_space(base, seed))
    if probes:
        write_probes(folder, _probes(base, model, own_head, adapted))
    used = ["decoder", "encoders.image"] if own_head is not None or encoder else ["decoder"]
    modalities = ("image",) if own_head is not None or encoder else ()
    return seal(folder, Manifest({name: base.components[name] for name in used}, modalities))


def random_space(base: Base, seed: int) -> EmbeddingHead:
    """A space in which what texts have in common is not zero, as if it were trained."""
    assert base.width is not None
    space = new_embedding(EmbeddingSpec(base.width, 24, tuple(base.heads)), 0.07, seed)
    space.common.copy_(torch.randn(base.width, generator=torch.Generator().manual_seed(seed)) * 0.1)
    return space.requires_grad_(False)


def random_peft(base: Base, *, seed: int, rank: int, targets: str | Sequence[str]) -> PeftModel:
    """The decoder in float32 with random LoRA factors, B included; the reference that serving must equal."""
    names = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM")
    return _filled(get_peft_model(load_decoder(base, torch.float32), config), base, seed, width=0.3)


def adapt_encoder(folder: Path, base: Base, seed: int) -> Encoder:
    """The image encoder with random factors on every layer that may have some, saved in a bundle's folder."""
    encoder = load_encoder(base.encoders["image"])
    targets = [target.name for target in encoder_targets(base.encoders["image"])]
    model = get_peft_model(encoder.module, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    _filled(model, base, seed, width=1.0)
    model.save_pretrained(str(folder / "encoders" / "image"), save_embedding_layers=False)
    return encoder


def _filled(model: PeftModel, base: Base, seed: int, width: float) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            scale = width / parameter.shape[-1] ** 0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    model.peft_config["default"].base_model_name_or_path = base.name
    return model.eval()


def picture_bytes(seed: int, side: int = 40) -> bytes:
    """A random picture of a few coloured tiles, as PNG."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(tiles).resize((side, side), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def sound_bytes(seed: int, seconds: float = 1.0, rate: int = 16_000) -> bytes:
    """A few random tones one after another, as WAV."""
    import numpy as np
    import soundfile

    chance = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = chance.uniform(100, 3000, 4)[np.minimum(3, (time / seconds * 4).astype(int))]
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.5 * np.sin(2 * np.pi * pitch * time), rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def reference_embeddings(
    base: Base,
    model: torch.nn.Module,
    rendered: Rendered,
    head: ProjectionHead | None,
    encoder: Encoder | None = None,
) -> Tensor:
    """[1, N, D]: token embeddings with each medium's encoded, pooled and projected features in place.

    Args:
        head, encoder: for pictures, the latter in place of the base's. Sounds go through the base's own.
    """
    ids = torch.tensor([rendered.tokens])
    embeddings: Tensor = model.get_input_embeddings()(ids).clone()  # type: ignore[operator]
    place(embeddings, 0, rendered.spans, [_vectors(base, each, head, encoder) for each in rendered.media])
    return embeddings


def _vectors(base: Base, medium: Media, head: ProjectionHead | None, encoder: Encoder | None) -> Tensor:
    if medium.modality != "image":
        head, encoder = load_head(base.heads[medium.modality]), None
    assert head is not None
    features = encode(encoder or load_encoder(base.encoders[medium.modality]), [decode(medium)])[0]
    vectors: Tensor = head(pool(features, head.spec)).flatten(0, 1)
    return vectors


def _write_head(folder: Path, base: Base, model: PeftModel, seed: int) -> ProjectionHead:
    head = new_head(base.heads["image"].spec, embedding_std(model), seed=seed).requires_grad_(False).eval()
    write_head(folder, "image", head)
    return head


@torch.inference_mode()
def _probes(
    base: Base, model: PeftModel, head: ProjectionHead | None, encoder: Encoder | None
) -> list[Probe]:
    if encoder is not None and head is None:
        head = load_head(base.heads["image"])
    renderer = make_renderer(base, load_tokenizer(base))
    probes = []
    for messages in _conversations(with_picture=head is not None):
        rendered = renderer.conversation(messages)
        answer = [i for i, counts in enumerate(rendered.loss) if counts]
        positions = torch.tensor(answer[:4]) - 1
        embeddings = reference_embeddings(base, model, rendered, head, encoder)
        logits = model(inputs_embeds=embeddings).logits[0, positions]
        probes.append(Probe(messages, torch.tensor(rendered.tokens), positions, logits))
    return probes


def _conversations(*, with_picture: bool) -> list[tuple[Message, ...]]:
    answer = Message("assistant", (Text("a tile"),))
    found: list[tuple[Message, ...]] = [(Message("user", (Text("Say something."),)), answer)]
    if with_picture:
        picture = Media("image", picture_bytes(7))
        found.append((Message("user", (picture, Text("What is this?"))), answer))
    return found
