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
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from okavango.platform.errors import ConfigError, UnsupportedError
from okavango.training.quantized import check_library
from okavango.training.scores import ScoreName
from okavango.training.sources.source import is_hub

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from okavango.modalities.base import Base
    from okavango.modalities.projector import HeadSpec

ALL_LINEAR = "all-linear"
DEFAULT_EPOCHS = 5.0
_FRESH_STEPS = 600

ModalityName = Annotated[str, Field(pattern="^(image|audio)$")]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A table of the specification: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraSpec(Section):
    """PEFT's LoRA on the decoder.

    Attributes:
        train: false leaves the decoder as it is: heads and encoders alone learn.
        targets: "all-linear" (the output layer is none of them), a regular expression over whole module
            names, or a list of names or name endings, as in PEFT.
        init: "pissa" begins with the layers' largest singular values; the adapter has twice the rank then.
    """

    train: bool = True
    r: Annotated[int, Field(ge=1, le=256)] = 16
    alpha: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    targets: str | tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False
    init: Literal["default", "pissa"] = "default"


class EncoderLoraSpec(Section):
    """LoRA on an encoder. It is encoded anew in each step then, which takes many times as long.

    Attributes:
        targets: "all-linear", or endings of names of linear layers.
    """

    r: Annotated[int, Field(ge=1, le=256)] = 8
    alpha: Count = 16
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    lr: Positive = 2e-4


