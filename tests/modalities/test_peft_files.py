"""Binding PEFT's files: every tensor fits, or the file is refused with its name."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from okavango.modalities.base import load_decoder
from okavango.modalities.lora import find_targets
from okavango.modalities.peft_files import CONFIG, WEIGHTS, read_peft
from okavango.platform.errors import BindError, UnsupportedError


@pytest.fixture(scope="module")
def decoder(tiny_base):
    return load_decoder(tiny_base, torch.float32)


def write_peft(decoder, folder: Path, **options) -> Path:
    from copy import deepcopy

    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = get_peft_model(deepcopy(decoder), LoraConfig(**{**config, **options}))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, **values) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
        {"target_modules": ["up_proj"], "layers_to_transform": [1]},
    ],
)
def test_scales_ranks_and_patterns_are_pefts(decoder, tmp_path, options):
    weights = read_peft(write_peft(decoder, tmp_path, **options), find_targets(decoder))
    from copy import deepcopy

    from peft import PeftModel

    model = PeftModel.from_pretrained(deepcopy(decoder), tmp_path)
    found = 0
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            a, b = weights.factors[name]
            assert torch.allclose((a.T @ b).T, module.get_delta_weight("default"), atol=1e-6)
            found += 1
    assert found == len(weights.factors) > 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on embeddings"),
        ({"target_parameters": ["self_attn.q_proj.weight"], "target_modules": ["v_proj"]}, "routed experts"),
    ],
)
def test_what_is_not_served_is_refused_by_name(decoder, tmp_path, options, word):
    with pytest.raises(UnsupportedError, match=word):
        read_peft(write_peft(decoder, tmp_path, **options), find_targets(decoder))


def test_weights_that_changed_the_base_are_refused(decoder, tmp_path):
    edit_config(write_peft(decoder, tmp_path), init_lora_weights="pissa_niter_4")
    with pytest.raises(UnsupportedError, match="changes the base"):
        read_peft(tmp_path, find_targets(decoder))


def test_another_peft_type_is_refused(decoder, tmp_path):
    for kind in ("IA3", "ADALORA"):  # AdaLoRA's configuration is a LoRA's, too
        edit_config(write_peft(decoder, tmp_path), peft_type=kind)
        with pytest.raises(UnsupportedError, match=f"{kind} is not served"):
            read_peft(tmp_path, find_targets(decoder))


def test_an_option_of_a_newer_peft_is_refused_unless_it_is_off(decoder, tmp_path):
    edit_config(write_peft(decoder, tmp_path), use_tomorrows_lora=False, another=None)
    assert read_peft(tmp_path, find_targets(decoder)).rank == 4
    edit_config(tmp_path, use_tomorrows_lora=True)
    with pytest.raises(UnsupportedError, match="use_tomorrows_lora: no such option in PEFT"):
        read_peft(tmp_path, find_targets(decoder))


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def _rename(tensors) -> None:
    tensors[Q0.replace("q_proj", "w_proj") + ".lora_A.weight"] = tensors.pop(Q0 + ".lora_A.weight")


def _nan(tensors) -> None:
    tensors[Q0 + ".lora_B.weight"][0, 0] = float("nan")


def _beyond_bfloat16(tensors) -> None:
    tensors[f"{Q0}.lora_B.weight"][0, 0] = 3.4e38  # float32 goes on to 3.403e38, bfloat16 to 3.390e38


def _drop_layer(tensors) -> None:
    del tensors[Q0 + ".lora_A.weight"], tensors[Q0 + ".lora_B.weight"]


def _rename_two(tensors) -> None:
    _rename(tensors)
    for factor in "AB":
        name = f"{Q0}.lora_{factor}.weight"
        tensors[name.replace("layers.0", "layers.9")] = torch.ones(4, 4)


def _routed_expert(tensors) -> None:
    for factor in "AB":
        tensors[f"base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_{factor}.weight"] = torch.ones(
            4, 4
        )


def _output_layer(tensors) -> None:
    for factor in "AB":
        tensors[f"base_model.model.lm_head.lora_{factor}.weight"] = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_rename, "w_proj"),
        (_nan, "not finite"),
        (_beyond_bfloat16, "not finite"),
        (_drop_layer, r"no tensors for them: model\.layers\.0\.self_attn\.q_proj"),
        (_output_layer, "lm_head"),
        (
            _rename_two,
            r"2 of its 6 layers .*layers\.0\.self_attn\.w_proj, model\.layers\.9\.self_attn\.q_proj",
        ),
        (lambda t: t.pop(Q0 + ".lora_B.weight"), "only lora_A"),
        (lambda t: t.update({Q0 + ".lora_A.weight": torch.ones(4, 63)}), "shapes"),
        (lambda t: t.update({Q0 + ".lora_A.weight": torch.ones(5, 64)}), "shapes"),
        (lambda t: t.update({"some.other": torch.ones(1)}), "no LoRA factor: some.other"),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_a_tensor_that_does_not_bind_is_named(decoder, tmp_path, change, word):
    edit_weights(write_peft(decoder, tmp_path), change)
    with pytest.raises(BindError, match=word):
        read_peft(tmp_path, find_targets(decoder))


def test_a_scale_that_makes_factors_overflow_is_refused(decoder, tmp_path):
    folder = write_peft(decoder, tmp_path)
    edit_weights(folder, lambda tensors: tensors[f"{Q0}.lora_B.weight"].fill_(1e20))
    read_peft(folder, find_targets(decoder))
    edit_config(folder, lora_alpha=1e20)
    with pytest.raises(BindError, match="not finite"):
        read_peft(folder, find_targets(decoder))


def test_routed_experts_are_refused_as_what_they_are(decoder, tmp_path):
    edit_weights(write_peft(decoder, tmp_path), _routed_expert)
    with pytest.raises(UnsupportedError, match="routed experts is not served"):
        read_peft(tmp_path, find_targets(decoder))


def test_dora_is_known_by_its_tensors_even_where_the_configuration_hides_it(decoder, tmp_path):
    edit_config(write_peft(decoder, tmp_path, use_dora=True), use_dora=False)
    with pytest.raises(UnsupportedError, match="DoRA is not served"):
        read_peft(tmp_path, find_targets(decoder))


def test_a_pickle_is_not_loaded(decoder, tmp_path):
    (write_peft(decoder, tmp_path) / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match="pickle"):
        read_peft(tmp_path, find_targets(decoder))


def test_torn_and_missing_files_are_bind_errors(decoder, tmp_path):
    write_peft(decoder, tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(BindError, match="cannot be read"):
        read_peft(tmp_path, find_targets(decoder))
    (tmp_path / CONFIG).unlink()
    with pytest.raises(BindError, match="not a PEFT adapter"):
        read_peft(tmp_path, find_targets(decoder))


def test_reading_again_and_again_leaves_nothing_behind(decoder, tmp_path):
    folder, targets = write_peft(decoder, tmp_path), find_targets(decoder)
    tensors = 2 * len(read_peft(folder, targets).factors)
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(100):
        read_peft(folder, targets)
    gc.collect()
    assert sys.getallocatedblocks() - before < 50 * tensors
