"""Batched LoRA for serving: adapters in slots, a slot a token, mixed in one forward.

`SlotArena` owns the tensors: slot-major, so that one adapter is one contiguous row and a swap is one copy.
`SlotLinear` wraps a decoder's linear layer once, when the engine starts; no module is replaced later.
Which adapter sits in which slot is decided elsewhere (serving.adapters.slots). Training uses PEFT.
"""

# Shapes: T tokens in the step, S slots, R rank of the arena, r rank of an adapter, I in, O out features

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from okavango.modalities.memory import lazy_zeros
from okavango.platform.errors import BindError, UnsupportedError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_REFUSED = (
    "use_dora",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "arrow_config",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
)
# initialisations that change the base's own weights, so that the factors mean nothing without them
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Target:
    """A linear layer that adapters may adapt, by its name in the decoder."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class LoraWeights:
    """One adapter's factors on the host.

    Attributes:
        factors: by target name: A [r, I] and B transposed [r, O], the scale multiplied into B.
        rank: the largest r among them.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    rank: int


@dataclass
class StepSlots:
    """Which of the step's `rows` belong to which slot: (slot, first row, end row), rows of one slot adjacent.

    Rows that no segment covers run on the bare base. Shared by every SlotLinear of one decoder.
    """

    segments: Sequence[tuple[int, int, int]] = ()
    rows: int = 0


class SlotArena:
    """A[S, R, I] and B[S, R, O] of every target, as views into one tensor whose rows are slots."""

    def __init__(
        self, targets: Sequence[Target], slots: int, rank: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.rank = rank
        self.slots = slots
        width = sum(rank * (t.in_features + t.out_features) for t in targets)
        self._rows = lazy_zeros((slots, width), dtype, device)
        self._views = dict(self._make_views(targets, width))
        self.ranks: list[dict[str, int]] = [{} for _ in range(slots)]

    def _make_views(
        self, targets: Sequence[Target], width: int
    ) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        offset = 0
        for target in targets:
            views = []
            for features in (target.in_features, target.out_features):
                shape = (self.slots, self.rank, features)
                views.append(self._rows.as_strided(shape, (width, features, 1), offset))
                offset += self.rank * features
            yield target.name, (views[0], views[1])

    def views(self, name: str) -> tuple[Tensor, Tensor]:
        return self._views[name]

    def write(self, slot: int, weights: LoraWeights) -> None:
        """Put an adapter into a slot; its former tenant is gone."""
        if weights.rank > self.rank:
            raise UnsupportedError(
                f"rank {weights.rank} is over the server's limit of {self.rank}",
                remedy=f"okavango serve --max-rank {weights.rank}",
            )
        for name, (a, b) in weights.factors.items():
            rank = a.shape[0]
            self._views[name][0][slot, :rank].copy_(a)
            self._views[name][1][slot, :rank].copy_(b)
        self.ranks[slot] = {name: a.shape[0] for name, (a, _) in weights.factors.items()}


class SlotLinear(nn.Module):
    """A linear layer whose rows each get their own slot's low-rank update: y + (x Aᵀ) B."""

    def __init__(self, base: nn.Module, name: str, arena: SlotArena, step: StepSlots) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.a, self.b = arena.views(name)
        self.ranks = arena.ranks
        self.step = step

    def forward(self, x: Tensor) -> Tensor:  # [..., T, I] → [..., T, O]
        y = self.base(x)
        if not self.step.segments:
            return y
        rows_in, rows_out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if len(rows_in) != self.step.rows:  # an expert's, say: whose rows they are cannot be told
            raise UnsupportedError(
                f"sees {len(rows_in)} of the step's {self.step.rows} rows", where=self.name
            )
        for slot, start, end in self.step.segments:
            rank = self.ranks[slot].get(self.name, 0)
            if rank:
                low = rows_in[start:end] @ self.a[slot, :rank].T
                rows_out[start:end].addmm_(low, self.b[slot, :rank])
        return y


def find_targets(decoder: nn.Module) -> tuple[Target, ...]:
    """Every linear layer that an adapter may adapt: all but the output layer, whose rows are others."""
    output = decoder.get_output_embeddings()  # type: ignore[operator]
    return tuple(
        Target(name, *_features(module))
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output
    )


def install(decoder: nn.Module, arena: SlotArena, step: StepSlots, targets: Sequence[Target]) -> None:
    """Wrap the decoder's target layers, once."""
    for target in targets:
        parent, _, child = target.name.rpartition(".")
        owner = decoder.get_submodule(parent)
        setattr(owner, child, SlotLinear(getattr(owner, child), target.name, arena, step))


def read_peft(folder: Path, targets: Sequence[Target]) -> LoraWeights:
    """A PEFT LoRA directory as factors that fit the targets, every tensor bound.

    Raises:
        UnsupportedError: the adapter uses something that the engine cannot serve.
        BindError: a tensor fits no target, a target lacks its tensors, or a shape is wrong.
    """
    config = _read_config(folder)
    shapes = {target.name: target for target in targets}
    pairs = _pairs(folder)
    _check_names(config, set(pairs), set(shapes), folder)
    factors = {}
    for name, pair in pairs.items():
        a, b = _checked(pair, shapes[name], config, folder)
        factors[name] = (a, b.T.contiguous() * _scale(config, name))
    return LoraWeights(factors, max(a.shape[0] for a, _ in factors.values()))


def _read_config(folder: Path) -> LoraConfig:
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BindError(f"not a PEFT adapter: {error}", where=str(folder / CONFIG)) from error
    if not isinstance(config, LoraConfig):
        raise UnsupportedError(
            f"PEFT type {config.peft_type.value} is not served; only LORA is", where=str(folder / CONFIG)
        )
    for option in _REFUSED:
        if getattr(config, option, None):
            raise UnsupportedError(f"{option} is not served", where=str(folder / CONFIG))
    if str(config.init_lora_weights).lower().startswith(_CHANGES_BASE):
        raise UnsupportedError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base's weights",
            where=str(folder / CONFIG),
            remedy="convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)",
        )
    if config.bias != "none":
        raise UnsupportedError(f"bias={config.bias!r} is not served", where=str(folder / CONFIG))
    return config


