"""A job's inputs: its data found, checked, read and rendered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from okavango.modalities.base import Base, load_tokenizer
from okavango.modalities.encoders import make_renderer
from okavango.modalities.prompt import Renderer
from okavango.platform.bundle import digest_of
from okavango.platform.errors import ConfigError, DataError
from okavango.training.build import head_spec
from okavango.training.check import Seen, check_dataset
from okavango.training.collate import Row, render_rows
from okavango.training.dataset import Dataset, open_dataset
from okavango.training.loop import data_order
from okavango.training.monitor import Monitor
from okavango.training.privacy import Budget, budget_of
from okavango.training.spec import TrainSpec, check_spec
from okavango.training.uploads import Locate, Place, here


@dataclass(frozen=True)
class Task:
    """A job's inputs, read and rendered. `budget`: what a private one spends."""

    base: Base
    spec: TrainSpec
    data: Dataset
    held_out: Dataset | None
    rows: Sequence[Row]
    held_out_rows: Sequence[Row]
    renderer: Renderer
    budget: Budget | None = None

    @property
    def datasets(self) -> list[Dataset]:
        return [dataset for dataset in (self.data, self.held_out) if dataset is not None]

    @property
    def steps(self) -> int:
        return self.spec.total_steps(data_order(self.rows, self.spec).steps_an_epoch)

    def tokens(self, steps: int) -> int:
        """That the first so many steps are fed."""
        order = data_order(self.rows, self.spec)
        batches = (batch for step in range(steps) for batch in order.batches(step))
        return sum(self.rows[i].length for batch in batches for i in batch)

    @property
    def learned(self) -> frozenset[str]:
        """Modalities that the training data hold media of."""
        return modalities_of(self.rows)

    @property
    def modalities(self) -> frozenset[str]:
        """Those that any data hold media of."""
        return self.learned | modalities_of(self.held_out_rows)

    @property
    def fingerprint(self) -> str:
        """What a checkpoint must have been made of to be gone on with."""
        data = [dataset.digest for dataset in self.datasets]
        return digest_of({"spec": self.spec.to_json(), "base": self.base.components, "data": data})


def read_task(
    spec: TrainSpec,
    base: Base,
    monitor: Monitor,
    locate: Locate = here,
    cache: Path | None = None,
) -> Task:
    """Check, read and render a job's data.

    Args:
        locate: where data lie, and what their rows may name.
        cache: as open_dataset.

    Raises:
        DataError: with every fault found.
        ConfigError: nothing could be learned from it; or see budget_of.
    """
    check_spec(spec, base)
    heads = {name: head_spec(base, spec, name) for name in base.heads}
    renderer = make_renderer(base, load_tokenizer(base), heads)
    seen = Seen()
    data = _checked(locate(spec.data), spec.format, cache, seen, monitor)
    held_out = _checked(locate(spec.eval), spec.format, cache, seen, monitor) if spec.eval else None
    if spec.hold_out is not None:
        data, held_out = data.parted(spec.hold_out, spec.seed)
        monitor.say(f"Of {len(data) + len(held_out):,} rows, {len(held_out):,} are held out.")
    most = min(spec.max_length or base.decoder.context, spec.batch_tokens or base.decoder.context)
    render = partial(
        render_rows, renderer=renderer, system=spec.system, max_length=most, last_turn=spec.learn == "last"
    )
    rows, held_out_rows = render(data), render(held_out) if held_out else []
    task = Task(base, spec, data, held_out, rows, held_out_rows, renderer, budget_of(spec, len(rows)))
    if not spec.lora.train and not task.learned:
        raise ConfigError("the data hold no media, and nothing else learns", where="lora.train")
    trains_head = spec.head.train and any(heads[name].kind != "identity" for name in task.learned)
    if not spec.lora.train and not trains_head and not spec.encoders:
        raise ConfigError(
            "the base's heads pass on what its encoder gives, and nothing else learns",
            where="lora.train",
            remedy="let the decoder or an encoder learn, or name another head: heads.image",
        )
    return task


def _checked(place: Place, form: str | None, cache: Path | None, seen: Seen, monitor: Monitor) -> Dataset:
    path, files, uploads = place.path, place.allow_files, place.uploads
    report = check_dataset(path, form=form, allow_files=files, uploads=uploads, seen=seen, cache=cache)
    try:
        report.require_ok()
    except DataError as error:
        raise place.named(error) from error
    if report.warnings:
        monitor.say(f"{place.name}: {report.counts.warnings:,} warnings; `okavango data check` shows them.")
    return open_dataset(path, form=form, allow_files=files, uploads=uploads, cache=cache)


def modalities_of(rows: Sequence[Row]) -> frozenset[str]:
    return frozenset(span.modality for row in rows for span in row.spans)
