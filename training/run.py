"""One job's way from data to a published version: prepare, warm up, train, judge, publish.

What an earlier attempt at the same job has finished is not done again: features, steps up to the last
checkpoint, the bundle, the version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from okavango.modalities.base import Base, find_base, load_tokenizer
from okavango.modalities.build import quiet_transformers
from okavango.modalities.prompt import Renderer
from okavango.platform.artifacts import ArtifactStore
from okavango.platform.bundle import digest_of
from okavango.platform.catalog.records import JobRecord, VersionRecord
from okavango.platform.catalog.store import Catalog
from okavango.platform.config import Settings
from okavango.training.align import align
from okavango.training.check import Seen, check_dataset
from okavango.training.checkpoint import Checkpoints
from okavango.training.collate import LoadFeatures, Row, render_rows
from okavango.training.dataset import Dataset, open_dataset
from okavango.training.evaluate import Sample, answer_questions, held_out_loss, read_questions, score
from okavango.training.features import FeatureCache, fill_cache
from okavango.training.loop import Loop, TrainingSet, make_accelerator, seed_everything
from okavango.training.model import Trainee, build_trainee, precision
from okavango.training.monitor import Monitor
from okavango.training.publish import Origin, finished_bundle, publish, write_bundle
from okavango.training.spec import TrainSpec, check_spec, parse_spec


@dataclass(frozen=True)
class Outcome:
    """`samples`: answers that were made on the way; none if an earlier attempt made them."""

    version: VersionRecord
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Task:
    """A job's inputs, read and rendered."""

    base: Base
    spec: TrainSpec
    data: Dataset
    held_out: Dataset | None
    rows: Sequence[Row]
    held_out_rows: Sequence[Row]
    renderer: Renderer

    @property
    def datasets(self) -> list[Dataset]:
        return [dataset for dataset in (self.data, self.held_out) if dataset is not None]

    @property
    def steps(self) -> int:
        return self.spec.total_steps(len(self.rows))

    @property
    def trains_head(self) -> bool:
        return self.spec.head.train and any(row.media for row in self.rows)

    @property
    def has_media(self) -> bool:
        return any(row.media for row in (*self.rows, *self.held_out_rows))

    @property
    def fingerprint(self) -> str:
        """What a checkpoint must have been made of to be gone on with."""
        data = [dataset.digest for dataset in self.datasets]
        return digest_of({"spec": self.spec.to_json(), "base": self.base.components, "data": data})


def run(
    job: JobRecord, catalog: Catalog, store: ArtifactStore, settings: Settings, monitor: Monitor
) -> Outcome:
    """Do a job that this process holds.

    Raises:
        Stopped: the monitor was told to stop.
        OkavangoError: anything that is wrong with specification, base, data or stores.
    """
    spec = parse_spec(job.spec, where=job.id)
    base = find_base(spec.base, settings.bases)
    folder = settings.jobs / job.id
    samples: list[Sample] = []
    with quiet_transformers():
        if finished_bundle(folder / "bundle") is None:
            samples = _make_bundle(job.id, spec, base, catalog, settings, monitor)
        monitor.check()
        version = publish(catalog, store, folder / "bundle", base, spec.name, job.id, job.principal)
    return Outcome(version, tuple(samples[: spec.samples]))


def read_task(spec: TrainSpec, base: Base, monitor: Monitor) -> Task:
    """Check, read and render a job's data.

    Raises:
        DataError: with every fault found.
    """
    check_spec(spec, base)
    heads = {name: head.spec.tokens for name, head in base.heads.items()}
    renderer = Renderer(load_tokenizer(base), heads)
    seen: Seen = {}
    data = _checked(spec.data, seen, monitor)
    held_out = _checked(spec.eval, seen, monitor) if spec.eval else None
    most = spec.max_length or base.decoder.context
    rows = render_rows(data, renderer, spec.system, most)
    held_out_rows = render_rows(held_out, renderer, spec.system, most) if held_out else []
    return Task(base, spec, data, held_out, rows, held_out_rows, renderer)


def _checked(path: Path, seen: Seen, monitor: Monitor) -> Dataset:
    report = check_dataset(path, seen=seen)
    report.require_ok()
    if report.warnings:
        monitor.say(f"{path}: {report.counts.warnings:,} warnings; `okavango data check {path}` shows them.")
    return open_dataset(path)


