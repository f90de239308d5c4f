from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from okavango.modalities.base import Base
from okavango.modalities.tiny import Architecture, write_tiny_base
from okavango.platform.errors import ConfigError, InputError, UnsupportedError
from okavango.training.spec import TrainSpec, check_spec, check_targets, parse_spec, read_toml


def make(**values: Any) -> TrainSpec:
    return parse_spec({"base": "tiny", "data": "train.jsonl", "name": "emoji"} | values)


def test_a_specification_survives_its_job_row() -> None:
    spec = make(lora={"r": 8, "targets": ["q_proj", "v_proj"]}, eval="held/out.jsonl", epochs=2)
    assert parse_spec(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bath_size": 4}, "bath_size: unknown key; did you mean batch_size?"),
        ({"lora": {"aplha": 4}}, "lora.aplha: unknown key; did you mean alpha?"),
        ({"head": {"zzz": 4}}, "head.zzz: unknown key; known are lr, train"),
        ({"lora": {"r": 0}}, "lora.r: Input should be greater than or equal to 1"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout: Input should be less than 1"),
        ({"precision": "fp16"}, "precision: Input should be 'auto', 'bf16' or 'float32'"),
        ({"steps": 3, "epochs": 2}, "steps and epochs are both set: choose one"),
        ({"eval": "held-out.jsonl", "hold_out": 0.1}, "eval and hold_out are both set: choose one"),
        ({"hold_out": 1.0}, "hold_out: Input should be less than 1"),
        ({"data": None}, "data: "),
    ],
)
def test_a_fault_is_named_with_its_place(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make(**values)
    assert message in str(raised.value)


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"lr: .*; clip: .*"):
        make(lr=-1, clip=0)


@pytest.mark.parametrize(
    ("values", "steps"),
    [({"steps": 7}, 7), ({}, 50), ({"epochs": 2}, 20), ({"epochs": 0.5}, 5), ({"epochs": 0.01}, 1)],
)
def test_steps_follow_from_epochs(values: dict[str, Any], steps: int) -> None:
    assert make(**values).total_steps(10) == steps


def test_a_file_gives_paths_relative_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('data = "rows.jsonl"\nname = "x"\nbase = "b"\n[lora]\ntargets = "all-linear"\n')
    assert parse_spec(read_toml(path)).data == tmp_path / "rows.jsonl"
    path.write_text("data = ")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(path)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*layers\.1\.mlp\..*_proj"])
def test_targets_that_can_be_served_pass(tiny_base: Base, targets: Any) -> None:
    check_targets(targets, tiny_base)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "v_prj"], "'v_prj' matches no layer of the decoder (did you mean v_proj?)"),
        (["lm_head"], "'lm_head' matches lm_head, which cannot be adapted"),
        (["embed_tokens"], "matches model.embed_tokens, which cannot be adapted"),
        (["mlp"], "matches model.layers.0.mlp, which cannot be adapted"),
        (r".*(q_proj|lm_head)", "matches lm_head, which cannot be adapted"),
        ("q_proj", "'q_proj' matches no layer"),  # a regular expression over the whole name
        ([], "names no layer"),
    ],
)
def test_targets_that_cannot_be_served_are_refused(tiny_base: Base, targets: Any, message: str) -> None:
    with pytest.raises(UnsupportedError) as raised:
        check_targets(targets, tiny_base)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("architecture", "usable"),
    [
        ("mixtral", "k_proj, o_proj, q_proj, v_proj"),
        ("deepseek_v3", "kv_a_proj_with_mqa, kv_b_proj, o_proj, q_a_proj, q_b_proj"),
    ],
)
def test_what_peft_takes_for_routed_experts_is_refused_before_a_job(
    tmp_path: Path, architecture: Architecture, usable: str
) -> None:
    base = write_tiny_base(tmp_path, architecture=architecture, image=False)
    experts = ["w1", "w3"] if architecture == "mixtral" else ["down_proj"]
    for targets in ("all-linear", experts, [*usable.split(", "), *experts]):
        with pytest.raises(UnsupportedError, match=f"routed experts.*can be adapted: {usable}"):
            check_targets(targets, base)
    check_targets(usable.split(", "), base)


def test_a_pattern_must_be_a_regular_expression(tiny_base: Base) -> None:
    with pytest.raises(ConfigError, match="no regular expression"):
        check_targets("(", tiny_base)


def test_name_and_length_are_checked(tiny_base: Base) -> None:
    with pytest.raises(InputError, match="is not a name"):
        check_spec(make(name="Emoji!"), tiny_base)
    with pytest.raises(ConfigError, match="9999 tokens, but base 'tiny' takes 512"):
        check_spec(make(max_length=9999), tiny_base)
