"""The training loop: rows in, learned parameters out. It knows neither jobs nor bundles."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from okavango.platform.errors import ConfigError
from okavango.training.checkpoint import Checkpoint, Checkpoints, restore
from okavango.training.collate import LoadMedium, Row
from okavango.training.features import VIEWED, view_key
from okavango.training.joint import joint_loss, without_some
from okavango.training.model import Made, Trainee
from okavango.training.monitor import Advance, Monitor, Reason, Stopped
from okavango.training.order import DataOrder
from okavango.training.ranks import Ranks
from okavango.training.routing import Routing, routing_of
from okavango.training.spec import TrainSpec

# The loss that is shown, and ends in the bundle's metrics, is smoothed over about so many steps.
_SMOOTHED_STEPS = 10


@dataclass(frozen=True)
class TrainingSet:
    """What is trained on: rows, and where their media, and views of them, come from."""

    rows: Sequence[Row]
    load: LoadMedium
    views: int = 0

    def load_at(self, step: int, seed: int) -> LoadMedium:
        """One view of each picture, drawn by seed and step alone; sounds as they are."""
        chance = random.Random(f"views {seed}/{step}")

        def load(modality: str, digest: str) -> Tensor:
            views = self.views if modality in VIEWED else 0
            return self.load(modality, view_key(digest, chance.randrange(views + 1)))

        return load


def data_order(rows: Sequence[Row], spec: TrainSpec) -> DataOrder:
    """Which rows are drawn in which step."""
    lengths = [row.length for row in rows]
    return DataOrder(lengths, spec.batch_size, spec.accumulation, spec.seed, spec.batch_tokens)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class Best:
    """The lowest held-out loss so far, the step that it was at, and looks since then."""

    loss: float = math.inf
    step: int = 0
    looks: int = 0


class Loop:
    """Steps of one run, from the start or from a checkpoint.

    Args:
        steps: how many in all.
        watch: called every `eval_every` steps; gives the held-out loss.

    Attributes:
        kept: the step whose state is in the trainee once it has run.
    """

    def __init__(
        self,
        trainee: Trainee,
        data: TrainingSet,
        spec: TrainSpec,
        steps: int,
        accelerator: Accelerator,
        checkpoints: Checkpoints,
        watch: Callable[[int], float] | None = None,
    ) -> None:
        self.spec = spec
        self.steps = steps
        self.done = 0
        self.loss = math.nan
        self.kept = 0
        self._best = Best()
        self._looked = 0
        self._saved = -1
        self._trainee = trainee
        self._data = data
        self._order = data_order(data.rows, spec)
        self._checkpoints = checkpoints
        self._watch = watch
        self._parameters = trainee.trained()
        self._accelerator = accelerator
        self._ranks = Ranks(accelerator)
        self._routing = routing_of(trainee.base_decoder)
        self._busiest = 0.0
        groups = _groups(trainee, spec)
        self._rates = [group["lr"] for group in groups]
        optimizer = torch.optim.AdamW(groups, weight_decay=spec.weight_decay, fused=True)
        self._optimizer = accelerator.prepare(optimizer)

    @property
    def metrics(self) -> dict[str, float]:
        """What the run itself tells of how it went, for the bundle."""
        return {"train_loss": self.loss}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from where a checkpoint was written."""
        restore(checkpoint, self._parameters, self._optimizer.optimizer)
        self.done = checkpoint.step
        self.loss = checkpoint.facts["loss"]
        self._best = Best(**checkpoint.facts["best"])
        self._looked = checkpoint.facts["looked"]
        self._saved = self.done

    def run(self, monitor: Monitor) -> None:
        """Take the steps that are left.

        Raises:
            Stopped: word was left; a checkpoint was written, unless the job is another's by now.
            ConfigError: the loss is no longer finite.
        """
        self._trainee.train()
        try:
            self._look(monitor)
            with monitor.bar("training", self.steps, self.done) as advance:
                while self.done < self.steps and not self._is_hopeless():
                    self._one(monitor, advance)
                    self._after(monitor)
        except Stopped:
            self._ranks.tell(None)
            raise
        self._ranks.tell(None)
        if self.done < self.steps:
            monitor.say(f"The held-out loss has not fallen since step {self._best.step}: that is enough.")
        if self._saved != self.done:
            self._save(monitor)
        self.kept = self.done
        if self.spec.keep == "best" and self._best.step:
            self._checkpoints.load_best(self._best.step, self._parameters)
            self.kept = self._best.step

    def follow(self) -> None:
        """Take part in the steps of a run that another process leads, until it ends."""
        self._trainee.train()
        while (done := self._ranks.tell(None)) is not None:
            self.done = done
            self._compute()
            self._optimizer.zero_grad(set_to_none=True)

    def _one(self, monitor: Monitor, advance: Advance) -> None:
        start = time.perf_counter()
        self._ranks.tell(self.done)
        loss = self._compute()
        if not math.isfinite(loss):
            raise ConfigError(
                f"the loss is {loss}",
                where=f"step {self.done + 1}",
                remedy="choose a lower lr; with bf16, try float32",
            )
        self._learn()
        self.loss = loss if math.isnan(self.loss) else self.loss + (loss - self.loss) / _SMOOTHED_STEPS
        self.done += 1
        tokens = sum(self._data.rows[i].length for batch in self._order.batches(self.done - 1) for i in batch)
        speed = tokens / (time.perf_counter() - start)
        facts = {"step": self.done, "train_loss": loss, "tokens_per_second": speed}
        if self._routing is not None:
            facts["busiest_expert"], self._busiest = self._busiest, 0.0
        monitor.note("metrics", f"step {self.done}", **facts)
        advance(loss=self.loss, tokens_per_second=speed)

    def _compute(self) -> float:
        """Gradients of the next step, by all processes; the mean loss of its answers' tokens."""
        batches = [[self._data.rows[i] for i in batch] for batch in self._order.batches(self.done)]
        tokens = sum(row.answer_tokens for batch in batches for row in batch)
        load = self._data.load_at(self.done, self.spec.seed)
        self._ranks.send(self._parameters.values())
        if self._ranks.size > 1:  # each draws its own dropout, the same one when a run is resumed
            own = random.Random(f"dropout {self.spec.seed}/{self.done}/{self._ranks.rank}")
            torch.manual_seed(own.getrandbits(63))
        total = 0.0
        for batch in batches:
            loss = self._loss(self._ranks.share(batch), load, tokens, len(batches))
            if loss.requires_grad:  # rows of text teach nothing where heads alone learn
                self._accelerator.backward(loss)
            total += loss.item()
        return self._ranks.add_up(self._parameters.values(), total)

    def _loss(self, rows: Sequence[Row], load: LoadMedium, tokens: int, batches: int) -> Tensor:
        """What these rows of a batch add to the loss of a step of so many answers' tokens and batches."""
        loss = torch.zeros((), device=self._trainee.device)
        made: Made = {}
        if rows:
            batch = self._trainee.batch(rows, load)
            made = self._trainee.make(batch.media)
            seen = without_some(made, self.spec.joint.modality_dropout, self.spec.seed, self.done)
            routed: list[Tensor] | None = [] if self._routing is not None else None
            loss = self._trainee.loss(batch, seen, routed, self.spec.label_smoothing) / tokens
            if self._routing is not None and routed:
                loss = loss + self._balance(self._routing, routed, batch.own) / (batches * self._ranks.size)
        if self._trainee.space is not None:  # over the pairs of all processes, each of which has the whole
            pairs = joint_loss(self._trainee.space, made, rows, self._trainee.embedding())
            loss = loss + self.spec.joint.weight * pairs / (batches * self._ranks.size)
        return loss

    def _learn(self) -> None:
        self._accelerator.clip_grad_norm_(self._parameters.values(), self.spec.clip)
        factor = lr_factor(self.done, self.steps, self.spec)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _balance(self, routing: Routing, routed: Sequence[Tensor], own: Tensor) -> Tensor:
        weight = routing.weight if self.spec.router_loss is None else self.spec.router_loss
        self._busiest = max(self._busiest, routing.busiest([each.detach() for each in routed], own))
        return weight * routing.loss(routed, own)

    def _after(self, monitor: Monitor) -> None:
        """What is due between two steps."""
        reason = monitor.reason
        if reason is Reason.LOST:
            raise Stopped(reason)
        if reason is not None or self.done % self.spec.save_every == 0:
            self._save(monitor)
        if reason is not None:
            raise Stopped(reason)
        self._look(monitor)

    def _look(self, monitor: Monitor) -> None:
        """At the held-out rows, if that is due at this step and was not done before a stop."""
        every = self.spec.eval_every
        if self._watch is None or not every or self.done % every or self._looked == self.done:
            return
        try:
            loss = self._watch(self.done)
        except Stopped as stop:
            if stop.reason is not Reason.LOST:
                self._save(monitor)
            raise
        self._trainee.train()
        self._looked = self.done
        if loss < self._best.loss:
            self._best = Best(loss, self.done)
            if self.spec.keep == "best":
                self._checkpoints.save_best(self.done, self._parameters)
        else:
            self._best = replace(self._best, looks=self._best.looks + 1)
        # what was found out is not to be lost, or a run that is resumed would look with other eyes
        self._save(monitor)
        self._checkpoints.forget_best(self._best.step)

    def _is_hopeless(self) -> bool:
        return self.spec.patience is not None and self._best.looks >= self.spec.patience

    def _save(self, monitor: Monitor) -> None:
        self._checkpoints.save(self.done, self._parameters, self._optimizer.optimizer, self._facts())
        self._saved = self.done
        known = {} if math.isnan(self.loss) else {"train_loss": self.loss}
        monitor.note("checkpoint", f"checkpoint at step {self.done}", step=self.done, **known)

    def _facts(self) -> dict[str, Any]:
        return {"loss": self.loss, "best": asdict(self._best), "looked": self._looked}


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


def _groups(trainee: Trainee, spec: TrainSpec) -> list[dict[str, Any]]:
    """Parameters by learning rate: the decoder's factors, heads with the joint space, then each encoder's
    factors."""
    of_heads = [*trainee.head_parameters(), *trainee.space_parameters()]
    groups = [
        {"params": [parameter for _, parameter in trainee.lora_parameters()], "lr": spec.lr},
        {"params": [parameter for _, parameter in of_heads], "lr": spec.head.lr},
    ]
    for modality, lora in sorted(spec.encoders.items()):
        prefix = f"encoders.{modality}."
        own = [parameter for name, parameter in trainee.encoder_parameters() if name.startswith(prefix)]
        groups.append({"params": own, "lr": lora.lr})
    return [group for group in groups if group["params"]]
