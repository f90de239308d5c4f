"""Projection heads: encoder features → decoder embeddings.

A head is two stages. `pool` has no weights and is the same for every adapter over one encoder and one way of
pooling, so its output is what training caches; `ProjectionHead` has the weights, which a bundle may bring.

A picture's features are one map of a fixed grid, or several, one after another, where it was cut into tiles.
A sound's are a sequence of any length. Either is cut into groups that a head turns into embeddings each for
itself, so that nothing depends on what else is in a batch:

    kind       a map                               a sequence
    mlp        tokens squares of it, together      stride positions
    linear     the same                            the same
    resampler  the whole map, seen by queries      stride positions, seen by one query
    identity   features are embeddings already: pretrained connectors are part of their encoder
"""

# Shapes: N positions of a medium, C encoder width, G groups, S positions of a group after pooling,
#         E width after pooling, K embeddings a group, D decoder width, Q queries, W resampler width

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okavango.platform.errors import BindError, ConfigError

Kind = Literal["mlp", "linear", "resampler", "identity"]
Pooling = Literal["mean", "stack"]
_HEAD_WIDTH = 64  # of a resampler's attention
_RESAMPLER_LAYERS = 2


@dataclass(frozen=True)
class HeadSpec:
    """A projection head's shape.

    Attributes:
        in_width: C, channels of the encoder's features.
        out_width: D, the decoder's width.
        grid: rows and columns of the encoder's feature map; of a sequence, 1 and the most of one window.
        tokens: decoder tokens of a whole grid; an mlp's and a linear head's tile a map in a square.
        hidden: width of the hidden layer, or of the resampler; nothing to the other kinds.
        kind, pooling: see the module; mean averages a square or stride, stack joins its positions' channels.
        stride: positions a token where the features are a sequence; 0 where they are maps.
    """

    in_width: int
    out_width: int
    grid: tuple[int, int]
    tokens: int
    hidden: int
    kind: Kind = "mlp"
    pooling: Pooling = "mean"
    stride: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        for name, known in (("kind", get_args(Kind)), ("pooling", get_args(Pooling))):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} {getattr(self, name)!r}; one of {', '.join(known)} is expected",
                    where=f"projectors.{name}",
                )
        if self.kind == "identity":
            self._check_identity()
        elif self.stride:
            self._check_sequence()
        else:
            self._check_map()
        if self.kind == "resampler" and (self.hidden < 1 or self.hidden % _HEAD_WIDTH):
            raise ConfigError(
                f"a resampler of width {self.hidden}",
                where="projectors.hidden",
                remedy=f"choose a multiple of {_HEAD_WIDTH}",
            )

    def _check_identity(self) -> None:
        if self.in_width != self.out_width:
            raise ConfigError(
                f"features of width {self.in_width} are no embeddings of width {self.out_width}",
                where="projectors.kind",
                remedy="choose mlp, linear or resampler",
            )

    def _check_sequence(self) -> None:
        if self.stride < 1 or self.tokens != -(-self.grid[1] // self.stride):
            raise ConfigError(
                f"{self.tokens} tokens are not {self.grid[1]} positions, {self.stride} a token",
                where="projectors.stride",
            )

    def _check_map(self) -> None:
        if self.kind == "resampler":
            if self.tokens < 1:
                raise ConfigError(f"{self.tokens} tokens", where="projectors.tokens", remedy="1 or more")
            return
        side = self.side
        if side < 1 or side * side != self.tokens or self.grid[0] % side or self.grid[1] % side:
            raise ConfigError(
                f"{self.tokens} tokens do not tile a feature map of {self.grid[0]} × {self.grid[1]}",
                where="projectors.tokens",
                remedy="choose a square number whose root divides both sides",
            )

    @property
    def side(self) -> int:
        """Squares of a map along either side."""
        return round(max(self.tokens, 0) ** 0.5)

    @property
    def positions(self) -> int:
        """Of one map, or of a sequence's longest window."""
        return self.grid[0] * self.grid[1]

    @property
    def pooled_width(self) -> int:
        """E."""
        if self.pooling == "mean" or self.kind in ("resampler", "identity"):
            return self.in_width
        return self.in_width * (self.stride or self.positions // self.tokens)

    def tokens_of(self, positions: int) -> int:
        """Decoder tokens of a medium that has so many positions."""
        if self.kind == "identity":
            return positions
        if self.stride:
            return -(-positions // self.stride)
        return positions // self.positions * self.tokens

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"grid": list(self.grid)}

    @property
    def pooling_key(self) -> str:
        """What `pool` makes of features hangs on this alone."""
        grid = "x".join(map(str, self.grid))
        if self.kind in ("resampler", "identity"):
            return f"{grid}-whole-{self.stride}"
        return f"{grid}-{self.tokens}-{self.pooling}-{self.stride}"


def pool(features: Tensor, spec: HeadSpec) -> Tensor:
    """A medium's features [N, C] → what the head takes [G, S, E]."""
    if spec.kind == "identity":
        return features[None]
    if spec.stride:
        return _pool_sequence(features, spec)
    maps = features.unflatten(0, (-1, *spec.grid))
    if spec.kind == "resampler":
        return maps.flatten(1, 2)
    side, (rows, columns) = spec.side, spec.grid
    squares = maps.unflatten(2, (side, columns // side)).unflatten(1, (side, rows // side))
    squares = squares.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [G, S, positions of a square, C]
    return squares.mean(2) if spec.pooling == "mean" else squares.flatten(2)


def _pool_sequence(features: Tensor, spec: HeadSpec) -> Tensor:
    missing = -len(features) % spec.stride
    strides = F.pad(features, (0, 0, 0, missing)).unflatten(0, (-1, spec.stride))
    if spec.kind == "resampler":
        return strides
    if spec.pooling == "stack":
        return strides.flatten(1)[:, None]
    present = torch.full((len(strides), 1), float(spec.stride), device=features.device)
    present[-1] -= missing
    return (strides.sum(1) / present)[:, None]


class ProjectionHead(nn.Module):
    """Pooled features [G, S, E] → decoder embeddings [G, K, D], scaled by a learned norm, so that a fresh
    head speaks at the loudness of the decoder's own token embeddings."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec


class MlpHead(ProjectionHead):
    """LayerNorm → Linear → GELU → Linear, or one Linear, and for maps a position embedding a square."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        self.norm = nn.LayerNorm(spec.pooled_width)
        width = spec.hidden if spec.kind == "mlp" else spec.pooled_width
        if spec.kind == "mlp":
            self.up = nn.Linear(spec.pooled_width, width)
        self.down = nn.Linear(width, spec.out_width)
        if not spec.stride:
            self.position = nn.Parameter(torch.zeros(spec.tokens, spec.out_width))
        self.out_norm = nn.LayerNorm(spec.out_width)

    def forward(self, pooled: Tensor) -> Tensor:
        x = self.norm(pooled)
        if self.spec.kind == "mlp":
            x = F.gelu(self.up(x))
        x = self.down(x)
        return cast("Tensor", self.out_norm(x if self.spec.stride else x + self.position))


class Resampler(ProjectionHead):
    """Learned queries that look at a group's positions (Perceiver IO, Jaegle et al. 2021; Flamingo, Alayrac
    et al. 2022): in each layer they attend to positions and each other, then pass a feed-forward layer."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        queries, seen = (1, spec.stride) if spec.stride else (spec.tokens, spec.positions)
        self.norm = nn.LayerNorm(spec.in_width)
        self.up = nn.Linear(spec.in_width, spec.hidden)
        self.seen_position = nn.Parameter(torch.zeros(seen, spec.hidden))
        self.query = nn.Parameter(torch.zeros(queries, spec.hidden))
        self.layers = nn.ModuleList(_Look(spec.hidden) for _ in range(_RESAMPLER_LAYERS))
        self.down = nn.Linear(spec.hidden, spec.out_width)
        self.out_norm = nn.LayerNorm(spec.out_width)

    def forward(self, pooled: Tensor) -> Tensor:
        seen = self.up(self.norm(pooled)) + self.seen_position
        x = self.query.expand(len(pooled), -1, -1)
        for layer in self.layers:
            x = layer(x, seen)
        return cast("Tensor", self.out_norm(self.down(x)))


class _Look(nn.Module):
    """One layer of a resampler: queries [G, Q, W] over positions [G, S, W] → [G, Q, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // _HEAD_WIDTH
        self.norm = nn.LayerNorm(width)
        self.seen_norm = nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.last_norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        own = self.norm(x)
        both = torch.cat([self.seen_norm(seen), own], 1)
        query, key, value = (
            layer(part).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, part in ((self.query, own), (self.key, both), (self.value, both))
        )
        looked = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(looked.transpose(1, 2).flatten(2))
        return cast("Tensor", x + self.down(F.gelu(self.up(self.last_norm(x)))))


class IdentityHead(ProjectionHead):
    """Embeddings as the encoder made them."""

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled


def make_head(spec: HeadSpec) -> ProjectionHead:
    """A head of the spec's kind with whatever weights torch draws."""
    kinds = {"mlp": MlpHead, "linear": MlpHead, "resampler": Resampler, "identity": IdentityHead}
    return kinds[spec.kind](spec)


def new_head(spec: HeadSpec, embedding_std: float, seed: int = 0) -> ProjectionHead:
    """A fresh head, the same for the same seed, whose output has the standard deviation of the decoder's
    token embeddings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = make_head(spec)
        for name, parameter in head.named_parameters():
            if name in ("position", "seen_position", "query"):
                nn.init.normal_(parameter, std=0.02)
    out_norm = getattr(head, "out_norm", None)
    if out_norm is not None:
        nn.init.constant_(out_norm.weight, embedding_std)
    return head


def bind_head(spec: HeadSpec, tensors: dict[str, Tensor], *, where: str) -> ProjectionHead:
    """A head with exactly these weights.

    Raises:
        BindError: a tensor is missing, left over, or of another shape.
    """
    with torch.device("meta"):
        head = make_head(spec)
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