def _pairs(folder: Path) -> dict[str, dict[str, Tensor]]:
    """{target name: {"A": [r, I], "B": [O, r]}} in float32."""
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise BindError(f"cannot be read: {error}", where=str(folder / WEIGHTS)) from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, factor = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if not key.startswith(_PREFIX) or factor not in ("A", "B"):
            raise BindError("is no LoRA factor", where=f"{WEIGHTS}: {key}")
        pairs.setdefault(name, {})[factor] = tensor.float()
    if not pairs:
        raise BindError("holds no tensors", where=str(folder / WEIGHTS))
    return pairs


def _check_names(config: LoraConfig, found: set[str], known: set[str], folder: Path) -> None:
    for name in sorted(found - known):
        raise BindError(
            "no such linear layer in this base's decoder, or one that cannot be adapted",
            where=f"{WEIGHTS}: {name}",
        )
    for name in sorted(known - found):
        if check_target_module_exists(config, name):
            raise BindError(f"{CONFIG} names this layer, but has no tensors for it", where=name)


def _checked(
    pair: dict[str, Tensor], target: Target, config: LoraConfig, folder: Path
) -> tuple[Tensor, Tensor]:
    where = f"{WEIGHTS}: {target.name}"
    if pair.keys() != {"A", "B"}:
        raise BindError(f"only lora_{next(iter(pair))} is there", where=where)
    rank = _lookup(config.rank_pattern, target.name, config.r)
    want_a, want_b = (rank, target.in_features), (target.out_features, rank)
    if tuple(pair["A"].shape) != want_a or tuple(pair["B"].shape) != want_b:
        got = f"A {tuple(pair['A'].shape)}, B {tuple(pair['B'].shape)}"
        raise BindError(f"shapes {got}, expected A {want_a}, B {want_b}", where=where)
    if not (pair["A"].isfinite().all() and pair["B"].isfinite().all()):
        raise BindError("holds values that are not finite", where=where)
    return pair["A"], pair["B"]


def _scale(config: LoraConfig, name: str) -> float:
    rank = _lookup(config.rank_pattern, name, config.r)
    alpha = _lookup(config.alpha_pattern, name, config.lora_alpha)
    return float(alpha / rank**0.5 if config.use_rslora else alpha / rank)


def _lookup(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), default)


def _features(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return rows, columns
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features
