"""PEFT's adapter directories, as save_pretrained writes them → factors for slots, every tensor bound."""

# Shapes: r rank of an adapter, I in, O out features

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
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
_SHOWN = 20  # names in one message
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "training modules whole, as embeddings and output layer,",
    "target_parameters": "LoRA on bare parameters, as those of routed experts,",
    "trainable_token_indices": "training single tokens' embeddings",
    "layer_replication": "repeating layers",
    "lora_bias": "a bias of LoRA's own",
    "alora_invocation_tokens": "LoRA that begins at a token",
    "use_qalora": "QALoRA",
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# what PEFT calls tensors that are no factors of a linear layer
_OTHER_TENSORS = {
    "lora_embedding_": "LoRA on embeddings",
    "lora_magnitude_vector": "DoRA",
    "token_adapter": "training single tokens' embeddings",
}
_MERGE = "merge it into its base with PEFT's merge_and_unload, and serve that as a base"
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
    _check_names(config, set(pairs), set(shapes))
    factors = {}
    for name in list(pairs):  # what was read goes as it is taken over
        factors[name] = _scaled(pairs.pop(name), shapes[name], config)
    return LoraWeights(factors, max(a.shape[0] for a, _ in factors.values()))


def _read_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG
    raw = _read_json(path)
    kind = raw.get("peft_type", "LORA")
    if kind != "LORA":
        raise UnsupportedError(f"PEFT type {kind} is not served; only LoRA is", where=str(path))
    _check_known(raw, path)
    try:
        config = LoraConfig(**raw)
    except (ImportError, TypeError, ValueError) as error:
        raise BindError(f"not a PEFT adapter: {error}", where=str(path)) from error
    _check_options(config, path)
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise BindError(f"not a PEFT adapter: {error}", where=str(path)) from error


def _check_known(raw: dict[str, Any], path: Path) -> None:
    """PEFT would ignore an option that it does not know, and with it perhaps what the factors mean."""
    known = {field.name for field in fields(LoraConfig)}
    for option in raw.keys() - known:
        if raw.pop(option):
            raise UnsupportedError(
                f"{option}: no such option in PEFT {version('peft')}",
                where=str(path),
                remedy="upgrade PEFT, if a newer one made the adapter",
            )


def _check_options(config: LoraConfig, path: Path) -> None:
    for option, what in _REFUSED.items():
        if getattr(config, option, None):
            raise UnsupportedError(f"{option}: {what} is not served", where=str(path), remedy=_MERGE)
    if str(config.init_lora_weights).lower().startswith(_CHANGES_BASE):
        raise UnsupportedError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base's weights",
            where=str(path),
            remedy="convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)",
        )
    if config.bias != "none":
        raise UnsupportedError(f"bias={config.bias!r} is not served", where=str(path), remedy=_MERGE)


def _pairs(folder: Path) -> dict[str, dict[str, Tensor]]:
    """{target name: {"A": [r, I], "B": [O, r]}} in float32."""
    pairs: dict[str, dict[str, Tensor]] = {}
    unbound = []
    for key, tensor in _tensors(folder).items():
        name, _, factor = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if key.startswith(_PREFIX) and factor in ("A", "B"):
            pairs.setdefault(name, {})[factor] = tensor.float()
        else:
            unbound.append(key)
    for mark, what in _OTHER_TENSORS.items():
        found = [key for key in unbound if mark in key]
        if found:
            raise UnsupportedError(f"{what} is not served: {_named(found)}", where=WEIGHTS, remedy=_MERGE)
    if unbound:
        raise BindError(f"holds what is no LoRA factor: {_named(unbound)}", where=WEIGHTS)
    if not pairs:
        raise BindError("holds no tensors", where=str(folder / WEIGHTS))
    return pairs


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    pickled = path.with_suffix(".bin")
    if pickled.is_file() and not path.is_file():
        raise UnsupportedError(
            "is a pickle, which is never loaded",
            where=str(pickled),
            remedy="load it with PEFT where you trust it, and save_pretrained it again",
        )
    try:
        # Not mapped: safetensors 0.8 never frees two numbers of each tensor that it maps, which adapters that
        # come and go for days would feel; and what is read needs its file no more.
        return load_file(path, backend="pread")
    except (OSError, SafetensorError) as error:
        raise BindError(f"cannot be read: {error}", where=str(path)) from error


def _check_names(config: LoraConfig, found: set[str], known: set[str]) -> None:
    unbound = sorted(found - known)
    experts = [name for name in unbound if ".experts." in name]
    if experts:
        raise UnsupportedError(
            f"LoRA on routed experts is not served: {_named(experts)}",
            where=WEIGHTS,
            remedy="adapt attention and shared experts only",
        )
    if unbound:
        raise BindError(
            f"{len(unbound)} of its {len(found)} layers are no linear layers of this base's decoder that can "
            f"be adapted: {_named(unbound)}",
            where=WEIGHTS,
            remedy="was it trained on another base? the output layer cannot be adapted, either",
        )
    missing = sorted(name for name in known - found if check_target_module_exists(config, name))
    if missing:
        raise BindError(
            f"{CONFIG} names layers, but the file has no tensors for them: {_named(missing)}", where=WEIGHTS
        )


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _scaled(pair: dict[str, Tensor], target: Target, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """A layer's A [r, I] and its B [r, O], times the scale."""
    where = f"{WEIGHTS}: {target.name}"
    if pair.keys() != {"A", "B"}:
        raise BindError(f"only lora_{next(iter(pair))} is there", where=where)
    rank = _lookup(config.rank_pattern, target.name, config.r)
    want_a, want_b = (rank, target.in_features), (target.out_features, rank)
    if tuple(pair["A"].shape) != want_a or tuple(pair["B"].shape) != want_b:
        got = f"A {tuple(pair['A'].shape)}, B {tuple(pair['B'].shape)}"
        raise BindError(f"shapes {got}, expected A {want_a}, B {want_b}", where=where)
    a, b = pair["A"], pair["B"].T.contiguous() * _scale(config, target.name)
    # Others' rows may be multiplied by what is here as zeros, and zero times infinity is nan. bfloat16 ends a
    # little before float32.
    if not all(bound.bfloat16().isfinite() for factor in (a, b) for bound in factor.aminmax()):
        raise BindError("holds values that are not finite in bfloat16, its scale applied", where=where)
    return a, b


def _scale(config: LoraConfig, name: str) -> float:
    rank = _lookup(config.rank_pattern, name, config.r)
    alpha = _lookup(config.alpha_pattern, name, config.lora_alpha)
    return float(alpha / rank**0.5 if config.use_rslora else alpha / rank)


def _lookup(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), default)
