from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import Workshop, picture_row, text_row, write_rows

from okavango.modalities.prompt import Renderer
from okavango.platform.bundle import read_manifest
from okavango.training.build import build_trainee
from okavango.training.checkpoint import Checkpoints
from okavango.training.collate import collate, render_rows
from okavango.training.dataset import open_dataset
from okavango.training.features import FeatureCache, fill_cache
from okavango.training.loop import TrainingSet, seed_everything
from okavango.training.monitor import Monitor, Reason, Stopped
from okavango.training.objective import answer_loss
from okavango.training.privacy import Budget, Chance, budget_of
from okavango.training.private_loop import PrivateLoop
from okavango.training.ranks import join
from okavango.training.worker import run_job, submit

PRIVATE: dict[str, Any] = {
    "privacy": {"noise_multiplier": 1.0, "delta": 1e-3},
    "align": {},
    "batch_size": 3,
    "lora": {"r": 4, "alpha": 8, "dropout": 0.2},
}


class Bench:
    """A private loop over pictures and a row of text, made anew for every run."""

    def __init__(self, workshop: Workshop, renderer: Renderer) -> None:
        self.workshop, base = workshop, workshop.base
        rows = [picture_row(f"images/{i}.png", "red fox" * (1 + i)) for i in range(7)]
        write_rows(workshop.folder / "mixed.jsonl", [*rows, text_row("Who?", "You.")])
        dataset = open_dataset(workshop.folder / "mixed.jsonl")
        cache = FeatureCache(
            workshop.settings.features,
            "image",
            base.encoders["image"],
            base.heads["image"].spec,
            torch.float32,
        )
        fill_cache(cache, [dataset], "cpu", Monitor())
        self.data = TrainingSet(render_rows(dataset, renderer, None, 512), lambda _, key: cache.load(key))

    def loop(self, folder: Path, secret: str = "secret", **values: Any) -> PrivateLoop:
        spec = self.workshop.spec(**(PRIVATE | values))
        seed_everything(spec.seed)
        trainee = build_trainee(
            self.workshop.base, spec, torch.float32, modalities={"image"}, learned={"image"}
        )
        budget = budget_of(spec, len(self.data.rows))
        assert budget is not None
        arguments = (trainee, self.data, spec, spec.total_steps(8), join())
        loop = PrivateLoop(budget, *arguments, Checkpoints(folder, "same"), None)
        loop.chance = Chance(secret)
        return loop


@pytest.fixture
def bench(workshop: Workshop, tiny_renderer: Renderer) -> Bench:
    return Bench(workshop, tiny_renderer)


def learned(loop: PrivateLoop) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in loop._parameters.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def norm(gradient: dict[str, torch.Tensor]) -> float:
    return float(sum(each.square().sum() for each in gradient.values())) ** 0.5


def test_the_sum_is_of_rows_that_are_cut_one_by_one(bench: Bench, tmp_path: Path) -> None:
    """Against autograd on each row alone, without dropout; every row is drawn."""
    limit = 0.05
    privacy = {"noise_multiplier": 1.0, "delta": 1e-3, "max_grad_norm": limit}
    loop = bench.loop(tmp_path, privacy=privacy, batch_size=8, lora={"r": 4, "dropout": 0.0})
    found = loop._gradients()
    expected = {name: torch.zeros_like(p) for name, p in loop._parameters.items()}
    norms = []
    for row in bench.data.rows:
        batch = collate([row], bench.data.load_at(0, 0))
        loss = answer_loss(loop._trainee(batch), batch.labels, loop.spec.label_smoothing) / row.answer_tokens
        loss.backward()
        own = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in loop._parameters.items()}
        norms.append(norm(own))
        for name, gradient in own.items():
            expected[name] += gradient * min(1.0, limit / norms[-1])
        loop._optimizer.zero_grad(set_to_none=True)
    assert min(norms) > limit
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_row_more_changes_the_sum_by_no_more_than_the_norm(bench: Bench, tmp_path: Path) -> None:
    """With dropout and views that are drawn: the other rows see what they saw."""
    privacy = {"noise_multiplier": 1.0, "delta": 1e-3, "max_grad_norm": 0.02}
    loop = bench.loop(tmp_path, privacy=privacy, batch_size=8)
    with_it = loop._gradients()
    loop.chance.rows = lambda step, count, rate: [i for i in range(count) if i != 2]  # type: ignore[method-assign]
    without = loop._gradients()
    changed = norm({name: with_it[name] - without[name] for name in with_it})
    assert 0.01 < changed <= 0.02 * 1.001


