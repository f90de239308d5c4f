"""What a training job is told: written by users as TOML or flags, kept in the job's row, and in the lineage.

Pydantic reads it at the edge; unknown keys fail with the nearest known one named. What can be refused before
a job takes compute is refused by `check_spec`.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from okavango.platform.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from okavango.modalities.base import Base

ALL_LINEAR = "all-linear"
DEFAULT_EPOCHS = 5.0

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A table of the specification: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraSpec(Section):
    """PEFT's LoRA.

    Attributes:
        targets: "all-linear" (the output layer is none of them), a regular expression over whole module
            names, or a list of names or name endings, as in PEFT.
    """

    r: Annotated[int, Field(ge=1, le=256)] = 16
    alpha: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    targets: str | tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False


class HeadTrainSpec(Section):
    """The projection head. With train = false the base's own is used as it is, and the bundle has none."""

    train: bool = True
    lr: Positive = 5e-4


class AlignSpec(Section):
    """The head's warm start: a contrastive loss between its output and the answers' token embeddings.

    Attributes:
        steps: 0 turns it off.
        batch_size: pictures a step; each one's answer is told apart from the others'.
    """

    steps: Natural = 600
    batch_size: Annotated[int, Field(ge=2)] = 256
    lr: Positive = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    temperature: Positive = 0.07


