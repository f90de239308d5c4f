"""The training loop: rows in, learned parameters out. It knows neither jobs nor bundles."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from okavango.platform.errors import ConfigError, UnsupportedError
from okavango.training.checkpoint import Checkpoint, Checkpoints, restore
from okavango.training.collate import LoadFeatures, Row, collate
from okavango.training.features import view_key
from okavango.training.model import Trainee
from okavango.training.monitor import Advance, Monitor, Reason, Stopped
from okavango.training.objective import answer_loss
from okavango.training.order import DataOrder
from okavango.training.spec import TrainSpec

# The loss that is shown, and ends in the bundle's metrics, is smoothed over about so many steps.
_SMOOTHED_STEPS = 10


@dataclass(frozen=True)
class TrainingSet:
    """What is trained on: rows, and where the features of their media, and of views of them, come from."""

    rows: Sequence[Row]
    load: LoadFeatures
    views: int = 0

    def load_at(self, step: int, seed: int) -> LoadFeatures:
        """Features of one view of each medium, drawn by seed and step alone."""
        chance = random.Random(f"views {seed}/{step}")
        return lambda digest: self.load(view_key(digest, chance.randrange(self.views + 1)))

    def order(self, spec: TrainSpec) -> DataOrder:
        lengths = [row.length for row in self.rows]
        return DataOrder(lengths, spec.batch_size, spec.accumulation, spec.seed)


def make_accelerator() -> Accelerator:
    """Accelerate's device, backward and clipping. Precision is the model's own matter.

    Raises:
        UnsupportedError: it was launched as several processes.
    """
    accelerator = Accelerator(mixed_precision="no")
    if accelerator.num_processes > 1:
        raise UnsupportedError(
            f"{accelerator.num_processes} processes, but a job runs in one",
            remedy="start it without a launcher",
        )
    return accelerator


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Loop:
    """Steps of one run, from the start or from a checkpoint.

    Args:
        steps: how many in all.
        watch: called every `eval_every` steps.
    """

    def __init__(
        self,
        trainee: Trainee,
        data: TrainingSet,
        spec: TrainSpec,
        steps: int,
        accelerator: Accelerator,
        checkpoints: Checkpoints,
        watch: Callable[[int], None] | None = None,
    ) -> None:
        self.spec = spec
        self.steps = steps
        self.done = 0
        self.loss = math.nan
        self._saved = -1
        self._trainee = trainee
        self._data = data
        self._order = data.order(spec)
        self._checkpoints = checkpoints
        self._watch = watch
        self._parameters = trainee.trained()
        self._accelerator = accelerator
        self._rates = [spec.lr, spec.head.lr]
        self._optimizer = accelerator.prepare(_optimizer(trainee, spec))

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from where a checkpoint was written."""
        restore(checkpoint, self._parameters, self._optimizer.optimizer)
        self.done = checkpoint.step
        self.loss = checkpoint.facts["loss"]
        self._saved = self.done

    def run(self, monitor: Monitor) -> None:
        """Take the steps that are left.

        Raises:
            Stopped: word was left; a checkpoint was written, unless the job is another's by now.
            ConfigError: the loss is no longer finite.
        """
        self._trainee.train()
        with monitor.bar("training", self.steps, self.done) as advance:
            while self.done < self.steps:
                self._one(advance)
                self._after(monitor)
        if self._saved != self.done:
            self._save()

    def _one(self, advance: Advance) -> None:
        start = time.perf_counter()
        batches = self._order.batches(self.done)
        rows = [[self._data.rows[i] for i in batch] for batch in batches]
        loss = self._step(rows)
        if not math.isfinite(loss):
            raise ConfigError(
                f"the loss is {loss}",
                where=f"step {self.done + 1}",
                remedy="choose a lower lr; with bf16, try float32",
            )
        self.loss = loss if math.isnan(self.loss) else self.loss + (loss - self.loss) / _SMOOTHED_STEPS
        self.done += 1
        tokens = sum(row.length for batch in rows for row in batch)
        advance(loss=self.loss, tokens_per_second=tokens / (time.perf_counter() - start))

    def _step(self, batches: Sequence[Sequence[Row]]) -> float:
        """One optimiser step; the mean loss of its answers' tokens."""
        tokens = sum(row.answer_tokens for batch in batches for row in batch)
        total = 0.0
        load = self._data.load_at(self.done, self.spec.seed)
        for rows in batches:
            batch = collate(rows, load).to(self._trainee.device)
            loss = answer_loss(self._trainee(batch), batch.labels, self.spec.label_smoothing) / tokens
            self._accelerator.backward(loss)
            total += loss.item()
        self._accelerator.clip_grad_norm_(self._parameters.values(), self.spec.clip)
        factor = lr_factor(self.done, self.steps, self.spec)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate * factor
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _after(self, monitor: Monitor) -> None:
        """What is due between two steps."""
        reason = monitor.reason
        if reason is Reason.LOST:
            raise Stopped(reason)
        if reason is not None or self.done % self.spec.save_every == 0:
            self._save()
        if reason is not None:
            raise Stopped(reason)
        if self._watch and self.spec.eval_every and self.done % self.spec.eval_every == 0:
            self._watch(self.done)
            self._trainee.train()

    def _save(self) -> None:
        self._checkpoints.save(self.done, self._parameters, self._optimizer.optimizer, {"loss": self.loss})
        self._saved = self.done


def lr_factor(step: int, steps: int, spec: TrainSpec) -> float:
    """What a learning rate is multiplied with at a step (from 0): a linear rise, then the schedule."""
    warm = round(spec.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    match spec.schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return 1 - progress
        case _:
            return 1.0


def _optimizer(trainee: Trainee, spec: TrainSpec) -> torch.optim.Optimizer:
    """AdamW over two groups, LoRA's and the head's; the second is missing where no head learns."""
    groups = [
        {"params": [parameter for _, parameter in trainee.lora_parameters()], "lr": spec.lr},
        {"params": [parameter for _, parameter in trainee.head_parameters()], "lr": spec.head.lr},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], weight_decay=spec.weight_decay, fused=True
    )
