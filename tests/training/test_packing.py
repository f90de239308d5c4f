from __future__ import annotations

import pytest
import torch
from torch import nn

from okavango.platform.errors import UnsupportedError
from okavango.training.packing import Layout, attend, packed

pytestmark = pytest.mark.usefixtures("one_thread")


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """One row [H, N, D], token by token, in float64 → [N, H, D]."""
    heads, length, width = query.shape
    group = heads // key.shape[0]
    out = torch.zeros(length, heads, width, dtype=torch.float64)
    for h in range(heads):
        for n in range(length):
            start = 0 if window is None else max(0, n - window + 1)
            keys, values = key[h // group, start : n + 1].double(), value[h // group, start : n + 1].double()
            weights = torch.softmax(keys @ query[h, n].double() / width**0.5, 0)
            out[n, h] = weights @ values
    return out


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_every_row_attends_to_the_beginning_and_to_itself(
    dtype: torch.dtype, bound: float, shared: int, window: int | None
) -> None:
    layout = Layout(shared, rows=3, length=5)
    generator = torch.Generator().manual_seed(0)
    tokens = shared + 15
    query = torch.randn(1, 6, tokens, 8, generator=generator).to(dtype)
    key, value = (torch.randn(1, 2, tokens, 8, generator=generator).to(dtype) for _ in range(2))
    with packed(layout, layers=1):
        found = attend(nn.Module(), query, key, value, None, sliding_window=window)[0]
    assert found.shape == (1, tokens, 6, 8)
    for row in range(3):
        own = shared + 5 * row
        at = [*range(shared), *range(own, own + 5)]
        expected = naive(query[0, :, at], key[0, :, at], value[0, :, at], window)
        torch.testing.assert_close(found[0, at].double(), expected, rtol=bound, atol=bound)


def test_positions_count_from_the_beginning_of_each_row() -> None:
    found = Layout(shared=2, rows=2, length=3).positions(torch.device("cpu"))
    assert found.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4]]


def test_attention_with_more_to_it_is_refused() -> None:
    x = torch.zeros(1, 1, 4, 8)
    with (
        pytest.raises(UnsupportedError, match="attention with softcap is not served"),
        packed(Layout(0, 1, 4), layers=1),
    ):
        attend(nn.Module(), x, x, x, None, softcap=30.0)
