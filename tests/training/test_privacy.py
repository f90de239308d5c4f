from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from opacus.accountants import RDPAccountant

from okavango.platform.errors import ConfigError
from okavango.training.privacy import Budget, Chance, budget_of, epsilon_of
from okavango.training.spec import TrainSpec, parse_spec


def make(privacy: dict[str, Any], **values: Any) -> TrainSpec:
    return parse_spec({"base": "tiny", "data": "train.jsonl", "name": "emoji", "privacy": privacy} | values)


def test_epsilon_is_what_opacus_counts_step_by_step() -> None:
    accountant = RDPAccountant()
    for noise, rate, steps in ((1.1, 0.02, 40), (0.8, 0.05, 7)):
        for _ in range(steps):
            accountant.step(noise_multiplier=noise, sample_rate=rate)
    theirs = accountant.get_epsilon(1e-5)
    assert epsilon_of([(1.1, 0.02, 40), (0.8, 0.05, 7)], 1e-5) == pytest.approx(theirs, rel=1e-9)


def test_epsilon_rises_with_steps_and_falls_with_noise() -> None:
    def spent(noise: float, steps: int) -> float:
        return Budget(noise, 0.05, 1.0, 1e-5).epsilon(steps)

    by_steps = [spent(1.0, steps) for steps in (1, 10, 100, 1000)]
    by_noise = [spent(noise, 100) for noise in (4.0, 2.0, 1.0, 0.5)]
    for less, more in itertools.chain(itertools.pairwise(by_steps), itertools.pairwise(by_noise)):
        assert 0 < less < more


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 8.0])
def test_the_noise_for_an_epsilon_spends_it_and_no_more(epsilon: float) -> None:
    spec = make({"epsilon": epsilon}, steps=50, batch_size=10)
    budget = budget_of(spec, 500)
    assert budget is not None
    assert budget.sample_rate == 0.02
    assert 0.98 * epsilon < budget.epsilon(50) <= epsilon


def test_a_job_without_privacy_has_no_budget() -> None:
    assert budget_of(parse_spec({"base": "b", "data": "d", "name": "n"}), 3) is None


@pytest.mark.parametrize(
    ("privacy", "values", "message"),
    [
        ({}, {}, "privacy: set either epsilon or noise_multiplier"),
        ({"epsilon": 1, "noise_multiplier": 1}, {}, "privacy: set either epsilon or noise_multiplier"),
        ({"epsilno": 1}, {}, "privacy.epsilno: unknown key; did you mean epsilon?"),
        ({"epsilon": 1}, {"joint": {"weight": 0.5}}, "joint.weight: its loss compares rows"),
        ({"epsilon": 1}, {"align": {"steps": 5}}, "align.steps: the warm start learns from the rows"),
        ({"epsilon": 1}, {"eval": "held.jsonl"}, "held-out rows are shown and scored"),
        ({"epsilon": 1, "eval_is_public": True}, {"hold_out": 0.1}, "hold_out: a row more or less"),
        ({"epsilon": 1}, {"clip": 0.5}, "clip: a private step is not cut; set privacy.max_grad_norm"),
        ({"epsilon": 1}, {"batch_tokens": 512}, "batch_tokens: privacy draws rows by themselves"),
        ({"epsilon": 1}, {"router_loss": 0.1}, "router_loss: it is over a batch"),
    ],
)
def test_what_cannot_be_private_is_refused(
    privacy: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        make(privacy, **values)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("privacy", "rows", "message"),
    [
        ({"epsilon": 1}, 15, "batch_size: a step takes 16 of 15 rows"),
        ({"epsilon": 1, "delta": 0.02}, 50, "privacy.delta: 0.02 would allow one of the 50 rows"),
        ({"epsilon": 1e-9}, 50, "privacy.epsilon: no noise is enough for an ε of 1e-09"),
    ],
)
def test_budgets_that_promise_nothing_are_refused(privacy: dict[str, Any], rows: int, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        budget_of(make(privacy), rows)
    assert message in str(raised.value)


def test_each_row_is_drawn_by_itself_at_the_rate() -> None:
    chance = Chance("secret")
    drawn = torch.zeros(500, 200)
    for step in range(500):
        drawn[step, chance.rows(step, 200, 0.1)] = 1
    sizes = drawn.sum(1)
    # a binomial's mean and variance: 20 and 18, known here to about 0.2 and 1.2
    assert abs(sizes.mean() - 20) < 1
    assert 13 < sizes.var() < 24
    assert drawn.mean(0).min() > 0.03
    assert drawn.mean(0).max() < 0.18


def test_what_is_drawn_hangs_on_the_secret_and_the_step_alone() -> None:
    def noise(secret: str, step: int) -> list[float]:
        found: list[float] = Chance(secret).noise(step).standard_normal(4).tolist()
        return found

    assert noise("a", 1) == noise("a", 1)
    assert noise("a", 1) != noise("a", 2)
    assert noise("a", 1) != noise("b", 1)
    assert Chance("a").seed("row", 1, 12) != Chance("a").seed("row", 11, 2)
    assert Chance("a").rows(3, 100, 0.5) == Chance("a").rows(3, 100, 0.5)


def test_all_of_the_secret_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that hangs on 32 bits could be guessed, and taken off."""
    chance, drawn = Chance("secret"), set()
    for high in range(3):
        monkeypatch.setattr(Chance, "_bits", lambda self, *_, high=high: 7 + (high << 32))
        drawn.add((*chance.noise(0).standard_normal(4).tolist(), *chance.rows(0, 100, 0.5)))
    assert len(drawn) == 3
