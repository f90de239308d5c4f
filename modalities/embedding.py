"""One space for texts, pictures and sounds: what the joint objective trains, and /v1/embeddings answers from.

A medium stands in it as the mean of its head's output, a text as the mean of its tokens' embeddings less what
texts have in common; each goes through a linear layer of its own, and has length one. So neither needs a pass
through the decoder.

    embedding.safetensors   in a bundle: the layers, the temperature, and what texts have in common
    embedding.json          width and modalities
"""

# Shapes: B texts or media, M embeddings of a medium, L tokens of a text, D decoder width, P the space's width

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from okavango.platform.bundle import EMBEDDING
from okavango.platform.errors import BindError

_HIGHEST_SCALE = math.log(100)  # as CLIP bounds it (Radford et al. 2021)


@dataclass(frozen=True)
class EmbeddingSpec:
    """`in_width`: D. `width`: P. `modalities`: those that have a layer, beside text."""

    in_width: int
    width: int
    modalities: tuple[str, ...]


class EmbeddingHead(nn.Module):
    """Means of embeddings [B, D] → unit vectors [B, P]."""

    common: Tensor

    def __init__(self, spec: EmbeddingSpec, temperature: float = 0.07) -> None:
        super().__init__()
        self.spec = spec
        self.text = nn.Linear(spec.in_width, spec.width, bias=False)
        self.media = nn.ModuleDict(
            {name: nn.Linear(spec.in_width, spec.width, bias=False) for name in sorted(spec.modalities)}
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.register_buffer("common", torch.zeros(spec.in_width))

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied with in the loss: one over the temperature."""
        return self.log_scale.clamp(max=_HIGHEST_SCALE).exp()

    def texts(self, tokens: Sequence[Tensor]) -> Tensor:
        """Each text's token embeddings [L, D] → [B, P]."""
        means = torch.stack([each.float().mean(0) for each in tokens])
        return F.normalize(self.text(means - self.common), dim=-1)

    def media_of(self, modality: str, vectors: Sequence[Tensor]) -> Tensor:
        """What the head made of each medium [M, D] → [B, P]."""
        means = torch.stack([each.float().mean(0) for each in vectors])
        return F.normalize(cast("Tensor", self.media[modality](means - self.common)), dim=-1)


def new_embedding(spec: EmbeddingSpec, temperature: float, seed: int) -> EmbeddingHead:
    """Layers that begin alike, so that means which lie close before training do so after, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = EmbeddingHead(spec, temperature)
        nn.init.orthogonal_(made.text.weight)
    for layer in made.media.values():
        assert isinstance(layer, nn.Linear)
        layer.weight.data.copy_(made.text.weight.data)
    return made


def write_embedding(folder: Path, head: EmbeddingHead) -> None:
    """Write a bundle's embedding files."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / EMBEDDING)
    described = json.dumps(asdict(head.spec), sort_keys=True)
    (folder / EMBEDDING).with_suffix(".json").write_text(described + "\n")


def read_embedding(folder: Path, in_width: int) -> EmbeddingHead | None:
    """What write_embedding wrote, or None where the folder has none.

    Raises:
        BindError: it is torn, or made for another width.
    """
    path = folder / EMBEDDING
    if not path.is_file():
        return None
    try:
        described = json.loads(path.with_suffix(".json").read_text())
        tensors = load_file(path, backend="pread")  # why: modalities/peft_files.py
    except (OSError, ValueError, SafetensorError) as error:
        raise BindError(f"not an embedding head: {error!r}", where=EMBEDDING) from error
    head = bind_embedding(described, tensors, where=EMBEDDING)
    if head.spec.in_width != in_width:
        raise BindError(f"width {head.spec.in_width}, and the decoder has {in_width}", where=EMBEDDING)
    return head


def bind_embedding(described: Any, tensors: dict[str, Tensor], *, where: str) -> EmbeddingHead:
    """A space with exactly these weights, of the spec that was described as JSON.

    Raises:
        BindError: a tensor is missing, left over, or of another shape, or it is no spec.
    """
    try:
        spec = EmbeddingSpec(described["in_width"], described["width"], tuple(described["modalities"]))
        head = EmbeddingHead(spec)
        head.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise BindError(f"not an embedding head: {error}", where=where) from error
    return head.requires_grad_(False).eval()
