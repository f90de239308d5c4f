"""One job's way from data to a published version: prepare, warm up, train, judge, publish.

What an earlier attempt at the same job has finished is not done again: features, steps up to the last
checkpoint, the bundle, the version.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from okavango.modalities.base import Base, find_base
from okavango.modalities.build import quiet_transformers
from okavango.platform.artifacts import ArtifactStore
from okavango.platform.catalog.records import JobRecord, VersionRecord
from okavango.platform.catalog.store import Catalog
from okavango.platform.config import Settings
from okavango.training.align import align
from okavango.training.build import build_trainee, head_spec, precision
from okavango.training.checkpoint import Checkpoints
from okavango.training.collate import LoadMedium
from okavango.training.curves import recorded
from okavango.training.evaluate import Sample
from okavango.training.features import FeatureCache, Prepared, fill_cache
from okavango.training.joint import set_common
from okavango.training.judge import Judge
from okavango.training.loop import Loop, TrainingSet, seed_everything
from okavango.training.mirror import mirror_of, stored_of
from okavango.training.model import Trainee
from okavango.training.monitor import Monitor
from okavango.training.private_loop import PrivateLoop
from okavango.training.publish import Origin, finished_bundle, publish, write_bundle
from okavango.training.ranks import Ranks, joined
from okavango.training.spec import TrainSpec, parse_spec
from okavango.training.task import Task, read_task
from okavango.training.tracking import tags_of, tracked
from okavango.training.uploads import Uploads


@dataclass(frozen=True)
class Outcome:
    """`samples`: answers that were made on the way; none if an earlier attempt made them."""

    version: VersionRecord
    samples: tuple[Sample, ...]


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
    with quiet_transformers(), tracked(monitor, settings, job, spec) as tags:
        if finished_bundle(folder / "bundle") is None:
            samples = _make_bundle(job, spec, base, catalog, settings, monitor)
        monitor.check()
        version = publish(catalog, store, folder / "bundle", base, spec.name, job.id, job.principal)
        tags |= tags_of(version)
    return Outcome(version, tuple(samples[: spec.samples]))


def follow(job: JobRecord, accelerator: Accelerator, catalog: Catalog, settings: Settings) -> None:
    """Take part in a job that another process leads: see ranks."""
    spec, monitor = parse_spec(job.spec, where=job.id), Monitor()
    Ranks(accelerator).tell(None)  # waits for the leader, who encodes
    with quiet_transformers():
        task = _read(job, spec, find_base(spec.base, settings.bases), catalog, settings, monitor)
        run = _prepare(task, settings, accelerator, monitor)
        checkpoints = Checkpoints(settings.jobs / job.id / "checkpoints", task.fingerprint)
        _loop(task, run, accelerator, checkpoints, None).follow()


def _make_bundle(
    job: JobRecord, spec: TrainSpec, base: Base, catalog: Catalog, settings: Settings, monitor: Monitor
) -> list[Sample]:
    monitor.say("Reading the data.")
    task = _read(job, spec, base, catalog, settings, monitor)
    for dataset in task.datasets:
        catalog.put_dataset(dataset.path.name, dataset.digest, str(dataset.path), len(dataset))
    folder = settings.jobs / job.id
    checkpoints = Checkpoints(folder / "checkpoints", task.fingerprint, mirror_of(settings, job.id))
    with joined(spec.processes, settings, job.id) as accelerator:
        run = _prepare(task, settings, accelerator, monitor)
        Ranks(accelerator).tell("the features are there")
        monitor.say(_plan(task, run.trainee, run.dtype))
        judge = Judge(task, run.trainee, run.load, folder, monitor) if task.held_out_rows else None
        if judge is not None:
            judge.ask_the_base()
        loop = _loop(task, run, accelerator, checkpoints, judge.look if judge is not None else None)
        with recorded(monitor, settings.home / "tensorboard" / spec.name / job.id, task.steps):
            _train(task, run, loop, checkpoints, monitor)
            metrics, samples = judge.conclude() if judge is not None else ({}, [])
    monitor.say("Writing the bundle and its probes.")
    tokens = task.tokens(loop.done) if task.budget is None else None
    privacy = task.budget.to_json(loop.done) if task.budget is not None else None
    origin = Origin(base, spec, task.data, task.held_out, job.id, loop.kept, tokens, privacy)
    write_bundle(folder / "bundle", run.trainee, origin, task.renderer, {**loop.metrics, **metrics})
    return samples


@dataclass(frozen=True)
class _Prepared:
    """What a process trains. `features`: of frozen encoders; `load`: what the trainee takes of media."""

    trainee: Trainee
    dtype: torch.dtype
    features: LoadMedium
    load: LoadMedium


def _read(
    job: JobRecord, spec: TrainSpec, base: Base, catalog: Catalog, settings: Settings, monitor: Monitor
) -> Task:
    uploads = Uploads(catalog, stored_of(settings), job.principal)
    return read_task(spec, base, monitor, uploads.locate, settings.data)


def _prepare(task: Task, settings: Settings, accelerator: Accelerator, monitor: Monitor) -> _Prepared:
    device = str(accelerator.device)
    dtype = precision(task.spec.precision, device)
    features = _features(task, dtype, settings.features, device, monitor)
    seed_everything(task.spec.seed)
    trainee = build_trainee(
        task.base, task.spec, dtype, device, modalities=task.modalities, learned=task.learned
    )
    if trainee.space is not None:
        set_common(trainee.space, task.rows, trainee.embedding())
    return _Prepared(trainee, dtype, features, _inputs(task, trainee, features))


def _loop(
    task: Task,
    run: _Prepared,
    accelerator: Accelerator,
    checkpoints: Checkpoints,
    look: Callable[[int], float] | None,
) -> Loop:
    data = TrainingSet(task.rows, run.load, task.spec.views)
    arguments = run.trainee, data, task.spec, task.steps, accelerator, checkpoints, look
    return Loop(*arguments) if task.budget is None else PrivateLoop(task.budget, *arguments)


def _features(
    task: Task, dtype: torch.dtype, cache_folder: Path, device: str, monitor: Monitor
) -> LoadMedium:
    """Features of frozen encoders, all of them computed; of one that learns, those for its head's start."""
    caches: dict[str, FeatureCache] = {}
    for modality in sorted(task.modalities):
        head = head_spec(task.base, task.spec, modality)
        cache = FeatureCache(cache_folder, modality, task.base.encoders[modality], head, dtype)
        computed = fill_cache(cache, [task.data], device, monitor, task.spec.views)
        if task.held_out is not None and modality not in task.spec.encoders:
            computed += fill_cache(cache, [task.held_out], device, monitor)
        monitor.say(f"{modality}: {computed:,} encoded, the others' features were there.")
        caches[modality] = cache
    return lambda modality, key: caches[modality].load(key)


