"""The settings of a job that the page offers, and the request for one that they make.

Defaults and choices are training.spec's; what is left as it is, or empty, is not sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from okavango.platform.errors import OkavangoError
from okavango.training.spec import DEFAULT_EPOCHS, TrainSpec
from okavango.web.studio.wording import explain, sentence

Kind = Literal["number", "choice", "scores", "switch", "words", "text"]

DECODER, HEADS = "decoder", "projection heads"
EVERY_STEPS = 50
"""Between two looks at held-out data, unless the page's user says otherwise: curves need some."""


@dataclass(frozen=True)
class Setting:
    """A field of the page. `path`: of TrainSpec, dotted; or okavango's own `priority`."""

    path: str
    label: str
    info: str
    kind: Kind = "number"


HELD_OUT = (Setting("hold_out", "Held-out share", "of the examples, where no file is chosen; may be empty"),)
MAIN = (
    Setting("epochs", "Epochs", "times over the data"),
    Setting("lr", "Learning rate", "of the LoRA factors"),
    Setting("lora.r", "Rank", "size of the LoRA factors"),
    Setting("lora.alpha", "Alpha", "their weight is alpha / rank"),
)
LEARNING = (
    Setting("steps", "Steps", "instead of epochs"),
    Setting("batch_size", "Batch size", "rows computed at a time"),
    Setting("batch_tokens", "Batch tokens", "computed at a time, instead of rows"),
    Setting("accumulation", "Accumulation", "batches a step"),
    Setting("processes", "Processes", "that take each step together"),
    Setting("head.lr", "Heads' rate", "of the projection heads"),
    Setting("lora.dropout", "Dropout", "of the LoRA layers"),
    Setting("align.steps", "Heads' warm start", "steps; as the heads need it, if not set"),
    Setting("joint.weight", "Joint objective", "weight of the contrastive loss; 0: none"),
    Setting("warmup", "Warm-up", "share of the steps"),
    Setting("weight_decay", "Weight decay", "of all that learns"),
    Setting("label_smoothing", "Label smoothing", "share spread over the vocabulary"),
    Setting("views", "Views", "altered copies of each picture"),
    Setting("clip", "Clip", "longest gradient"),
    Setting("seed", "Seed", "the same one repeats a run"),
    Setting("priority", "Priority", "higher ones go first"),
    Setting("schedule", "Schedule", "of the learning rates", "choice"),
    Setting("precision", "Precision", "of the frozen decoder", "choice"),
    Setting("quantization", "Packed weights", "nf4: the frozen decoder in four bits", "choice"),
    Setting("recompute", "Compute layers anew", "less memory, a third more work", "switch"),
    Setting("lora.init", "First factors", "pissa: of the largest singular values", "choice"),
    Setting("lora.targets", "Adapted layers", "all-linear, or q_proj, v_proj, …", "words"),
    Setting("lora.use_rslora", "rsLoRA", "weight alpha / √rank", "switch"),
)
LOOKING = (
    Setting("scores", "Scores", "what suits the data, if none is chosen", "scores"),
    Setting("eval_every", "Look every", "steps: held-out loss and sample answers"),
    Setting("samples", "Samples", "answers shown at each look"),
    Setting("eval_rows", "Scored rows", "most held-out rows that are answered"),
    Setting("max_new_tokens", "Answer tokens", "most, when scored"),
    Setting("patience", "Patience", "looks without a lower loss that end it"),
    Setting("keep", "Keep", "the last state, or the one of lowest loss", "choice"),
    Setting("compare", "Score the base, too", "on the same rows, before training", "switch"),
)
ROWS = (
    Setting("learn", "Answers", "all that have weight, or a row's last", "choice"),
    Setting("format", "Rows are written as", "found out, if not chosen", "choice"),
    Setting("max_length", "Tokens a row", "most; the base's context if empty"),
    Setting("system", "System prompt", "for rows without one; the adapter brings it along", "text"),
)
SETTINGS = (*HELD_OUT, *MAIN, *LEARNING, *LOOKING, *ROWS)
SHARE = 0.1
"""Of the examples that are held out where no file is chosen, unless the page's user says otherwise."""
_NEED_HELD_OUT = frozenset(("eval_every", "keep", "patience"))
_OWN_DEFAULTS = {"priority": 0, "epochs": DEFAULT_EPOCHS}


