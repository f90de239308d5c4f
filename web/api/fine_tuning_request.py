"""The body of a fine-tuning job: OpenAI's fields and ours, read into a training specification."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from okavango.platform.errors import ConfigError, InputError, NotFoundError, UnsupportedError
from okavango.platform.stored import is_file_id
from okavango.training.spec import HeadTrainSpec, TrainSpec, parse_spec
from okavango.web.api.body import parse_body

_MOST_LABELS, _MOST_KEY, _MOST_VALUE = 16, 64, 512
_OURS = "okavango"
# Said by OpenAI's own fields, or not the caller's to say.
_TAKEN = {"base": "model", "data": "training_file", "eval": "validation_file", "seed": "seed"}

Auto = Literal["auto"]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Hyperparameters(_Closed):
    """`learning_rate_multiplier`: of the default rates."""

    n_epochs: Auto | int | None = None
    batch_size: Auto | int | None = None
    learning_rate_multiplier: Auto | float | None = None


class Supervised(_Closed):
    hyperparameters: Hyperparameters | None = None


class Method(_Closed):
    type: str
    supervised: Supervised | None = None
    dpo: Any = None
    reinforcement: Any = None


class JobRequest(_Closed):
    """OpenAI's schema; `okavango` holds a specification's other settings, name and priority."""

    model: str
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    suffix: str | None = Field(None, max_length=64)
    seed: int | None = None
    metadata: dict[str, str] | None = None
    integrations: Any = None
    okavango: dict[str, Any] | None = None


@dataclass(frozen=True)
class AskedJob:
    """`labels`: OpenAI's metadata."""

    spec: TrainSpec
    labels: Mapping[str, str]
    priority: int


def parse_job(raw: bytes, base: str) -> AskedJob:
    """A request's body → what is asked of this server, whose base has that name.

    Raises:
        InputError: the first thing that is wrong, with the field that it is in.
        NotFoundError: another model.
        UnsupportedError: a method or an integration that there is none of here.
    """
    body = parse_body(JobRequest, raw)
    if body.model != base:
        raise NotFoundError(
            f"{body.model!r} cannot be trained over here",
            where="model",
            remedy=f"this server's base is {base}",
        )
    for field in ("training_file", "validation_file"):
        value = getattr(body, field)
        if value is not None and not is_file_id(value):
            raise InputError(f"{value!r} is not the id of an uploaded file", where=field)
    if body.integrations:
        raise UnsupportedError("there are none here", where="integrations", remedy="leave them out")
    own = dict(body.okavango or {})
    priority = own.pop("priority", 0)
    if type(priority) is not int or abs(priority) > 1000:
        raise InputError("is not a whole number from -1000 to 1000", where=f"{_OURS}.priority")
    for name in own.keys() & _TAKEN:
        raise InputError(
            "is set by a field of its own", where=f"{_OURS}.{name}", remedy=f"send {_TAKEN[name]}"
        )
    values: dict[str, Any] = {"name": _name(body.suffix), **own, **_tuned(body, own)}
    values |= {"base": base, "data": body.training_file, "eval": body.validation_file}
    if body.seed is not None:
        values["seed"] = body.seed
    try:
        spec = parse_spec(values)
    except ConfigError as error:
        raise InputError(error.message, where=_OURS) from error
    return AskedJob(spec, _labels(body.metadata or {}), priority)


def _tuned(body: JobRequest, own: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as a specification has them. What `okavango` sets, too, is refused."""
    if body.method is not None and body.method.type != "supervised":
        raise UnsupportedError(
            f"{body.method.type!r} is not done here", where="method.type", remedy="supervised"
        )
    supervised = body.method.supervised if body.method else None
    given = (supervised.hyperparameters if supervised else None) or body.hyperparameters
    if given is None:
        return {}
    epochs, size, factor = (
        None if value == "auto" else value
        for value in (given.n_epochs, given.batch_size, given.learning_rate_multiplier)
    )
    rate = TrainSpec.model_fields["lr"].default
    head_rate = HeadTrainSpec.model_fields["lr"].default
    tuned: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": size,
        "lr": rate * factor if factor is not None else None,
    }
    tuned = {name: value for name, value in tuned.items() if value is not None}
    for name in tuned.keys() & own.keys():
        raise InputError("is set twice", where=f"{_OURS}.{name}", remedy="send one of the two")
    if factor is not None:
        tuned["head"] = {"lr": head_rate * factor} | dict(own.get("head") or {})
    return tuned


def _name(suffix: str | None) -> str:
    """The adapter's: the suffix in the form of names, or one that is nobody else's."""
    name = re.sub(r"[^a-z0-9._-]+", "-", (suffix or "").lower()).strip("-._")
    if suffix and not name:
        raise InputError("holds no letter or digit", where="suffix")
    return name or f"ft-{uuid.uuid4().hex[:8]}"


def _labels(metadata: Mapping[str, str]) -> Mapping[str, str]:
    if len(metadata) > _MOST_LABELS:
        raise InputError(f"over the limit of {_MOST_LABELS} pairs", where="metadata")
    for key, value in metadata.items():
        if len(key) > _MOST_KEY or len(value) > _MOST_VALUE:
            limits = f"{_MOST_KEY} characters a key, {_MOST_VALUE} a value"
            raise InputError(f"over the limit of {limits}", where="metadata")
    return metadata
