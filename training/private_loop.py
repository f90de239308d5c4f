"""The training loop of a private job: see privacy.

Rows are computed one at a time, so that each one's gradient is its own, through any layers. That costs what
packing gains. Whatever the loop tells (events, progress, files) is independent of the rows but through the
parameters, so that no training loss is told.
"""

from __future__ import annotations

import math
import secrets
from typing import Any

import numpy as np
import torch
from torch import Tensor

from okavango.platform.errors import ConfigError
from okavango.training.checkpoint import Checkpoint
from okavango.training.collate import Row
from okavango.training.joint import without_some
from okavango.training.loop import Loop, lr_factor
from okavango.training.monitor import Advance, Monitor
from okavango.training.privacy import Budget, Chance, epsilon_of

Gradient = dict[str, Tensor]


class PrivateLoop(Loop):
    """Steps of a private run. Arguments: Loop's.

    Attributes:
        chance: drawn anew for a run, and kept in its checkpoints alone.
        history: what was spent, as an accountant takes it.
    """

    def __init__(self, budget: Budget, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.budget = budget
        self.chance = Chance(secrets.token_hex(32))
        self.history: list[tuple[float, float, int]] = []

    @property
    def epsilon(self) -> float:
        """Spent so far, at the budget's δ."""
        return epsilon_of(self.history, self.budget.delta)

    @property
    def metrics(self) -> dict[str, float]:
        return {"epsilon": self.epsilon, "delta": self.budget.delta}

    def resume(self, checkpoint: Checkpoint) -> None:
        super().resume(checkpoint)
        kept = checkpoint.facts["privacy"]
        self.chance = Chance(kept["secret"])
        self.history = [(noise, rate, steps) for noise, rate, steps in kept["history"]]

    def run(self, monitor: Monitor) -> None:
        """As Loop.run. What chance gives is kept before anything comes of it: a second attempt that drew
        anew would spend again."""
        if self._saved < 0:
            self._save(monitor)
        super().run(monitor)

    def _one(self, monitor: Monitor, advance: Advance) -> None:
        self._update(self._noisy(self._gradients()))
        self._account()
        self.done += 1
        monitor.note("metrics", f"step {self.done}", step=self.done, epsilon=self.epsilon)
        advance(epsilon=self.epsilon)

    def _gradients(self) -> Gradient:
        """The sum of the drawn rows' gradients, each cut to the norm."""
        total = {name: torch.zeros_like(parameter) for name, parameter in self._parameters.items()}
        for i in self.chance.rows(self.done, len(self._data.rows), self.budget.sample_rate):
            found = self.row_gradient(i)
            norm = math.sqrt(sum(float(each.double().square().sum()) for each in found.values()))
            if not math.isfinite(norm):
                raise ConfigError(
                    f"a row's gradient is {norm}",
                    where=f"step {self.done + 1}",
                    remedy="choose a lower lr; with bf16, try float32",
                )
            scale = min(1.0, self.budget.max_grad_norm / norm) if norm else 1.0
            for name, each in found.items():
                total[name].add_(each, alpha=scale)
        return total

    def row_gradient(self, number: int) -> Gradient:
        """Of the mean loss of one row's answer tokens, as the row is seen in the step that is next; nothing
        of what has no part in it."""
        row, own = self._data.rows[number], self.chance.seed("row", self.done, number)
        torch.manual_seed(own)
        loss = self._row_loss(row, own)
        if not loss.requires_grad:  # a row of text, where heads alone learn
            return {}
        found = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
        pairs = zip(self._parameters, found, strict=True)
        return {name: gradient for name, gradient in pairs if gradient is not None}

    def _row_loss(self, row: Row, own: int) -> Tensor:
        batch = self._trainee.batch([row], self._data.load_at(self.done, own))
        made = self._trainee.make(batch.media)
        seen = without_some(made, self.spec.joint.modality_dropout, own, self.done)
        loss = self._trainee.loss(batch, seen, smoothing=self.spec.label_smoothing)
        return loss / row.answer_tokens

    def _noisy(self, total: Gradient) -> Gradient:
        """The sum with its noise, by the number of rows that a step has on average."""
        generator = self.chance.noise(self.done)
        width = self.budget.noise_multiplier * self.budget.max_grad_norm
        expected = self.budget.sample_rate * len(self._data.rows)
        for each in total.values():
            noise = torch.from_numpy(generator.standard_normal(each.shape, np.float32))
            each.add_(noise.to(each), alpha=width).div_(expected)
        return total

    def _update(self, gradient: Gradient) -> None:
        for name, parameter in self._parameters.items():
            parameter.grad = gradient[name]
        factor = lr_factor(self.done, self.steps, self.spec)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _account(self) -> None:
        noise, rate, steps = self.budget.noise_multiplier, self.budget.sample_rate, 0
        if self.history and self.history[-1][:2] == (noise, rate):
            steps = self.history.pop()[2]
        self.history.append((noise, rate, steps + 1))

    def _facts(self) -> dict[str, Any]:
        return {**super()._facts(), "privacy": {"secret": self.chance.secret, "history": self.history}}