def _inputs(task: Task, trainee: Trainee, features: LoadMedium) -> LoadMedium:
    """Features, but of encoders that learn what goes into them."""
    prepared = {
        modality: Prepared(adapted.encoder, modality, task.datasets, task.spec.views)
        for modality, adapted in trainee.encoders.items()
    }

    def load(modality: str, key: str) -> torch.Tensor:
        return prepared[modality].load(key) if modality in prepared else features(modality, key)

    return load


def _train(task: Task, run: _Prepared, loop: Loop, checkpoints: Checkpoints, monitor: Monitor) -> None:
    """From the last checkpoint on, or from the heads' warm start."""
    spec, trainee, checkpoint = task.spec, run.trainee, checkpoints.latest()
    if checkpoint is not None:
        loop.resume(checkpoint)
        monitor.say(f"Going on after step {loop.done}.")
    else:
        start = TrainingSet(task.rows, run.features, spec.views)
        for modality in sorted(trainee.trained_heads):
            is_trained = task.base.heads[modality].trained and modality not in spec.heads
            settings = spec.align.for_head(is_trained or spec.privacy is not None)
            head = trainee.head(modality)
            align(head, modality, start, trainee.embedding(), settings, spec.seed, monitor)
    loop.run(monitor)


def _step_size(spec: TrainSpec) -> dict[str, int]:
    if spec.batch_tokens is not None:
        return {"tokens a step at most": spec.batch_tokens * spec.accumulation}
    return {"rows a step": spec.batch_size * spec.accumulation}


def _plan(task: Task, trainee: Trainee, dtype: torch.dtype) -> str:
    rows, spec = task.rows, task.spec
    lora = sum(parameter.numel() for _, parameter in trainee.lora_parameters())
    heads = sum(parameter.numel() for _, parameter in trainee.head_parameters())
    encoders = sum(parameter.numel() for _, parameter in trainee.encoder_parameters())
    counts = {
        "rows": len(rows),
        "tokens": sum(row.length for row in rows),
        "of them answers": sum(row.answer_tokens for row in rows),
        "LoRA parameters": lora,
        "head parameters": heads,
        **({"encoder LoRA parameters": encoders} if encoders else {}),
        "steps": task.steps,
        **_step_size(spec),
    }
    facts = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    if task.budget is not None:
        noise, spent = task.budget.noise_multiplier, task.budget.epsilon(task.steps)
        facts += f", noise multiplier {noise:.3f} for an ε of {spent:.2f} at δ = {task.budget.delta}"
    return f"Training {spec.name} over {task.base.name} in {str(dtype).removeprefix('torch.')}: {facts}."