def _make_bundle(
    job: str, spec: TrainSpec, base: Base, catalog: Catalog, settings: Settings, monitor: Monitor
) -> list[Sample]:
    monitor.say("Reading the data.")
    task = read_task(spec, base, monitor)
    for dataset in task.datasets:
        catalog.put_dataset(dataset.path.name, dataset.digest, str(dataset.path), len(dataset))
    accelerator = make_accelerator()
    dtype = precision(spec.precision, str(accelerator.device))
    load = _features(task, dtype, settings.features, str(accelerator.device), monitor)
    folder = settings.jobs / job
    trainee, loss = _train(task, dtype, load, accelerator, folder / "checkpoints", monitor)
    metrics, samples = _judge(task, trainee, load, monitor)
    monitor.say("Writing the bundle and its probes.")
    origin = Origin(base, spec, task.data, task.held_out, job, task.steps)
    write_bundle(folder / "bundle", trainee, origin, task.renderer, {"train_loss": loss, **metrics})
    return samples


def _features(
    task: Task, dtype: torch.dtype, cache_folder: Path, device: str, monitor: Monitor
) -> LoadFeatures:
    if not task.has_media:
        return _no_features
    head = task.base.heads["image"].spec
    cache = FeatureCache(cache_folder, task.base.encoders["image"], head, dtype)
    computed = fill_cache(cache, [task.data], device, monitor, task.spec.views)
    if task.held_out is not None:
        computed += fill_cache(cache, [task.held_out], device, monitor)
    monitor.say(f"{computed:,} pictures encoded, the others' features were there.")
    return cache.load


def _no_features(digest: str) -> torch.Tensor:
    raise AssertionError(f"no data hold media, yet {digest} is asked for")


def _train(
    task: Task,
    dtype: torch.dtype,
    load: LoadFeatures,
    accelerator: Accelerator,
    folder: Path,
    monitor: Monitor,
) -> tuple[Trainee, float]:
    """The trained model and its last training loss."""
    spec = task.spec
    checkpoints = Checkpoints(folder, task.fingerprint)
    checkpoint = checkpoints.latest()
    seed_everything(spec.seed)
    device = str(accelerator.device)
    trainee = build_trainee(
        task.base, spec.lora, dtype, device, media=task.has_media, trains_head=task.trains_head
    )
    monitor.say(_plan(task, trainee, dtype))
    data = TrainingSet(task.rows, load, spec.views)
    watch = _watch(task, trainee, load, monitor) if task.held_out_rows else None
    loop = Loop(trainee, data, spec, task.steps, accelerator, checkpoints, watch)
    if checkpoint is not None:
        loop.resume(checkpoint)
        monitor.say(f"Going on after step {loop.done}.")
    elif trainee.trains_head:
        assert trainee.head is not None
        align(trainee.head, data, trainee.embedding(), spec.align, spec.seed, monitor)
    loop.run(monitor)
    return trainee, loop.loss


def _watch(task: Task, trainee: Trainee, load: LoadFeatures, monitor: Monitor) -> Any:
    held_out = TrainingSet(task.held_out_rows, load)

    def watch(step: int) -> None:
        loss = held_out_loss(trainee, held_out, task.spec.batch_size)
        monitor.say(f"step {step}: held-out loss {loss:.3f}")

    return watch


def _judge(
    task: Task, trainee: Trainee, load: LoadFeatures, monitor: Monitor
) -> tuple[dict[str, float], list[Sample]]:
    """Scores on held-out rows and the answers behind them; nothing without held-out rows."""
    if task.held_out is None:
        return {}, []
    loss = held_out_loss(trainee, TrainingSet(task.held_out_rows, load), task.spec.batch_size)
    questions = read_questions(task.held_out, task.renderer, task.spec)
    if len(questions) < len(task.held_out):
        monitor.say(f"Answering the first {len(questions):,} of {len(task.held_out):,} held-out rows.")
    samples = answer_questions(
        trainee, questions, task.renderer, load, task.spec, task.base.decoder.context, monitor
    )
    scores = score([sample.answer for sample in samples], [sample.expected for sample in samples])
    return {"loss": loss, **scores}, samples


def _plan(task: Task, trainee: Trainee, dtype: torch.dtype) -> str:
    rows, spec = task.rows, task.spec
    lora = sum(parameter.numel() for _, parameter in trainee.lora_parameters())
    head = sum(parameter.numel() for _, parameter in trainee.head_parameters())
    counts = {
        "rows": len(rows),
        "tokens": sum(row.length for row in rows),
        "of them answers": sum(row.answer_tokens for row in rows),
        "LoRA parameters": lora,
        "head parameters": head,
        "steps": task.steps,
        "rows a step": spec.batch_size * spec.accumulation,
    }
    facts = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    return f"Training {spec.name} over {task.base.name} in {str(dtype).removeprefix('torch.')}: {facts}."