def test_the_noise_has_its_width_whatever_is_drawn(bench: Bench, tmp_path: Path) -> None:
    privacy = {"noise_multiplier": 1.5, "delta": 1e-3, "max_grad_norm": 0.2}
    loop = bench.loop(tmp_path, privacy=privacy)
    empty = {name: torch.zeros_like(p) for name, p in loop._parameters.items()}
    noise = torch.cat([each.flatten() for each in loop._noisy(empty).values()])
    width = 1.5 * 0.2 / 3  # three rows a step on average
    assert len(noise) > 5000
    assert abs(noise.mean() / width) < 5 / len(noise) ** 0.5
    assert noise.std() / width == pytest.approx(1, abs=0.05)


def test_what_does_not_see_a_medium_gets_noise_all_the_same(bench: Bench, tmp_path: Path) -> None:
    loop = bench.loop(tmp_path, steps=1)
    loop.chance.rows = lambda *_: [7]  # type: ignore[method-assign]
    assert not any(name.startswith("heads.") for name in loop.row_gradient(7))
    before = learned(loop)
    loop.run(Monitor())
    assert all(not torch.equal(before[name], value) for name, value in learned(loop).items())


def test_a_run_without_rows_in_a_step_goes_on(bench: Bench, tmp_path: Path) -> None:
    loop = bench.loop(tmp_path)
    loop.chance.rows = lambda *_: []  # type: ignore[method-assign]
    loop.run(Monitor())
    assert loop.done == loop.steps


@pytest.mark.parametrize("stop", [0, 2, 5])
def test_a_stopped_run_goes_on_to_the_same_bits_and_spends_the_same(
    bench: Bench, tmp_path: Path, stop: int
) -> None:
    unbroken = bench.loop(tmp_path / "unbroken", steps=7)
    unbroken.run(Monitor())

    class Stopping(Monitor):
        def note(self, kind: str, message: str, **data: Any) -> None:
            if data.get("step") == stop:
                self.stop(Reason.INTERRUPT)

    broken = bench.loop(tmp_path / "broken", steps=7)
    with pytest.raises(Stopped):
        broken.run(Stopping())
    again = bench.loop(tmp_path / "broken", "another", steps=7)
    checkpoint = Checkpoints(tmp_path / "broken", "same").latest()
    assert checkpoint is not None
    again.resume(checkpoint)
    torch.manual_seed(99)  # of no account: every row has its own
    again.run(Monitor())
    assert equal(learned(again), learned(unbroken))
    assert again.history == unbroken.history == [(1.0, 0.375, 7)]
    assert again.epsilon == unbroken.epsilon


def test_another_secret_learns_something_else_from_the_same_seed(bench: Bench, tmp_path: Path) -> None:
    loops = [bench.loop(tmp_path / name, name) for name in ("a", "b")]
    for loop in loops:
        loop.run(Monitor())
    assert not equal(learned(loops[0]), learned(loops[1]))


def test_a_loop_draws_a_secret_of_its_own(bench: Bench, tmp_path: Path) -> None:
    loop = bench.loop(tmp_path)
    arguments = (loop._trainee, bench.data, loop.spec, 1, loop._accelerator, loop._checkpoints)
    secrets = {PrivateLoop(loop.budget, *arguments).chance.secret for _ in range(3)}
    assert len(secrets) == 3


def test_a_private_job_tells_what_it_spent_and_nothing_of_its_rows(workshop: Workshop) -> None:
    spec = workshop.spec(**(PRIVATE | {"save_every": 2}))
    job = submit(workshop.catalog, workshop.settings, spec)
    outcome = run_job(workshop.catalog, workshop.store, workshop.settings, job.id, Monitor())
    folder = workshop.store.fetch(outcome.version.digest)
    manifest = read_manifest(folder)
    private = manifest.lineage["privacy"]
    expected = Budget(1.0, 3 / 8, 1.0, 1e-3).epsilon(4)
    assert private["epsilon"] == manifest.metrics["epsilon"] == pytest.approx(expected)
    assert (private["sample_rate"], private["noise_multiplier"], private["steps"]) == (3 / 8, 1.0, 4)
    assert (manifest.lineage["data"], manifest.lineage["tokens"]) == (
        {"name": "pictures.jsonl", "rows": 8},
        None,
    )
    finished = workshop.catalog.get_job(job.id)
    assert finished.result is not None
    assert finished.result["trained_tokens"] is None
    assert finished.result["privacy"] == private
    told = json.dumps([event.data for event in workshop.catalog.list_events(job.id)])
    assert '"epsilon"' in told
    assert "train_loss" not in told + json.dumps(manifest.metrics)
    rows = (workshop.folder / "pictures.jsonl").read_text().splitlines()
    answers = [json.loads(row)["messages"][1]["content"] for row in rows]
    written = b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
    assert not [answer for answer in answers if answer.encode() in written]
