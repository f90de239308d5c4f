from dataclasses import replace

import pytest
import torch

from okavango.modalities.projector import HeadSpec, bind_head, new_head, pool
from okavango.platform.errors import BindError, ConfigError

SPEC = HeadSpec(in_width=6, out_width=10, grid=(4, 4), tokens=4, hidden=8)


@pytest.mark.parametrize(
    ("tokens", "grid"), [(5, (4, 4)), (9, (4, 4)), (4, (4, 3)), (0, (4, 4)), (-4, (4, 4))]
)
def test_tokens_that_do_not_tile_the_grid_are_refused(tokens: int, grid: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="do not tile"):
        replace(SPEC, tokens=tokens, grid=grid)


def test_pooling_averages_each_tile_row_by_row() -> None:
    features = torch.arange(16.0).reshape(1, 16, 1).expand(1, 16, 6)
    pooled = pool(features, SPEC)
    assert pooled.shape == (1, 4, 6)
    assert pooled[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


def test_as_many_tokens_as_positions_leave_the_features_alone() -> None:
    features = torch.randn(2, 16, 6)
    assert torch.equal(pool(features, replace(SPEC, tokens=16)), features)


def test_a_wide_grid_is_pooled_in_wide_tiles() -> None:
    features = torch.arange(8.0).reshape(1, 8, 1).expand(1, 8, 6)
    pooled = pool(features, replace(SPEC, grid=(2, 4)))
    assert pooled[0, :, 0].tolist() == [0.5, 2.5, 4.5, 6.5]


def test_a_fresh_head_is_as_loud_as_asked_and_the_same_for_its_seed() -> None:
    pooled = torch.randn(64, 4, 6) * 30
    first, again, other = (new_head(SPEC, 0.25, seed=seed)(pooled) for seed in (0, 0, 1))
    assert first.std().item() == pytest.approx(0.25, rel=0.05)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_a_fresh_head_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    new_head(SPEC, 1.0)
    assert torch.equal(torch.rand(2), expected)


def test_binding_gives_the_same_head_frozen() -> None:
    head = new_head(SPEC, 0.25)
    bound = bind_head(SPEC, head.state_dict(), where="here")
    pooled = torch.randn(2, 4, 6)
    assert torch.equal(bound(pooled), head(pooled))
    assert not any(parameter.requires_grad for parameter in bound.parameters())


def test_binding_reports_what_is_missing_left_over_or_misshapen() -> None:
    tensors = new_head(SPEC, 0.25).state_dict()
    with pytest.raises(BindError, match=r"here: up.bias: .*missing"):
        bind_head(SPEC, {name: tensor for name, tensor in tensors.items() if name != "up.bias"}, where="here")
    with pytest.raises(BindError, match=r"here: up.scale: no such tensor"):
        bind_head(SPEC, tensors | {"up.scale": torch.ones(1)}, where="here")
    with pytest.raises(BindError, match=r"here: up.bias: shape \(7,\), expected \(8,\)"):
        bind_head(SPEC, tensors | {"up.bias": torch.ones(7)}, where="here")
