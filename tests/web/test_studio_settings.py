"""What the training page's fields mean to the API, and how it says what was wrong with them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from okavango.platform.errors import ConfigError, InputError, UnsupportedError
from okavango.training.spec import parse_spec
from okavango.web.api.fine_tuning_request import parse_job
from okavango.web.studio import settings
from okavango.web.studio.settings import DECODER, HEADS, SETTINGS, default_of, refusal

DATA, HELD_OUT = "file-" + "0" * 24, "file-" + "1" * 24


def body(
    held_out: str | None = None, parts: tuple[str, ...] = (DECODER, HEADS), **values: Any
) -> dict[str, Any]:
    by_path = {name.replace("__", "."): value for name, value in values.items()}
    found = json.loads(settings.request_body("tiny", DATA, held_out, " My Titles ", parts, by_path))
    assert isinstance(found, dict)
    return found


def test_what_is_left_as_it_is_is_not_sent() -> None:
    shown = {setting.path: default_of(setting) for setting in SETTINGS}
    raw = settings.request_body("tiny", DATA, None, "", (DECODER, HEADS), shown)
    assert json.loads(raw) == {
        "model": "tiny",
        "training_file": DATA,
        "validation_file": None,
        "okavango": {},
    }


def test_defaults_are_those_of_a_specification() -> None:
    spec = parse_spec({"base": "tiny", "data": DATA, "name": "x"}).to_json()
    for setting in SETTINGS:
        if setting.path in ("priority", "epochs"):
            continue
        value: Any = spec
        for key in setting.path.split("."):
            value = value[key]
        assert default_of(setting) == (tuple(value) if isinstance(value, list) else value), setting.path


def test_fields_become_a_job() -> None:
    raw = settings.request_body(
        "tiny",
        DATA,
        HELD_OUT,
        " My Titles ",
        (DECODER, "image"),
        {
            "epochs": 2.5,
            "lora.r": 8.0,
            "lora.targets": "q_proj, v_proj,",
            "scores": ["chrf"],
            "eval_every": "25",
            "patience": "",
            "keep": "best",
            "compare": False,
            "priority": 3.0,
        },
    )
    asked = parse_job(raw, "tiny")
    spec = asked.spec
    assert (spec.name, str(spec.data), str(spec.eval), asked.priority) == ("my-titles", DATA, HELD_OUT, 3)
    assert (spec.epochs, spec.lora.r, spec.lora.targets, spec.scores) == (
        2.5,
        8,
        ("q_proj", "v_proj"),
        ("chrf",),
    )
    assert (spec.eval_every, spec.patience, spec.keep, spec.compare) == (25, None, "best", False)
    assert (spec.lora.train, spec.head.train, list(spec.encoders)) == (True, False, ["image"])


def test_what_goes_by_held_out_data_is_not_sent_without_them() -> None:
    told = {"eval_every": "50", "keep": "best", "patience": "3"}
    assert body(**told)["okavango"] == {}
    assert set(body(HELD_OUT, **told)["okavango"]) == set(told)


def test_a_share_is_held_out_where_no_file_is() -> None:
    told = {"hold_out": "0.1", "eval_every": "50"}
    assert body(**told)["okavango"] == {"hold_out": 0.1, "eval_every": 50}
    assert body(HELD_OUT, **told)["okavango"] == {"eval_every": 50}


def test_steps_go_instead_of_the_usual_epochs_and_not_beside_others() -> None:
    assert body(steps="40", epochs=5)["okavango"] == {"steps": 40}
    with pytest.raises(ConfigError, match="steps and epochs"):
        parse_spec({"base": "tiny", "data": DATA, "name": "x", **body(steps="40", epochs=3)["okavango"]})


def test_numbers_that_are_none_are_refused_by_the_specification() -> None:
    raw = json.dumps(body(steps="many", lora__r=2.5)).encode()
    with pytest.raises(InputError, match=r"lora\.r") as caught:
        parse_job(raw, "tiny")
    said = refusal(caught.value)
    assert [each.partition(":")[0] for each in said] == ["Rank", "Steps"]
    assert all(each.endswith(".") for each in said)


def test_refusals_name_the_field_and_the_remedy() -> None:
    error = UnsupportedError("'q' matches no layer", where="lora.targets", remedy="did you mean q_proj?")
    assert refusal(error) == ["Adapted layers: 'q' matches no layer. Did you mean q_proj?"]
    assert refusal(ConfigError("steps and epochs are both set: choose one")) == [
        "Steps and epochs are both set: choose one."
    ]
