"""Attention of chunks, beside plain softmax under the mask of each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

BLOCK = 8


def attended(
    query: Tensor, keys: Tensor, values: Tensor, seen: int, window: int | None, scale: float
) -> Tensor:
    """[H, C, D], behind `seen` positions, over [K, S, D] and [K, S, E] → [C, H, E]."""
    group = len(query) // len(keys)
    keys, values = (each.repeat_interleave(group, 0) for each in (keys, values))
    positions = seen + torch.arange(query.shape[1], device=query.device)[:, None]
    others = torch.arange(keys.shape[1], device=query.device)[None]
    hidden = others > positions
    if window is not None:
        hidden |= others <= positions - window
    scores = (query @ keys.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ values).transpose(0, 1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width", "window"),
    [
        (4, 2, 16, 16, None),
        (6, 2, 24, 16, None),
        (7, 1, 40, 40, 9),
        (3, 3, 8, 8, 1),
        (4, 1, 16, 16, 40),
    ],
)
def test_chunks_behind_cached_prefixes(device, chance, heads, kv_heads, width, value_width, window) -> None:
    from okavango.serving.cuda.kernels.launch import NO_WINDOW
    from okavango.serving.cuda.kernels.prefill import attend_prefill, tile_tokens

    tokens = tile_tokens(True, max(width, value_width), heads // kv_heads)
    chunks = [(5, 0), (2, 70), (3 * tokens + 1, 8), (tokens, 0), (11, 13)]  # (positions, before them)
    total, blocks = 3 + sum(count for count, _ in chunks), 80

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance).to(device)

    query, key = random(heads, total, width), random(kv_heads, total, width)
    value = random(kv_heads, total, value_width)
    keys, values = random(kv_heads, blocks, BLOCK, width), random(kv_heads, blocks, BLOCK, value_width)
    free = torch.randperm(blocks, generator=chance).tolist()
    tables: dict[str, list[int]] = {name: [] for name in ("chunk", "first", "row", "count", "seen", "start")}
    table: list[int] = []
    row, owned = 3, []
    for number, (count, seen) in enumerate(chunks):
        own = [free.pop() for _ in range(-(-(count + seen) // BLOCK))]
        firsts = range(0, count, tokens)
        tables["chunk"] += [number] * len(firsts)
        tables["first"] += firsts
        for name, number_ in (("row", row), ("count", count), ("seen", seen), ("start", len(table))):
            tables[name].append(number_)
        if (count + seen) % BLOCK:  # what a former holder left there may be anything
            keys[:, own[-1], (count + seen) % BLOCK :] = float("nan")
            values[:, own[-1], (count + seen) % BLOCK :] = float("nan")
        table += own
        owned.append((row, own))
        row += count
    tables["chunk"] += [-1, -1]  # tiles that pad a graph
    tables["first"] += [0, 0]
    given = tuple(torch.tensor(each, dtype=torch.int32, device=device) for each in (*tables.values(), table))
    out = torch.full((total, heads, value_width), 7.0, device=device)
    attend_prefill(out, query, key, value, keys, values, given, tokens, 0.3, window or NO_WINDOW)
    assert (out[:3] == 7).all(), "a row of no chunk was written"
    for (row, own), (count, seen) in zip(owned, chunks, strict=True):
        rows = slice(row, row + count)
        held = [each[:, own].flatten(1, 2)[:, : seen + count] for each in (keys, values)]
        assert torch.equal(held[0][:, seen:], key[:, rows])
        assert torch.equal(held[1][:, seen:], value[:, rows])
        expected = attended(query[:, rows], *held, seen, window, 0.3)
        torch.testing.assert_close(out[rows], expected, atol=1e-5, rtol=1e-4)