class HeadShape(Section):
    """A new projection head in place of the base's; what is not set is as the base's has it.

    Attributes: modalities.projector.HeadSpec's.
    """

    kind: Literal["mlp", "linear", "resampler"] | None = None
    pooling: Literal["mean", "stack"] | None = None
    tokens: Count | None = None
    stride: Count | None = None
    hidden: Count | None = None

    def over(self, default: HeadSpec) -> HeadSpec:
        """Raises ConfigError where the shape does not fit the encoder's features."""
        from dataclasses import replace

        chosen = {name: value for name, value in self.model_dump().items() if value is not None}
        if "stride" in chosen:
            if not default.stride:
                raise ConfigError("means nothing for pictures; choose tokens", where="heads.image.stride")
            chosen.setdefault("tokens", -(-default.grid[1] // chosen["stride"]))
        return replace(default, **chosen)


class HeadTrainSpec(Section):
    """Projection heads. With train = false the base's own are used as they are, and the bundle has none."""

    train: bool = True
    lr: Positive = 5e-4


class AlignSpec(Section):
    """The head's warm start: a contrastive loss between its output and the answers' token embeddings.

    Attributes:
        steps: 0 turns it off; where nothing is said, 600 for a fresh head and none for one that comes
            trained, which forgets by it what it knows.
        batch_size: pictures a step; each one's answer is told apart from the others'.
    """

    steps: Natural | None = None
    batch_size: Annotated[int, Field(ge=2)] = 256
    lr: Positive = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    temperature: Positive = 0.07

    def for_head(self, trained: bool) -> AlignSpec:
        """With its number of steps."""
        if self.steps is not None:
            return self
        return self.model_copy(update={"steps": 0 if trained else _FRESH_STEPS})


class JointSpec(Section):
    """A contrastive loss beside the generative one, between what heads make of media and the answers about
    them, in a space that /v1/embeddings then answers from. See modalities.embedding.

    Attributes:
        weight: of that loss, against the mean over answers' tokens; 0 turns it off.
        width: of the space.
        temperature: to begin with; it is learned.
        modality_dropout: share of media that the decoder does not get, so that it learns from text, too.
    """

    weight: Annotated[float, Field(ge=0)] = 0.0
    width: Count = 256
    temperature: Positive = 0.07
    modality_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class PrivacySpec(Section):
    """Differential privacy of the training rows: see training.privacy.

    Attributes:
        epsilon: that the whole run may spend; the noise follows from it.
        noise_multiplier: or the noise itself, in units of max_grad_norm; what it spends is reported.
        delta: the probability with which the promise may fail; well below one by the number of rows.
        max_grad_norm: to which each row's gradient is cut, in place of `clip`.
        eval_is_public: the held-out rows may be shown, and the run may go by them.
    """

    epsilon: Positive | None = None
    noise_multiplier: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    max_grad_norm: Positive = 1.0
    eval_is_public: bool = False

    @model_validator(mode="after")
    def _one_noise(self) -> PrivacySpec:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("set either epsilon or noise_multiplier")
        return self


class TrainSpec(Section):
    """A training job.

    Attributes:
        base: a base's name, or its folder.
        data, eval: datasets (training.sources.open); `eval` is held out, and scored at the end.
        hold_out: in place of `eval`, the share of the data's rows that is held out, drawn by the seed.
        format: of the data's rows (training.formats); found out from the first of them if not set.
        learn: of a row's answers, those without weight 0, or the last of them alone.
        name: the adapter that gets a new version.
        heads: by modality, heads of other shapes than the base's.
        encoders: by modality, those that LoRA adapts; the others stay frozen.
        steps, epochs: how long; at most one of them.
        batch_size: rows that are computed at a time; `accumulation` of such batches make a step.
        batch_tokens: in place of batch_size, as many rows as fit into so many tokens, padding included.
        processes: that take each step together, each with a share of its rows: see ranks.
        lr: of the LoRA factors; the head has its own.
        warmup: fraction of the steps over which the learning rates rise.
        router_loss: weight of the loss that spreads tokens over a mixture's experts; the base's own if not
            set.
        label_smoothing: share of each target that is spread over the vocabulary.
        views: altered views of each picture that are learned beside it (training.views).
        quantization: of the frozen decoder while it is trained on: see quantized.
        recompute: keep what goes into a layer alone, and compute the rest of it anew for the gradients: less
            memory, a third more work.
        precision: of the frozen decoder; what is trained is float32 always.
        max_length: most tokens of a row; the base's context if not set.
        system: default system prompt, for rows that have none of their own; the bundle brings it along.
        eval_every: steps between two looks at the held-out loss; only at the end if not set.
        eval_rows: most held-out rows that are answered and scored.
        keep: of what `eval_every` looked at, the last state or that of the lowest held-out loss.
        patience: end after so many looks without a lower held-out loss.
        scores: which ones (training.scores); what suits the data if not set.
        compare: score what the base says to the same rows, too.
        samples: answers that are shown, at each look.
        mlflow: whether the job is logged there; if not set, it is where the worker knows a server.
    """

    base: str
    data: Path
    eval: Path | None = None
    hold_out: Annotated[float | None, Field(gt=0, lt=1)] = None
    format: Literal["openai", "sharegpt", "llava", "alpaca"] | None = None
    learn: Literal["all", "last"] = "all"
    name: str
    lora: LoraSpec = LoraSpec()
    head: HeadTrainSpec = HeadTrainSpec()
    heads: dict[ModalityName, HeadShape] = {}
    encoders: dict[ModalityName, EncoderLoraSpec] = {}
    align: AlignSpec = AlignSpec()
    joint: JointSpec = JointSpec()
    privacy: PrivacySpec | None = None
    steps: Count | None = None
    epochs: Positive | None = None
    batch_size: Count = 16
    batch_tokens: Annotated[int | None, Field(ge=2)] = None
    accumulation: Count = 1
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    lr: Positive = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Positive = 1.0
    router_loss: Annotated[float | None, Field(ge=0)] = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    views: Natural = 3
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    quantization: Literal["nf4"] | None = None
    recompute: bool = False
    precision: Literal["auto", "bf16", "float32"] = "auto"
    max_length: Annotated[int | None, Field(ge=2)] = None
    system: str | None = None
    save_every: Count = 50
    eval_every: Count | None = None
    eval_rows: Count = 500
    keep: Literal["last", "best"] = "last"
    patience: Count | None = None
    scores: tuple[ScoreName, ...] = ()
    compare: bool = True
    max_new_tokens: Count = 64
    samples: Natural = 8
    mlflow: bool | None = None

    @model_validator(mode="after")
    def _heads_learn(self) -> TrainSpec:
        if self.heads and not self.head.train:
            raise ValueError("heads asks for new ones, which head.train = false leaves untrained")
        return self

    @model_validator(mode="after")
    def _something_learns(self) -> TrainSpec:
        if not (self.lora.train or self.head.train or self.encoders):
            raise ValueError("nothing learns: lora.train and head.train are false, and no encoder is named")
        return self

    @model_validator(mode="after")
    def _looks_are_taken(self) -> TrainSpec:
        if (self.keep == "best" or self.patience) and not (self.holds_out and self.eval_every):
            raise ValueError(
                "keep and patience go by the held-out loss: set eval or hold_out, and eval_every"
            )
        return self

    @model_validator(mode="after")
    def _held_out_once(self) -> TrainSpec:
        if self.eval is not None and self.hold_out is not None:
            raise ValueError("eval and hold_out are both set: choose one")
        return self

    @model_validator(mode="after")
    def _weights_are_whole(self) -> TrainSpec:
        if self.quantization and self.lora.init == "pissa":
            raise ValueError("lora.init pissa takes the weights apart, which quantization packs: choose one")
        return self

    @model_validator(mode="after")
    def _nothing_leaks(self) -> TrainSpec:
        if self.privacy is None:
            return self
        if self.joint.weight:
            raise ValueError("joint.weight: its loss compares rows, whose gradients privacy takes one by one")
        if self.align.steps:
            raise ValueError(
                "align.steps: the warm start learns from the rows without noise; privacy forbids it"
            )
        if self.hold_out:
            raise ValueError("hold_out: a row more or less would change which others are held out; set eval")
        if self.eval and not self.privacy.eval_is_public:
            raise ValueError("held-out rows are shown and scored: say privacy.eval_is_public, or set no eval")
        if self.clip != TrainSpec.model_fields["clip"].default:
            raise ValueError("clip: a private step is not cut; set privacy.max_grad_norm")
        if self.processes > 1:
            raise ValueError("processes: a private job runs in one")
        if self.router_loss:
            raise ValueError("router_loss: it is over a batch, whose rows privacy takes one by one")
        if self.batch_tokens:
            raise ValueError("batch_tokens: privacy draws rows by themselves, batch_size of them on average")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> TrainSpec:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both set: choose one")
        return self

    def total_steps(self, steps_an_epoch: int) -> int:
        """Optimiser steps in all."""
        if self.steps is not None:
            return self.steps
        return max(1, round((self.epochs or DEFAULT_EPOCHS) * steps_an_epoch))

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @property
    def holds_out(self) -> bool:
        """Whether there are rows that are not learned from."""
        return self.eval is not None or self.hold_out is not None


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
    """A specification file's values; paths in it are relative to the file, hub:… is none.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path)) from error
    for key in ("data", "eval"):
        if isinstance(raw.get(key), str) and not is_hub(raw[key]):
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
    if spec.router_loss is not None:
        _check_routes(base)
    if spec.quantization is not None:
        check_library()
    if spec.lora.train:
        check_targets(spec.lora.targets, base)
    if spec.privacy is not None:
        from okavango.training.privacy import check_accountant

        check_accountant()
    for modality, shape in spec.heads.items():
        _check_has(base, modality, "heads")
        shape.over(base.heads[modality].spec)
    for modality, lora in spec.encoders.items():
        _check_has(base, modality, "encoders")
        _check_encoder_targets(lora, base, modality)


def _check_routes(base: Base) -> None:
    from okavango.modalities.base import empty_decoder
    from okavango.training.routing import routing_of

    if routing_of(empty_decoder(base)) is None:
        message = f"the decoder of base {base.name!r} has no routers that a loss balances"
        raise UnsupportedError(message, where="router_loss")


def _check_has(base: Base, modality: str, section: str) -> None:
    if modality not in base.encoders:
        raise UnsupportedError(f"base {base.name!r} has no {modality} encoder", where=f"{section}.{modality}")


def _check_encoder_targets(lora: EncoderLoraSpec, base: Base, modality: str) -> None:
    from okavango.modalities.adapted import encoder_targets

    where = f"encoders.{modality}.targets"
    names = [target.name for target in encoder_targets(base.encoders[modality])]
    if not names:
        raise UnsupportedError("the encoder has no linear layer that can be adapted", where=where)
    for ending in () if lora.targets == ALL_LINEAR else lora.targets:
        if not ending_in(ending, names):
            message = f"{ending!r} matches no linear layer of the encoder"
            raise _unserved(message, ending, set(names), where)


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
        return ending_in(pattern, modules)
    try:
        return [name for name in modules if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}", where="lora.targets") from error


def ending_in(pattern: str, names: Sequence[str]) -> list[str]:
    """Names that are the pattern, or end in it after a dot."""
    return [name for name in names if name == pattern or name.endswith(f".{pattern}")]


def _unserved(message: str, pattern: str, served: set[str], where: str = "lora.targets") -> UnsupportedError:
    endings = sorted({name.rpartition(".")[2] for name in served})
    close = difflib.get_close_matches(pattern, endings, n=1)
    remedy = f"did you mean {close[0]}?" if close else "layers that can be adapted: " + ", ".join(endings)
    return UnsupportedError(message, where=where, remedy=remedy)


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
    section: Any = TrainSpec
    for part in loc[:-1]:
        if get_origin(section) is dict:
            section = get_args(section)[1]
        else:
            section = section.model_fields[str(part)].annotation
            section = next((each for each in get_args(section) if hasattr(each, "model_fields")), section)
    known = sorted(section.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"did you mean {close[0]}?" if close else "known are " + ", ".join(known)
