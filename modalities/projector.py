"""Projection heads: pooled encoder features → decoder embeddings.

A head is two stages. `pool` has no weights and is the same for every adapter over one encoder and spec, so
its output is what training caches; `ProjectionHead` has the weights, which a bundle may bring whole.
"""

# Shapes: B media, N grid positions of the encoder, T tokens a medium, C encoder width, D decoder width

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okavango.platform.errors import BindError, ConfigError


@dataclass(frozen=True)
class HeadSpec:
    """A projection head's shape.

    Attributes:
        in_width: C, channels of the encoder's features.
        out_width: D, the decoder's width.
        grid: rows and columns of the encoder's feature map.
        tokens: T, decoder tokens a medium; its square grid must divide `grid` evenly.
        hidden: width of the hidden layer.
    """

    in_width: int
    out_width: int
    grid: tuple[int, int]
    tokens: int
    hidden: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        side = self.side
        if side < 1 or side * side != self.tokens or self.grid[0] % side or self.grid[1] % side:
            raise ConfigError(
                f"{self.tokens} tokens do not tile a feature map of {self.grid[0]} × {self.grid[1]}",
                where="projectors.tokens",
                remedy="choose a square number whose root divides both sides",
            )

    @property
    def side(self) -> int:
        return round(max(self.tokens, 0) ** 0.5)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"grid": list(self.grid)}


def pool(features: Tensor, spec: HeadSpec) -> Tensor:
    """Average an encoder's feature map [B, N, C] over a spec's tiles → [B, T, C], row by row."""
    rows, columns = spec.grid
    maps = features.transpose(1, 2).unflatten(2, (rows, columns))
    pooled = F.avg_pool2d(maps, (rows // spec.side, columns // spec.side))
    return pooled.flatten(2).transpose(1, 2)


class ProjectionHead(nn.Module):
    """Pooled features [B, T, C] → decoder embeddings [B, T, D].

    LayerNorm → Linear → GELU → Linear, a position embedding a tile, and a learned output scale, so that
    a fresh head already speaks at the loudness of the decoder's own token embeddings.
    """

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.norm = nn.LayerNorm(spec.in_width)
        self.up = nn.Linear(spec.in_width, spec.hidden)
        self.down = nn.Linear(spec.hidden, spec.out_width)
        self.position = nn.Parameter(torch.zeros(spec.tokens, spec.out_width))
        self.out_norm = nn.LayerNorm(spec.out_width)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.out_norm(self.down(F.gelu(self.up(self.norm(pooled)))) + self.position)


def new_head(spec: HeadSpec, embedding_std: float, seed: int = 0) -> ProjectionHead:
    """A fresh head, the same for the same seed, whose output has the standard deviation of the decoder's
    token embeddings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ProjectionHead(spec)
        nn.init.normal_(head.position, std=0.02)
    nn.init.constant_(head.out_norm.weight, embedding_std)
    return head


def bind_head(spec: HeadSpec, tensors: dict[str, Tensor], *, where: str) -> ProjectionHead:
    """A head with exactly these weights.

    Raises:
        BindError: a tensor is missing, left over, or of another shape.
    """
    with torch.device("meta"):
        head = ProjectionHead(spec)
    expected = head.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise BindError("the head's tensor is missing", where=f"{where}: {name}")
        if name not in expected:
            raise BindError("no such tensor in this head", where=f"{where}: {name}")
        if expected[name].shape != tensors[name].shape:
            got, want = tuple(tensors[name].shape), tuple(expected[name].shape)
            raise BindError(f"shape {got}, expected {want}", where=f"{where}: {name}")
    head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return head.requires_grad_(False).eval()
