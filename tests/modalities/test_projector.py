from dataclasses import replace
from typing import Any

import pytest
import torch

from okavango.modalities.projector import HeadSpec, Kind, Pooling, bind_head, new_head, pool
from okavango.platform.errors import BindError, ConfigError

SPEC = HeadSpec(in_width=6, out_width=10, grid=(4, 4), tokens=4, hidden=8)


@pytest.mark.parametrize(
    ("tokens", "grid"), [(5, (4, 4)), (9, (4, 4)), (4, (4, 3)), (0, (4, 4)), (-4, (4, 4))]
)
def test_tokens_that_do_not_tile_the_grid_are_refused(tokens: int, grid: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="do not tile"):
        replace(SPEC, tokens=tokens, grid=grid)


def test_pooling_averages_each_tile_row_by_row() -> None:
    features = torch.arange(16.0).reshape(16, 1).expand(16, 6)
    pooled = pool(features, SPEC)
    assert pooled.shape == (1, 4, 6)
    assert pooled[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


def test_as_many_tokens_as_positions_leave_the_features_alone() -> None:
    features = torch.randn(16, 6)
    assert torch.equal(pool(features, replace(SPEC, tokens=16)), features[None])


def test_tiles_of_a_picture_are_groups_of_their_own() -> None:
    features = torch.randn(3 * 16, 6)
    pooled = pool(features, SPEC)
    assert pooled.shape == (3, 4, 6)
    for piece, group in zip(features.split(16), pooled, strict=True):
        assert torch.equal(pool(piece, SPEC)[0], group)
    assert SPEC.tokens_of(3 * 16) == 12


def test_stacking_keeps_every_position_of_a_square() -> None:
    spec = replace(SPEC, pooling="stack")
    features = torch.arange(16.0).reshape(16, 1).expand(16, 6)
    pooled = pool(features, spec)
    assert pooled.shape == (1, 4, spec.pooled_width) == (1, 4, 24)
    assert pooled[0, 1, ::6].tolist() == [2.0, 3.0, 6.0, 7.0]


SOUND = HeadSpec(in_width=6, out_width=10, grid=(1, 30), tokens=6, hidden=64, stride=5)


@pytest.mark.parametrize("kind", ["mlp", "linear", "resampler"])
@pytest.mark.parametrize("pooling", ["mean", "stack"])
@pytest.mark.parametrize("positions", [1, 5, 7, 30, 61])
def test_a_sequence_costs_the_tokens_of_its_own_length(kind: Kind, pooling: Pooling, positions: int) -> None:
    spec = replace(SOUND, kind=kind, pooling=pooling)
    head = new_head(spec, 0.25)
    features = torch.randn(positions, 6)
    vectors = head(pool(features, spec)).flatten(0, 1)
    assert vectors.shape == (spec.tokens_of(positions), 10) == (-(-positions // 5), 10)
    # what comes later changes nothing before it
    longer = head(pool(torch.cat([features[: positions // 5 * 5], torch.randn(20, 6)]), spec)).flatten(0, 1)
    torch.testing.assert_close(longer[: positions // 5], vectors[: positions // 5])


def test_the_last_stride_is_averaged_over_what_is_there() -> None:
    pooled = pool(torch.arange(7.0).reshape(7, 1).expand(7, 6), SOUND)
    assert pooled[:, 0, 0].tolist() == [2.0, 5.5]


@pytest.mark.parametrize("kind", ["linear", "resampler"])
def test_other_kinds_give_a_maps_tokens_and_bind_their_own_weights(kind: Kind) -> None:
    spec = replace(SPEC, kind=kind, hidden=64)
    head = new_head(spec, 0.25)
    pooled = pool(torch.randn(2 * 16, 6), spec)
    out = head(pooled)
    assert out.shape == (2, 4, 10)
    assert out.std().item() == pytest.approx(0.25, rel=0.3)
    bound = bind_head(spec, head.state_dict(), where="here")
    assert torch.equal(bound(pooled), out)
    with pytest.raises(BindError):
        bind_head(SPEC, head.state_dict(), where="here")


def test_a_resampler_takes_any_number_of_tokens_and_tells_positions_apart() -> None:
    spec = replace(SPEC, kind="resampler", tokens=7, hidden=64)
    head = new_head(spec, 0.25)
    features = torch.randn(16, 6)
    assert head(pool(features, spec)).shape == (1, 7, 10)
    assert not torch.allclose(head(pool(features, spec)), head(pool(features.flip(0), spec)))


def test_an_identity_leaves_embeddings_alone_and_wants_the_decoders_width() -> None:
    spec = HeadSpec(10, 10, (1, 1), 1, 0, kind="identity")
    features = torch.randn(9, 10)
    assert torch.equal(new_head(spec, 1.0)(pool(features, spec))[0], features)
    assert spec.tokens_of(9) == 9
    with pytest.raises(ConfigError, match="no embeddings of width 12"):
        replace(spec, out_width=12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "cnn"}, "one of mlp, linear, resampler, identity"),
        ({"pooling": "max"}, "one of mean, stack"),
        ({"kind": "resampler", "hidden": 100}, "multiple of 64"),
        ({"kind": "resampler", "hidden": 64, "tokens": 0}, "0 tokens"),
        ({"stride": 3, "tokens": 4}, "3 a token"),
    ],
)
def test_shapes_that_mean_nothing_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        replace(SPEC, **change)
    assert message in str(raised.value)


def test_only_what_pooling_hangs_on_keeps_features_apart() -> None:
    same = replace(SPEC, hidden=9), replace(SPEC, kind="linear")
    other = (
        replace(SPEC, tokens=16),
        replace(SPEC, pooling="stack"),
        replace(SPEC, kind="resampler", hidden=64),
    )
    assert {spec.pooling_key for spec in same} == {SPEC.pooling_key}
    assert len({spec.pooling_key for spec in (SPEC, *other)}) == 4


def test_a_wide_grid_is_pooled_in_wide_tiles() -> None:
    features = torch.arange(8.0).reshape(8, 1).expand(8, 6)
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
