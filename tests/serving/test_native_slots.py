"""A slot of the native kernels points to its adapter: no copy, and no adapter that goes while it is there."""

from __future__ import annotations

import gc
import weakref

import torch

from okavango.modalities.lora import LoraWeights, Target
from okavango.serving.backend import RunnerOptions
from okavango.serving.native.slots import Slots

TARGET = Target("layer", 32, 48)
OPTIONS = RunnerOptions(torch.float32, "cpu", 16, 1 << 20, 2, 16)


def weights() -> LoraWeights:
    return LoraWeights({TARGET.name: (torch.randn(5, 32), torch.randn(5, 48))}, 5)


def test_a_slot_keeps_what_it_points_to_until_another_comes():
    slots = Slots([TARGET], OPTIONS)
    packed = slots.pack(weights())
    slots.write(1, packed)
    assert slots.addresses.tolist() == [0, packed.tensor.data_ptr(), 0]
    assert slots.places[1].tolist() == [[16, 0, 16 * 32]]
    held = weakref.ref(packed)
    del packed
    gc.collect()
    assert held() is not None
    slots.write(1, slots.pack(weights()))
    gc.collect()
    assert held() is None


def test_the_bytes_of_an_adapter_are_those_of_its_factors_at_full_lanes():
    assert Slots([TARGET], OPTIONS).pack(weights()).nbytes == 16 * (32 + 48) * 4
