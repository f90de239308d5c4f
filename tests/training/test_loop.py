from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import Workshop

from okavango.modalities.prompt import Renderer
from okavango.platform.errors import ConfigError, IntegrityError
from okavango.training.build import build_trainee
from okavango.training.checkpoint import Checkpoints
from okavango.training.collate import render_rows
from okavango.training.dataset import open_dataset
from okavango.training.features import FeatureCache, fill_cache
from okavango.training.loop import (
    Loop,
    TrainingSet,
    data_order,
    lr_factor,
    seed_everything,
)
from okavango.training.monitor import Monitor, Reason, Stopped
from okavango.training.ranks import join
from okavango.training.spec import TrainSpec, parse_spec


class Bench:
    """A loop over the pictures of a workshop, made anew for every run."""

    def __init__(self, workshop: Workshop, renderer: Renderer) -> None:
        self.workshop = workshop
        base = workshop.base
        dataset = open_dataset(workshop.folder / "pictures.jsonl")
        cache = FeatureCache(
            workshop.settings.features,
            "image",
            base.encoders["image"],
            base.heads["image"].spec,
            torch.float32,
        )
        fill_cache(cache, [dataset], "cpu", Monitor())
        self.data = TrainingSet(
            render_rows(dataset, renderer, None, 512), lambda modality, key: cache.load(key)
        )

    def loop(self, folder: Path, watch: Any = None, **values: Any) -> Loop:
        spec = self.workshop.spec(**values)
        seed_everything(spec.seed)
        trainee = build_trainee(
            self.workshop.base, spec, torch.float32, modalities={"image"}, learned={"image"}
        )
        steps = spec.total_steps(data_order(self.data.rows, spec).steps_an_epoch)
        checkpoints = Checkpoints(folder, "same")
        return Loop(trainee, self.data, spec, steps, join(), checkpoints, watch)


@pytest.fixture
def bench(workshop: Workshop, tiny_renderer: Renderer) -> Bench:
    return Bench(workshop, tiny_renderer)


def learned(loop: Loop) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in loop._parameters.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(bench: Bench, tmp_path: Path) -> None:
    found = []
    for i, seed in enumerate((1, 1, 2)):
        loop = bench.loop(tmp_path / str(i), seed=seed)
        loop.run(Monitor())
        found.append(learned(loop))
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stopped_run_goes_on_to_the_same_bits(bench: Bench, tmp_path: Path, accumulation: int) -> None:
    values = {"steps": 9, "batch_size": 2, "accumulation": accumulation, "lora": {"r": 4, "dropout": 0.2}}
    unbroken = bench.loop(tmp_path / "unbroken", **values)
    unbroken.run(Monitor())

    monitor = Monitor()
    stops = {2, 7}

    def watch(step: int) -> float:
        if step in stops:
            monitor.stop(Reason.INTERRUPT)
        return 1.0

    for done in (3, 8):  # the step after the word was left is finished first
        loop = bench.loop(tmp_path / "broken", watch, eval_every=1, **values)
        checkpoint = Checkpoints(tmp_path / "broken", "same").latest()
        if checkpoint is not None:
            loop.resume(checkpoint)
        with pytest.raises(Stopped):
            loop.run(monitor)
        assert loop.done == done
        monitor = Monitor()
    last = bench.loop(tmp_path / "broken", **values)
    checkpoint = Checkpoints(tmp_path / "broken", "same").latest()
    assert checkpoint is not None
    last.resume(checkpoint)
    last.run(Monitor())
    assert equal(learned(last), learned(unbroken))
    assert last.loss == unbroken.loss


def test_accumulated_batches_make_the_step_of_one_big_batch(bench: Bench, tmp_path: Path) -> None:
    values = {"steps": 2, "lora": {"r": 4, "dropout": 0.0}}
    big = bench.loop(tmp_path / "big", batch_size=8, **values)
    small = bench.loop(tmp_path / "small", batch_size=3, accumulation=3, **values)
    whole = list(range(8))
    for loop in (big, small):
        # the same rows a step for both: 8 at once, or 3, 3 and 2
        size = loop.spec.batch_size
        batches = tuple(tuple(whole[i : i + size]) for i in range(0, 8, size))
        loop._order.batches = lambda step, batches=batches: batches  # type: ignore[method-assign, misc]
        loop.run(Monitor())
    assert big.loss == pytest.approx(small.loss, rel=1e-5)
    for name, value in learned(big).items():
        torch.testing.assert_close(learned(small)[name], value, rtol=1e-2, atol=2e-4, msg=name)