class TrainSpec(Section):
    """A training job.

    Attributes:
        base: a base's name, or its folder.
        data, eval: datasets; `eval` is held out, and scored at the end.
        name: the adapter that gets a new version.
        steps, epochs: how long; at most one of them.
        batch_size: rows that are computed at a time; `accumulation` of them make a step.
        lr: of the LoRA factors; the head has its own.
        warmup: fraction of the steps over which the learning rates rise.
        label_smoothing: share of each target that is spread over the vocabulary.
        views: altered views of each picture that are learned beside it (training.views).
        precision: of the frozen decoder; what is trained is float32 always.
        max_length: most tokens of a row; the base's context if not set.
        system: default system prompt, for rows that have none of their own; the bundle brings it along.
        eval_every: steps between two looks at the held-out loss; only at the end if not set.
        eval_rows: most held-out rows that are answered and scored.
        samples: answers that are shown.
    """

    base: str
    data: Path
    eval: Path | None = None
    name: str
    lora: LoraSpec = LoraSpec()
    head: HeadTrainSpec = HeadTrainSpec()
    align: AlignSpec = AlignSpec()
    steps: Count | None = None
    epochs: Positive | None = None
    batch_size: Count = 16
    accumulation: Count = 1
    lr: Positive = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Positive = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    views: Natural = 3
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    precision: Literal["auto", "bf16", "float32"] = "auto"
    max_length: Annotated[int | None, Field(ge=2)] = None
    system: str | None = None
    save_every: Count = 50
    eval_every: Count | None = None
    eval_rows: Count = 500
    max_new_tokens: Count = 64
    samples: Natural = 8

    @model_validator(mode="after")
    def _one_length(self) -> TrainSpec:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both set: choose one")
        return self

    def total_steps(self, rows: int) -> int:
        """Optimiser steps over a dataset of that many rows."""
        if self.steps is not None:
            return self.steps
        a_epoch = -(-rows // (self.batch_size * self.accumulation))
        return max(1, round((self.epochs or DEFAULT_EPOCHS) * a_epoch))

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def parse_spec(raw: Mapping[str, Any], where: str | None = None) -> TrainSpec:
    """A specification from plain values.

    Raises:
        ConfigError: with every fault in it, unknown keys with the nearest known one.
    """
    try:
        return TrainSpec.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("; ".join(_faults(error)), where=where) from error


def read_toml(path: Path) -> dict[str, Any]:
    """A specification file's values; paths in it are relative to the file.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path)) from error
    for key in ("data", "eval"):
        if isinstance(raw.get(key), str):
            raw[key] = str(path.parent / raw[key])
    return raw


def check_spec(spec: TrainSpec, base: Base) -> None:
    """What can be told of a job without its data.

    Raises:
        InputError: the adapter's name breaks the rule.
        ConfigError: rows longer than the base's context are asked for.
        UnsupportedError: a target that matches nothing, or that the engine cannot serve.
    """
    from okavango.platform.catalog.names import check_name

    check_name(spec.name, "adapter")
    if spec.max_length is not None and spec.max_length > base.decoder.context:
        raise ConfigError(
            f"{spec.max_length} tokens, but base {base.name!r} takes {base.decoder.context}",
            where="max_length",
        )
    check_targets(spec.lora.targets, base)


def check_targets(targets: str | Sequence[str], base: Base) -> None:
    """Raises UnsupportedError unless every target names linear layers that are served."""
    from okavango.modalities.base import empty_decoder
    from okavango.modalities.lora import find_targets

    decoder = empty_decoder(base)
    served = {target.name for target in find_targets(decoder)}
    _refuse_experts(targets, decoder, served)
    if targets == ALL_LINEAR:
        return
    modules = [name for name, _ in decoder.named_modules()]
    for pattern in (targets,) if isinstance(targets, str) else targets:
        found = _matches(pattern, modules, whole=isinstance(targets, str))
        if not found:
            raise _unserved(f"{pattern!r} matches no layer of the decoder", pattern, served)
        other = sorted(set(found) - served)
        if other:
            raise _unserved(f"{pattern!r} matches {other[0]}, which cannot be adapted", pattern, served)
    if not targets:
        raise _unserved("names no layer", "", served)


def _refuse_experts(targets: str | Sequence[str], decoder: PreTrainedModel, served: set[str]) -> None:
    """PEFT takes some names, and "all-linear", for a mixture's routed experts, which are not served."""
    if not _reads_as_experts(targets, decoder):
        return
    endings = sorted({name.rpartition(".")[2] for name in served})
    usable = [ending for ending in endings if not _reads_as_experts([ending], decoder)]
    raise UnsupportedError(
        "PEFT takes them for routed experts, which are not served",
        where="lora.targets",
        remedy=f"layers that can be adapted: {', '.join(usable)}",
    )


def _reads_as_experts(targets: str | Sequence[str], decoder: PreTrainedModel) -> bool:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    names = targets if isinstance(targets, str) else list(targets)
    try:
        config = LoraConfig(target_modules=names)
        convert_peft_config_for_transformers(config, decoder, None)
    except re.error:
        return False  # no regular expression: said elsewhere
    except ValueError:  # one of the experts' projections without the others
        return True
    return bool(config.target_parameters)


def _matches(pattern: str, modules: Sequence[str], *, whole: bool) -> list[str]:
    """As PEFT does: one string is a regular expression over a whole name, of a list each is an ending."""
    if not whole:
        return [name for name in modules if name == pattern or name.endswith(f".{pattern}")]
    try:
        return [name for name in modules if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}", where="lora.targets") from error


def _unserved(message: str, pattern: str, served: set[str]) -> UnsupportedError:
    endings = sorted({name.rpartition(".")[2] for name in served})
    close = difflib.get_close_matches(pattern, endings, n=1)
    remedy = f"did you mean {close[0]}?" if close else "layers that can be adapted: " + ", ".join(endings)
    return UnsupportedError(message, where="lora.targets", remedy=remedy)


def _faults(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"] if part not in ("str", "tuple[str, ...]"))
        if fault["type"] == "extra_forbidden":
            yield f"{place}: unknown key; {_nearest(fault['loc'])}"
        elif fault["type"] == "missing":
            yield f"{place}: is missing"
        else:
            text = fault["msg"].removeprefix("Value error, ")
            yield f"{place}: {text}" if place else text


def _nearest(loc: Sequence[int | str]) -> str:
    section: type[BaseModel] = TrainSpec
    for part in loc[:-1]:
        inner = section.model_fields[str(part)].annotation
        assert isinstance(inner, type)
        section = inner
    known = sorted(section.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"did you mean {close[0]}?" if close else "known are " + ", ".join(known)
