"""A decoder in four bits computes what its unpacked weights would, and LoRA learns on it as on those."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import bitsandbytes.functional as packing
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from training_fixtures import text_row, write_rows

from okavango.modalities.base import Base, load_tokenizer
from okavango.modalities.encoders import make_renderer
from okavango.platform.errors import ConfigError, UnsupportedError
from okavango.training.build import build_trainee
from okavango.training.collate import Batch, collate, render_row
from okavango.training.dataset import open_dataset
from okavango.training.memory import shape_of
from okavango.training.model import Trainee
from okavango.training.objective import answer_loss
from okavango.training.spec import TrainSpec, check_spec, parse_spec

pytestmark = pytest.mark.usefixtures("one_thread")


def spec_of(**values: Any) -> TrainSpec:
    lora = {"r": 4, "dropout": 0.0, **values.pop("lora", {})}
    fixed = {"base": "tiny", "data": "none", "name": "a", "precision": "float32"}
    return parse_spec({**fixed, "lora": lora, **values})


def trainee_of(base: Base, **values: Any) -> Trainee:
    torch.manual_seed(0)
    trainee = build_trainee(base, spec_of(**values), torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(trainee.lora_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return trainee


@pytest.fixture
def batch(tiny_base: Base, tmp_path: Path) -> Batch:
    rows = [text_row("What is it?", "a cat"), text_row("And what is this one here?", "a dog, I think")]
    dataset = open_dataset(write_rows(tmp_path / "rows.jsonl", rows))
    renderer = make_renderer(tiny_base, load_tokenizer(tiny_base))
    rendered = [render_row(example, renderer, None) for example in dataset.rows()]
    return collate(rendered, lambda modality, digest: torch.empty(0))


def test_it_computes_and_learns_what_unpacked_weights_would(tiny_base: Base, batch: Batch) -> None:
    packed, plain = trainee_of(tiny_base, quantization="nf4"), trainee_of(tiny_base)
    layers = {
        name: module for name, module in packed.decoder.named_modules() if isinstance(module, Linear4bit)
    }
    assert len(layers) == 14
    with torch.no_grad():
        for name, layer in layers.items():
            weight = plain.decoder.get_submodule(name).weight
            unpacked = packing.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert 0.01 < (unpacked - weight).norm() / weight.norm() < 0.2
            weight.copy_(unpacked)
    found, expected = packed(batch), plain(batch)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for trainee, logits in ((packed, found), (plain, expected)):
        answer_loss(logits, batch.labels).backward()
        assert all(parameter.grad is not None for _, parameter in trainee.lora_parameters())
    theirs = dict(plain.lora_parameters())
    for name, parameter in packed.lora_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-2, atol=1e-3)


def test_it_takes_the_memory_that_is_estimated(tiny_base: Base) -> None:
    spec = spec_of(quantization="nf4")
    trainee = trainee_of(tiny_base, quantization="nf4")
    frozen = [parameter for parameter in trainee.decoder.parameters() if not parameter.requires_grad]
    held = sum(parameter.nbytes for parameter in frozen)
    assert held == pytest.approx(shape_of(tiny_base, spec).weights, rel=0.1)
    assert held < 0.9 * shape_of(tiny_base, spec_of()).weights


def test_what_it_needs_is_asked_for_before_a_job(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    check_spec(spec_of(quantization="nf4"), tiny_base)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'okavango\[qlora\]'"):
        check_spec(spec_of(quantization="nf4"), tiny_base)


def test_weights_that_are_packed_are_not_taken_apart() -> None:
    with pytest.raises(ConfigError, match="choose one"):
        spec_of(quantization="nf4", lora={"init": "pissa"})
