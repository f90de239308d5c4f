"""Attention of single positions, beside plain softmax over the positions that each may see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

BLOCK = 8


def attended(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """[H, D] over [K, S, D] and [K, S, E] → [H, E]."""
    group = len(query) // len(keys)
    keys, values = (each.repeat_interleave(group, 0) for each in (keys, values))
    scores = torch.einsum("hd,hsd->hs", query, keys) * scale
    return torch.einsum("hs,hse->he", scores.softmax(-1), values)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width", "window", "splits"),
    [
        (4, 2, 16, 16, None, 1),
        (4, 2, 16, 16, None, 4),
        (6, 2, 24, 16, None, 2),  # widths that are no powers of two, keys wider than values
        (7, 1, 40, 40, 9, 2),
        (2, 2, 8, 8, 1, 1),  # sees itself alone
        (4, 4, 16, 16, 70, 4),
    ],
)
def test_each_row_sees_its_own_blocks(
    device, chance, monkeypatch, heads, kv_heads, width, value_width, window, splits
) -> None:
    from okavango.serving.cuda.kernels import decode
    from okavango.serving.cuda.kernels.launch import NO_WINDOW

    monkeypatch.setattr(decode, "num_splits", lambda *_: splits)
    lengths, rows, total, blocks = [1, 150, 0, 8, 9, 67], [5, 0, 0, 3, 1, 6], 8, 60

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance).to(device)

    query, key = random(heads, total, width), random(kv_heads, total, width)
    value = random(kv_heads, total, value_width)
    keys, values = random(kv_heads, blocks, BLOCK, width), random(kv_heads, blocks, BLOCK, value_width)
    # what former holders left behind a sequence's end may be anything
    free = torch.randperm(blocks, generator=chance).tolist()
    tables, starts, table = [], [], []
    for length in lengths:
        own = [free.pop() for _ in range(-(-length // BLOCK))]
        starts.append(len(table))
        tables.append(own)
        table += own
        if length % BLOCK:
            keys[:, own[-1], length % BLOCK :] = float("nan")
            values[:, own[-1], length % BLOCK :] = float("nan")
    before = keys.clone(), values.clone()
    out = torch.full((total, heads, value_width), 7.0, device=device)
    given = tuple(
        torch.tensor(each, dtype=torch.int32, device=device) for each in (rows, lengths, starts, table)
    )
    decode.attend_decode(out, query, key, value, keys, values, given, 0.3, window or NO_WINDOW)
    written = set()
    for row, length, own in zip(rows, lengths, tables, strict=True):
        if not length:
            continue
        last = (own[-1], (length - 1) % BLOCK)
        assert torch.equal(keys[:, last[0], last[1]], key[:, row])
        assert torch.equal(values[:, last[0], last[1]], value[:, row])
        written.add(last)
        first = max(0, length - window) if window else 0
        seen = [each[:, own].flatten(1, 2)[:, first:length] for each in (keys, values)]
        expected = attended(query[:, row], *seen, 0.3)
        torch.testing.assert_close(out[row], expected, atol=1e-5, rtol=1e-4)
    assert (out[[2, 4, 7]] == 7).all(), "a row that is none's was written"
    for tensor, old in zip((keys, values), before, strict=True):
        changed = (tensor != old) & ~(tensor.isnan() & old.isnan())
        places = {tuple(place) for place in changed.any(-1).any(0).nonzero().tolist()}
        assert places <= written, "another place was written"


def test_few_sequences_are_split_and_many_are_not(device) -> None:
    from okavango.serving.cuda.kernels.decode import num_splits

    found = [num_splits(count, 2, device) for count in (1, 4, 1000)]
    assert found[0] > 1
    assert found == sorted(found, reverse=True)
    assert found[-1] == 1