def test_a_lost_job_is_left_without_a_word(bench: Bench, tmp_path: Path) -> None:
    monitor = Monitor()
    monitor.stop(Reason.INTERRUPT)
    monitor.stop(Reason.LOST)
    with pytest.raises(Stopped) as raised:
        bench.loop(tmp_path / "lost", save_every=1).run(monitor)
    assert raised.value.reason is Reason.LOST
    assert not (tmp_path / "lost").exists()


def test_the_head_stays_as_it_is_unless_it_is_to_learn(bench: Bench, tmp_path: Path) -> None:
    loop = bench.loop(tmp_path / "frozen", head={"train": False})
    head = loop._trainee.head("image")
    before = {name: value.clone() for name, value in head.state_dict().items()}
    loop.run(Monitor())
    assert equal(before, dict(head.state_dict()))
    assert not any(name.startswith("heads.") for name in learned(loop))


def test_a_loss_that_explodes_ends_the_run_with_a_remedy(bench: Bench, tmp_path: Path) -> None:
    loop = bench.loop(tmp_path / "nan", steps=20, lr=1e38, clip=1e38, warmup=0)
    with pytest.raises(ConfigError, match=r"step \d+: the loss is (nan|inf) \(choose a lower lr"):
        loop.run(Monitor())


def spec_with(**values: Any) -> TrainSpec:
    return parse_spec({"base": "b", "data": "d", "name": "n"} | values)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_learning_rates_rise_and_fall_as_they_should(schedule: str, expected: list[float]) -> None:
    spec = spec_with(schedule=schedule, warmup=1 / 3)
    assert [lr_factor(step, 6, spec) for step in range(6)] == pytest.approx(expected)


def test_each_group_has_its_own_rate(bench: Bench, tmp_path: Path) -> None:
    loop = bench.loop(tmp_path / "rates", steps=1, lr=0.25, head={"lr": 0.125}, warmup=0, schedule="constant")
    loop.run(Monitor())
    assert [group["lr"] for group in loop._optimizer.param_groups] == [0.25, 0.125]


class Falls:
    """A held-out loss that falls up to a step, and rises after. Keeps what was learned at each look."""

    def __init__(self, until: int) -> None:
        self.until = until
        self.loop: Any = None
        self.seen: dict[int, dict[str, torch.Tensor]] = {}

    def __call__(self, step: int) -> float:
        self.seen[step] = learned(self.loop)
        return float(abs(step - self.until))

    def of(self, bench: Bench, folder: Path, **values: Any) -> Loop:
        held_out = bench.workshop.folder / "pictures.jsonl"
        self.loop = bench.loop(folder, self, eval=held_out, eval_every=2, **values)
        return self.loop


def test_the_best_state_is_kept_and_the_rest_of_the_way_saved(bench: Bench, tmp_path: Path) -> None:
    falls = Falls(until=4)
    loop = falls.of(bench, tmp_path / "best", steps=14, keep="best", patience=3)
    loop.run(Monitor())
    assert (loop.done, loop.kept) == (10, 4)
    assert equal(learned(loop), falls.seen[4])
    last = Falls(until=4)
    other = last.of(bench, tmp_path / "last", steps=14, patience=3)
    other.run(Monitor())
    assert (other.done, other.kept) == (10, 10)
    assert equal(learned(other), last.seen[10])


@pytest.mark.parametrize("stop", [4, 6, 9])
def test_what_was_best_is_known_to_a_run_that_goes_on(bench: Bench, tmp_path: Path, stop: int) -> None:
    values: dict[str, Any] = {"steps": 14, "keep": "best", "patience": 3}
    unbroken = Falls(until=4).of(bench, tmp_path / "unbroken", **values)
    unbroken.run(Monitor())
    monitor, falls = Monitor(), Falls(until=4)
    broken = falls.of(bench, tmp_path / "broken", **values)

    class Stopping(Monitor):
        def note(self, kind: str, message: str, **data: Any) -> None:
            if kind == "metrics" and data.get("step") == stop:
                self.stop(Reason.INTERRUPT)

    monitor = Stopping()
    with pytest.raises(Stopped):
        broken.run(monitor)
    again = falls.of(bench, tmp_path / "broken", **values)
    checkpoint = Checkpoints(tmp_path / "broken", "same").latest()
    assert checkpoint is not None
    again.resume(checkpoint)
    again.run(Monitor())
    assert (again.done, again.kept) == (unbroken.done, unbroken.kept)
    assert equal(learned(again), learned(unbroken))


def test_a_best_state_that_is_gone_is_told(bench: Bench, tmp_path: Path) -> None:
    loop = bench.loop(tmp_path)
    with pytest.raises(IntegrityError, match="the best state is gone"):
        Checkpoints(tmp_path, "same").load_best(3, loop._parameters)