def shown_at_first(setting: Setting) -> Any:
    """What a field holds before anybody has typed: the default, but for what a page is poor without."""
    suggested = {"eval_every": EVERY_STEPS, "hold_out": SHARE}
    return suggested.get(setting.path, default_of(setting))


def default_of(setting: Setting) -> Any:
    """What is in force where nothing is said."""
    if setting.path in _OWN_DEFAULTS:
        return _OWN_DEFAULTS[setting.path]
    default = _field(setting.path).get_default()
    return ", ".join(default) if setting.kind == "words" and not isinstance(default, str) else default


def choices_of(setting: Setting) -> tuple[str, ...]:
    """The strings that a setting may be."""
    return tuple(_literals(_field(setting.path).annotation))


def request_body(
    base: str,
    data: str,
    held_out: str | None,
    name: str,
    parts: Sequence[str],
    values: Mapping[str, Any],
) -> bytes:
    """The body of POST /v1/fine_tuning/jobs that the page's fields mean.

    Args:
        data, held_out: ids of uploaded files.
        parts: what learns: DECODER, HEADS, and modalities whose encoders are adapted.
        values: by path, those of SETTINGS.
    """
    own: dict[str, Any] = {}
    values = {**values, "hold_out": None} if held_out else values
    holds_out = held_out or values.get("hold_out")
    for setting in SETTINGS:
        value = _sent(setting, values.get(setting.path))
        if value is None or (not holds_out and setting.path in _NEED_HELD_OUT):
            continue
        section = own
        *above, last = setting.path.split(".")
        for key in above:
            section = section.setdefault(key, {})
        section[last] = value
    for part, key in ((DECODER, "lora"), (HEADS, "head")):
        if part not in parts:
            own.setdefault(key, {})["train"] = False
    encoders: dict[str, Any] = {part: {} for part in parts if part not in (DECODER, HEADS)}
    if encoders:
        own["encoders"] = encoders
    body = {"model": base, "training_file": data, "validation_file": held_out, "okavango": own}
    return json.dumps(body | ({"suffix": name.strip()} if name.strip() else {})).encode()


def refusal(error: OkavangoError) -> list[str]:
    """What is wrong with a request, fields called as the page calls them; one sentence each."""
    labels = {setting.path: setting.label for setting in SETTINGS}
    found = []
    for part in error.message.split("; "):
        place, _, text = part.partition(": ")
        known = labels.get(place)
        found.append(f"{known}: {sentence(text)}" if known and text else sentence(part))
    where = labels.get((error.where or "").removeprefix("okavango."))
    if len(found) == 1:
        return [f"{where}: {explain(error, '')}" if where else _whole(found[0], error)]
    return found


def _whole(text: str, error: OkavangoError) -> str:
    return f"{text} {sentence(error.remedy)}" if error.remedy else text


def _sent(setting: Setting, value: Any) -> Any:
    """A field's value as a specification has it; None where it says nothing."""
    if isinstance(value, str):
        value = value.strip()
    if value is None or value in ("", []) or value == default_of(setting):
        return None
    if setting.kind == "words":
        words = [word.strip() for word in value.split(",") if word.strip()]
        return words or None
    return _number(value) if setting.kind == "number" else value


def _number(value: Any) -> Any:
    """Fields hand numbers over as text, and whole ones as floats; what is none, the specification refuses."""
    try:
        value = float(value)
    except ValueError:
        return value
    return int(value) if value.is_integer() else value


def _field(path: str) -> FieldInfo:
    section: type[BaseModel] = TrainSpec
    *above, last = path.split(".")
    for key in above:
        section = section.model_fields[key].annotation  # type: ignore[assignment]
    return section.model_fields[last]


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [each for each in get_args(annotation) if isinstance(each, str)]
    return [each for part in get_args(annotation) for each in _literals(part)]
