"""PEFT's adapter directories, as save_pretrained writes them → factors for slots, every tensor bound."""

# Shapes: r rank of an adapter, I in, O out features

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from okavango.modalities.lora import LoraWeights, Target
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
