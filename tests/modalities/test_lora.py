"""Rows of many slots against PEFT's arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from okavango.modalities.base import load_decoder
from okavango.modalities.lora import SlotArena, SlotLinear, StepSlots, Target, find_targets
from okavango.platform.errors import UnsupportedError


@pytest.fixture(scope="module")
def decoder(tiny_base):
    return load_decoder(tiny_base, torch.float32)


def test_every_linear_layer_but_the_output_is_a_target(decoder):
    names = {target.name.rpartition(".")[2] for target in find_targets(decoder)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_rows_get_their_own_slots_update_and_others_none(kind):
    torch.manual_seed(0)
    base = nn.Linear(6, 10) if kind is nn.Linear else Conv1D(10, 6)
    step, arena = StepSlots(), SlotArena([Target("m", 6, 10)], 4, 8, torch.float32)
    layer = SlotLinear(base, "m", arena, step)
    from okavango.modalities.lora import LoraWeights

    factors = {slot: (torch.randn(rank, 6), torch.randn(rank, 10)) for slot, rank in ((1, 8), (2, 3))}
    for slot, pair in factors.items():
        arena.write(slot, LoraWeights({"m": pair}, pair[0].shape[0]))
    x = torch.randn(1, 9, 6)
    with torch.inference_mode():
        plain = base(x)
        step.segments, step.rows = ((1, 0, 4), (2, 6, 8), (3, 8, 9)), 9
        y = layer(x)
    expected = plain.clone()
    for slot, start, end in step.segments[:2]:
        a, b = factors[slot]
        expected[0, start:end] += x[0, start:end] @ a.T @ b
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.equal(y[0, 4:6], plain[0, 4:6])
    assert torch.equal(y[0, 8:], plain[0, 8:])  # an empty slot adds nothing


def test_a_slots_new_tenant_leaves_nothing_of_the_former():
    from okavango.modalities.lora import LoraWeights

    arena, step = SlotArena([Target("m", 6, 10), Target("n", 6, 10)], 2, 8, torch.float32), StepSlots()
    layers = {name: SlotLinear(nn.Linear(6, 10), name, arena, step) for name in "mn"}
    wide = (torch.randn(8, 6), torch.randn(8, 10))
    narrow = (torch.randn(2, 6), torch.randn(2, 10))
    arena.write(1, LoraWeights({"m": wide, "n": wide}, 8))
    arena.write(1, LoraWeights({"m": narrow}, 2))
    step.segments, step.rows = ((1, 0, 3),), 3
    x = torch.randn(1, 3, 6)
    with torch.inference_mode():
        assert torch.allclose(layers["m"](x), layers["m"].base(x) + x @ narrow[0].T @ narrow[1], atol=1e-5)
        assert torch.equal(layers["n"](x), layers["n"].base(x))


def test_a_layer_that_sees_other_rows_than_the_steps_is_refused_by_name():
    from okavango.modalities.lora import LoraWeights

    step, arena = StepSlots(((1, 0, 3),), rows=9), SlotArena([Target("m", 6, 10)], 2, 8, torch.float32)
    arena.write(1, LoraWeights({"m": (torch.randn(2, 6), torch.randn(2, 10))}, 2))
    layer = SlotLinear(nn.Linear(6, 10), "m", arena, step)
    with torch.inference_mode(), pytest.raises(UnsupportedError, match="m: sees 4 of the step's 9 rows"):
        layer(torch.randn(1, 4, 6))
