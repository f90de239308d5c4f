"""A random adapter for the tiny base, as training would publish it: made by PEFT, sealed, with probes.

The factors are drawn wide, so that every adapter answers differently from the base and from every other.
"""

# Shapes: N tokens, P positions

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from okavango.modalities.base import Base, load_decoder, load_tokenizer
from okavango.modalities.content import Limits, Media, Message, Text
from okavango.modalities.embed import embedding_std, place
from okavango.modalities.image import ImageEncoder, decode_image
from okavango.modalities.probes import Probe, write_probes
from okavango.modalities.projector import ProjectionHead, new_head, pool
from okavango.modalities.prompt import Rendered, Renderer
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
) -> Manifest:
    """Write and seal a random adapter of one rank, with its own image head if the base has an encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = random_peft(base, seed=seed, rank=rank, targets=targets)
    model.save_pretrained(str(folder / "decoder"), save_embedding_layers=False)
    (folder / "decoder" / "README.md").unlink(missing_ok=True)
    own_head = _write_head(folder, base, model, seed) if head and "image" in base.heads else None
    if probes:
        write_probes(folder, _probes(base, model, own_head))
    used = ["decoder", "encoders.image"] if own_head is not None else ["decoder"]
    modalities = ("image",) if own_head is not None else ()
    return seal(folder, Manifest({name: base.components[name] for name in used}, modalities))


def random_peft(base: Base, *, seed: int, rank: int, targets: str | Sequence[str]) -> PeftModel:
    """The decoder in float32 with random LoRA factors, B included; the reference that serving must equal."""
    names = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(load_decoder(base, torch.float32), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            scale = 0.3 / parameter.shape[-1] ** 0.5
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


def reference_embeddings(
    base: Base, model: torch.nn.Module, rendered: Rendered, head: ProjectionHead | None
) -> Tensor:
    """[1, N, D]: token embeddings with each picture's encoded, pooled and projected features in place."""
    ids = torch.tensor([rendered.tokens])
    embeddings: Tensor = model.get_input_embeddings()(ids).clone()  # type: ignore[operator]
    if rendered.media:
        assert head is not None
        encoder = ImageEncoder.load(base.encoders["image"])
        pictures = [decode_image(medium.data, Limits()) for medium in rendered.media]
        vectors = head(pool(encoder.encode(pictures), head.spec))
        place(embeddings, 0, rendered.spans, list(vectors))
    return embeddings


def _write_head(folder: Path, base: Base, model: PeftModel, seed: int) -> ProjectionHead:
    spec = base.heads["image"].spec
    head = new_head(spec, embedding_std(model), seed=seed).requires_grad_(False).eval()
    (folder / "projectors").mkdir(exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / "projectors" / "image.safetensors")
    (folder / "projectors" / "image.json").write_text(json.dumps(spec.to_json()))
    return head


@torch.inference_mode()
def _probes(base: Base, model: PeftModel, head: ProjectionHead | None) -> list[Probe]:
    renderer = Renderer(load_tokenizer(base), {name: h.spec.tokens for name, h in base.heads.items()})
    probes = []
    for messages in _conversations(with_picture=head is not None):
        rendered = renderer.conversation(messages)
        answer = [i for i, counts in enumerate(rendered.loss) if counts]
        positions = torch.tensor(answer[:4]) - 1
        logits = model(inputs_embeds=reference_embeddings(base, model, rendered, head)).logits[0, positions]
        probes.append(Probe(messages, torch.tensor(rendered.tokens), positions, logits))
    return probes


def _conversations(*, with_picture: bool) -> list[tuple[Message, ...]]:
    answer = Message("assistant", (Text("a tile"),))
    found: list[tuple[Message, ...]] = [(Message("user", (Text("Say something."),)), answer)]
    if with_picture:
        picture = Media("image", picture_bytes(7))
        found.append((Message("user", (picture, Text("What is this?"))), answer))
    return found
