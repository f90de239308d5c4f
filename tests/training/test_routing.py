"""The loss of a mixture's routers is transformers' own, over the tokens that are no padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import text_row, write_rows

from okavango.modalities.base import Base, empty_decoder, load_decoder, load_tokenizer
from okavango.modalities.encoders import make_renderer
from okavango.modalities.tiny import Architecture, write_tiny_base
from okavango.platform.catalog.events import Event
from okavango.platform.errors import UnsupportedError
from okavango.training.build import build_trainee
from okavango.training.checkpoint import Checkpoints
from okavango.training.collate import Row, collate, render_row
from okavango.training.dataset import open_dataset
from okavango.training.loop import Loop, TrainingSet, seed_everything
from okavango.training.model import Trainee
from okavango.training.monitor import Monitor
from okavango.training.ranks import join
from okavango.training.routing import Routing, routing_of
from okavango.training.spec import TrainSpec, check_spec

pytestmark = pytest.mark.usefixtures("one_thread")
MIXTURES: tuple[Architecture, ...] = ("mixtral", "qwen3_moe")
LORA: dict[str, Any] = {"r": 4, "targets": ["q_proj", "v_proj"], "dropout": 0.3}


def spec_of(**values: Any) -> TrainSpec:
    return TrainSpec(base="tiny", data=Path("none"), name="a", lora=LORA, **values)  # type: ignore[arg-type]


def rows_of(base: Base, folder: Path) -> list[Row]:
    turns = [
        ("What is it?", "a cat"),
        ("What is it, and why?", "a very small dog, because it barks"),
        ("So?", "no"),
    ]
    dataset = open_dataset(write_rows(folder / "rows.jsonl", [text_row(*each) for each in turns]))
    renderer = make_renderer(base, load_tokenizer(base))
    return [render_row(example, renderer, None) for example in dataset.rows()]


def no_media(modality: str, digest: str) -> torch.Tensor:
    raise AssertionError(digest)


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    return write_tiny_base(tmp_path / "base", architecture=request.param)


def trainee_of(base: Base, **values: Any) -> Trainee:
    seed_everything(1)
    return build_trainee(base, spec_of(**values), torch.float32)


def test_it_is_what_transformers_adds_to_its_loss(mixture: Base, tmp_path: Path) -> None:
    routing = routing_of(empty_decoder(mixture))
    assert routing is not None
    row = rows_of(mixture, tmp_path)[1]
    batch, routed = collate([row], no_media), []
    trainee_of(mixture).eval()(batch, routed=routed)
    tokens = torch.tensor(row.tokens[:-1]).long()[None]
    theirs = load_decoder(mixture, torch.float32)(tokens, output_router_logits=True)
    torch.testing.assert_close(routing.loss(routed, batch.own), theirs.aux_loss)
    assert routing.weight == 0.001


def test_padding_does_not_count(mixture: Base, tmp_path: Path) -> None:
    routing = routing_of(empty_decoder(mixture))
    assert routing is not None
    rows = rows_of(mixture, tmp_path)
    batch, routed = collate(rows, no_media), []
    trainee_of(mixture).eval()(batch, routed=routed)
    shared = batch.layout.shared
    assert int(batch.own.sum()) == shared + sum(row.length - shared for row in rows) < len(batch.own)
    alone = routing.loss_of(tuple(each[batch.own] for each in routed), routing.experts, routing.chosen)
    torch.testing.assert_close(routing.loss(routed, batch.own), alone)


def test_layers_computed_anew_route_the_same(mixture: Base, tmp_path: Path) -> None:
    routing = routing_of(empty_decoder(mixture))
    assert routing is not None
    batch = collate(rows_of(mixture, tmp_path), no_media)

    def grads(**values: Any) -> list[torch.Tensor]:
        trainee, routed = trainee_of(mixture, **values), []
        seed_everything(2)
        trainee(batch, routed=routed)
        routing.loss(routed, batch.own).backward()
        return [p.grad for p in trainee.trained().values() if p.grad is not None]

    plain, anew = grads(), grads(recompute=True)
    assert any(grad.abs().max() > 0 for grad in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, anew, strict=True))


def test_the_busiest_expert_is_found_in_any_layer() -> None:
    routing = Routing(experts=4, chosen=1, weight=0.0, loss_of=lambda *_: torch.zeros(()))
    even, crowded = torch.eye(4), torch.eye(4)[[1, 1, 1, 0]]
    own = torch.ones(4, dtype=torch.bool)
    assert routing.busiest([even], own) == 1.0
    assert routing.busiest([even, crowded], own) == 3.0
    own[0] = False
    assert routing.busiest([crowded], own) == pytest.approx(2 / (3 / 4))


def test_a_run_spreads_its_tokens_and_says_how(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base", architecture="mixtral")
    rows = rows_of(base, tmp_path)
    batch = collate(rows, no_media)

    def after(weight: float) -> tuple[float, list[float]]:
        spec = spec_of(steps=30, batch_size=3, lr=0.02, router_loss=weight)
        trainee, monitor, told = trainee_of(base, **spec.model_dump(include={"router_loss"})), Monitor(), []

        def listen(event: Event) -> None:
            told.extend([(event.data or {})["busiest_expert"]] if event.kind == "metrics" else [])

        monitor.listeners.append(listen)
        checkpoints = Checkpoints(tmp_path / str(weight), "same")
        Loop(trainee, TrainingSet(rows, no_media), spec, 30, join(), checkpoints).run(monitor)
        routing, routed = routing_of(trainee.base_decoder), []
        assert routing is not None
        trainee.eval()(batch, routed=routed)
        return routing.loss(routed, batch.own).item(), told

    (without, _), (spread, told) = after(0.0), after(10.0)
    assert spread < without
    assert len(told) == 30
    assert all(1 <= each <= 4 for each in told)


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3"])
def test_other_decoders_have_none(tmp_path: Path, architecture: Architecture) -> None:
    base = write_tiny_base(tmp_path / "base", architecture=architecture)
    assert routing_of(empty_decoder(base)) is None
    with pytest.raises(UnsupportedError, match=r"router_loss: .* no routers that a loss balances"):
        check_spec(spec_of(router_loss=0.1), base)
