"""Rows that each have their own adapter, beside one small product a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

RANKS = [0, 3, 16, 0, 24, 1]  # of slots: the base, four adapters, one that adapts nothing


class Made:
    """A group of layers over an arena of random adapters, and rows in tiles of one slot each."""

    def __init__(
        self, device: torch.device, chance: torch.Generator, inputs: int, widths: tuple[int, ...]
    ) -> None:
        from okavango.modalities.lora import LoraWeights
        from okavango.serving.cuda.arena import Arena, Group

        other = Group(("before",), 7, (5,))  # so that the group does not begin at 0
        names = tuple(f"layer{i}" for i in range(len(widths)))
        self.arena = Arena([other, Group(names, inputs, widths)], len(RANKS) - 1, 24, torch.float32, device)
        self.names, self.widths, self.inputs = names, widths, inputs
        self.given: dict[int, dict[str, Any]] = {}
        for slot, rank in enumerate(RANKS):
            if not rank:
                continue
            factors = {
                name: (torch.randn(own, inputs, generator=chance), torch.randn(own, width, generator=chance))
                # one layer that the adapter leaves alone, one of a lower rank than the others
                for name, width, own in zip(names, widths, (rank, max(1, rank - 2), rank), strict=False)
                if not (slot == 2 and name == "layer1")
            }
            self.given[slot] = factors
            self.arena.write(slot, self.arena.pack(LoraWeights(factors, rank)))
        offset = torch.tensor([self.arena.offsets()[1]], device=device)
        self.factors = self.arena.factors(offset, widths)

    def update(self, x: Tensor, slots: list[int]) -> Tensor:
        out = torch.zeros(len(x), sum(self.widths), device=x.device)
        for row, slot in enumerate(slots):
            begin = 0
            for name, width in zip(self.names, self.widths, strict=True):
                if name in self.given.get(slot, {}):
                    a, b = (factor.to(x.device) for factor in self.given[slot][name])
                    out[row, begin : begin + width] = x[row] @ a.T @ b
                begin += width
        return out


def tiles_of(slots: list[int], height: int, device: torch.device, padding: int) -> Any:
    from okavango.serving.cuda.kernels.lora import Tiles

    rows, counts, found = [], [], []
    for row, slot in enumerate(slots):
        if found and found[-1] == slot and counts[-1] < height:
            counts[-1] += 1
        else:
            rows.append(row)
            counts.append(1)
            found.append(slot)
    tables = (each + [0] * padding for each in (rows, counts, found))
    return Tiles(*(torch.tensor(t, dtype=torch.int32, device=device) for t in tables), height=height)


SLOTS = [0] * 3 + [1] * 2 + [2] * 20 + [4] + [5] * 5
GROUPS = [(48, (32,)), (64, (48, 16, 16)), (40, (24, 24)), (300, (13, 7, 70))]


@pytest.mark.parametrize(("inputs", "widths"), GROUPS)
@pytest.mark.parametrize("height", [16, 64])
def test_updates_after_a_product(device, chance, inputs, widths, height) -> None:
    from okavango.serving.cuda.kernels.lora import add_lora

    made = Made(device, chance, inputs, widths)
    x = torch.randn(len(SLOTS), inputs, generator=chance).to(device)
    y = torch.randn(len(SLOTS), sum(widths), generator=chance).to(device)
    expected = y + made.update(x, SLOTS)
    add_lora(y, x, made.factors, tiles_of(SLOTS, height, device, padding=3))
    torch.testing.assert_close(y, expected, atol=1e-3, rtol=1e-4)


def test_an_arena_holds_a_small_adapter_at_the_beginning_of_a_row(device, chance) -> None:
    made = Made(device, chance, 48, (32, 16))
    rows, unit = made.arena.rows, made.arena.unit
    assert made.arena.ranks.tolist() == RANKS
    assert not rows[0, 3 * unit :].any()  # rank 3 of up to 24
    assert rows[0, : 3 * unit].any()


def test_an_adapter_over_the_rank_limit_is_refused(device, chance) -> None:
    from okavango.modalities.lora import LoraWeights
    from okavango.platform.errors import UnsupportedError

    made = Made(device, chance, 16, (16,))
    factors = {"layer0": (torch.zeros(25, 16), torch.zeros(25, 16))}
    with pytest.raises(UnsupportedError, match="rank 25 is over the server's limit of 24"):
        made.arena.pack(LoraWeights(factors, 25))
