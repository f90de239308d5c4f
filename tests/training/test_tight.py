"""The layout of rows without padding between them. That the decoder computes the same in it: test_model."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from okavango.training.collate import NO_LABEL, Row, collate
from okavango.training.tight import Tight, rounded, tight_layout


def rows_by_chance(chance: random.Random, shared: int) -> list[Row]:
    rows = []
    for number in range(chance.randint(2, 20)):
        own = chance.randint(3, 60)
        tokens = np.r_[np.arange(shared), 200 + number, chance.choices(range(100), k=own)].astype(np.int32)
        loss = np.arange(len(tokens)) > shared + chance.randint(0, own - 1)
        rows.append(Row(number, tokens, loss, (), ()))
    return rows


@pytest.mark.parametrize("shared", [0, 1, 33, 150])
def test_every_token_has_its_place_and_sees_its_own_row(shared: int) -> None:
    rows = rows_by_chance(random.Random(shared), shared)
    batch = collate(rows, lambda modality, digest: torch.empty(0), tight=True)
    layout = batch.layout
    assert isinstance(layout, Tight)
    total = len(batch.tokens)
    assert total == rounded(total)
    keys = torch.arange(total) if layout.keys is None else layout.keys
    assert (layout.keys is None) == (shared == 0)
    assert layout.query_ends[-1] == total
    assert layout.key_ends[-1] == len(keys) == rounded(len(keys))
    predicted = {int(at): int(label) for at, label in zip(batch.predicting, batch.labels, strict=True)}
    first = int(shared > 0)
    for i, row in enumerate(rows):
        begin, end = layout.query_ends[first + i : first + i + 2].tolist()
        seen = keys[layout.key_ends[first + i] : layout.key_ends[first + i + 1]]
        assert batch.tokens[seen].tolist() == row.tokens[:-1].tolist()
        assert seen[-(end - begin) :].tolist() == list(range(begin, end))
        assert layout.places[seen].tolist() == list(range(row.length))
        for at in np.flatnonzero(row.loss):
            assert predicted.pop(begin + at - 1 - shared) == row.tokens[at]
    assert predicted == ({total - 1: NO_LABEL} if predicted else {})
    assert int(batch.own.sum()) == total - (layout.query_ends[-1] - layout.query_ends[first + len(rows)])


def test_few_sizes_serve_many_batches() -> None:
    sizes = {tight_layout(20, [each] * 16).size for each in range(20, 500)}
    assert len(sizes) < 60
    assert all(count <= rounded(count) <= max(count + 127, count * 1.125) for count in range(1, 20000, 37))
