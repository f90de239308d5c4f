"""A trained adapter → a sealed bundle → a version in the catalog."""

# Shapes: N tokens of a probe, L predicted ones, V vocabulary

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from okavango.modalities.base import Base, load_decoder, load_head
from okavango.modalities.content import Message, Part, Text
from okavango.modalities.embedding import write_embedding
from okavango.modalities.encoders import Encoder, decode, encode, load_encoder
from okavango.modalities.head_files import write_head
from okavango.modalities.peft_files import CONFIG
from okavango.modalities.probes import Probe, write_probes
from okavango.modalities.projector import ProjectionHead, bind_head, pool
from okavango.modalities.prompt import Renderer
from okavango.platform import bundle
from okavango.platform.artifacts import ArtifactStore
from okavango.platform.bundle import Manifest
from okavango.platform.catalog.records import VersionRecord
from okavango.platform.catalog.store import Catalog
from okavango.platform.errors import IntegrityError, NotFoundError
from okavango.training.collate import LoadMedium, collate, render_row
from okavango.training.dataset import Dataset, Example
from okavango.training.lora import quiet_peft
from okavango.training.made_up import made_up
from okavango.training.model import Trainee
from okavango.training.packing import ATTENTION
from okavango.training.pissa import make_plain
from okavango.training.spec import TrainSpec

_PACKAGES = ("okavango", "torch", "transformers", "peft")
_MEDIA_PROBES = 3
_PROBES = 4
_POSITIONS = 4


@dataclass(frozen=True)
class Origin:
    """What made an adapter, for its bundle's lineage. `data` and `held_out` as Dataset. `tokens`: that were
    trained on, in all steps; not told of private data. `privacy`: what was spent of it."""

    base: Base
    spec: TrainSpec
    data: Dataset
    held_out: Dataset | None
    job: str
    steps: int
    tokens: int | None
    privacy: Mapping[str, Any] | None = None

    def lineage(self) -> dict[str, Any]:
        spec = self.spec.to_json()
        # names and digests: where the files lay on one machine is nobody else's business
        for key in ("base", "data", "eval"):
            spec.pop(key)
        return {
            "base": {"name": self.base.name, "digest": self.base.digest},
            "data": _described(self.data, private=self.privacy is not None),
            "eval": _described(self.held_out) if self.held_out else None,
            "spec": spec,
            "job": self.job,
            "seed": self.spec.seed,
            "steps": self.steps,
            "tokens": self.tokens,
            **({"privacy": dict(self.privacy)} if self.privacy else {}),
            "versions": {name: version(name) for name in _PACKAGES},
        }


def write_bundle(
    folder: Path, trainee: Trainee, origin: Origin, renderer: Renderer, metrics: dict[str, float]
) -> Manifest:
    """Write and seal a bundle; the folder is there whole or not at all.

    Probes are computed in float32 by a decoder that is loaded anew and gets its adapter from the bundle, and
    from media that are encoded anew, so they vouch for what the bundle holds rather than for what was in
    memory.
    """
    partial = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if isinstance(trainee.decoder, PeftModel):
        _write_peft(partial / "decoder", trainee.decoder)
        if trainee.start is not None:
            make_plain(partial / "decoder", trainee.start)
    for modality in sorted(trainee.trained_heads):
        write_head(partial, modality, trainee.head(modality))
    if trainee.space is not None:
        write_embedding(partial, trainee.space)
    for modality, adapted in trainee.encoders.items():
        _write_peft(partial / "encoders" / modality, adapted.peft)
    if origin.spec.system is not None:
        (partial / bundle.PROMPT).write_text(json.dumps({"system": origin.spec.system}) + "\n")
    write_probes(partial, _probes(partial, trainee, origin, renderer))
    modalities = tuple(sorted(trainee.heads))
    manifest = Manifest(_components(origin.base, trainee), modalities, origin.lineage(), metrics)
    sealed = bundle.seal(partial, manifest)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return sealed


def finished_bundle(folder: Path) -> Manifest | None:
    """The manifest of a bundle that an earlier attempt finished, if there is one."""
    try:
        return bundle.verify(folder)
    except IntegrityError:
        return None


def publish(
    catalog: Catalog,
    store: ArtifactStore,
    folder: Path,
    base: Base,
    name: str,
    job_id: str,
    principal: str = "local",
) -> VersionRecord:
    """Store a sealed bundle and register it as the adapter's next version; said again, the same version.

    Raises:
        InputError, ConflictError: the name is taken by something else; see Catalog.register_version.
        NotReadyError: store or catalog cannot be reached.
    """
    registered = version_of_job(catalog, name, job_id)
    if registered is not None:
        return registered
    return register(catalog, store, folder, base, name, principal=principal, job_id=job_id)


def register(
    catalog: Catalog,
    store: ArtifactStore,
    folder: Path,
    base: Base,
    name: str,
    *,
    principal: str = "local",
    job_id: str | None = None,
) -> VersionRecord:
    """Store a sealed bundle and register it as the adapter's next version; errors as `publish`."""
    digest = store.put(folder)
    manifest = bundle.read_manifest(folder)
    catalog.put_base(base.name, base.digest, base.components, str(base.folder))
    return catalog.register_version(
        name,
        digest,
        base=base.name,
        components=manifest.components,
        modalities=manifest.modalities,
        lineage=manifest.lineage,
        metrics=manifest.metrics,
        principal=principal,
        job_id=job_id,
    )


def version_of_job(catalog: Catalog, name: str, job_id: str) -> VersionRecord | None:
    """The version that a job has registered already, if it has."""
    try:
        versions = catalog.get_adapter(name).versions
    except NotFoundError:
        return None
    return next((each for each in versions if each.job_id == job_id), None)


def _components(base: Base, trainee: Trainee) -> dict[str, str]:
    used = ["decoder"]
    for modality in sorted(trainee.heads):
        used.append(f"encoders.{modality}")
        if modality not in trainee.trained_heads:
            used.append(f"projectors.{modality}")
    return {name: base.components[name] for name in used}


def _write_peft(folder: Path, model: PeftModel) -> None:
    # without embedding layers: nothing here trains them, and to look for them PEFT would ask a model hub
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / CONFIG
    config = json.loads(path.read_text())
    # PEFT keeps a set, whose order differs between processes, and with it the bundle's digest
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _probes(folder: Path, trainee: Trainee, origin: Origin, renderer: Renderer) -> list[Probe]:
    """Probes of an adapter as it lies in a bundle's folder."""
    model: PeftModel | PreTrainedModel = load_decoder(origin.base, torch.float32, attention=ATTENTION)
    if (folder / "decoder").is_dir():
        with quiet_peft():
            model = PeftModel.from_pretrained(model, str(folder / "decoder"))
    heads = {modality: _read_head(folder, modality, trainee, origin.base) for modality in trainee.heads}
    fresh = Trainee(model, heads).eval()
    encoders = {modality: _read_encoder(folder, modality, origin.base) for modality in trainee.heads}
    examples = _probe_examples(origin, sorted(heads))
    return [_probe(fresh, example, renderer, origin.spec.system, encoders) for example in examples]


def _read_head(folder: Path, modality: str, trainee: Trainee, base: Base) -> ProjectionHead:
    if modality not in trainee.trained_heads:
        return load_head(base.heads[modality])
    path = folder / "projectors" / f"{modality}.safetensors"
    return bind_head(trainee.head(modality).spec, load_file(path), where=path.name)


def _read_encoder(folder: Path, modality: str, base: Base) -> Encoder:
    encoder = load_encoder(base.encoders[modality])
    delta = folder / "encoders" / modality
    if delta.is_dir():
        with quiet_peft():
            PeftModel.from_pretrained(encoder.module, str(delta))
    return encoder


def _probe_examples(origin: Origin, modalities: Collection[str]) -> list[Example]:
    """Three conversations with media, and one of text alone; where there are no media, four of text. None of
    them is a row of private data."""
    wanted = _MEDIA_PROBES if modalities else 0
    seen: list[Example] = []
    texts: list[Example] = []
    shown = (origin.held_out, None if origin.privacy else origin.data)
    known = chain.from_iterable(each.rows() for each in shown if each)
    for example in chain(known, made_up(modalities) if origin.privacy else ()):
        (seen if _has_media(example) else texts).append(example)
        if len(seen) >= wanted and (len(texts) >= _PROBES - wanted or (texts and seen)):
            break
    if not texts:
        texts = [_without_media(seen[0])]
    return [*seen[:wanted], *texts[: _PROBES - wanted]]


def _has_media(example: Example) -> bool:
    return any(message.media for message in example.messages)


def _without_media(example: Example) -> Example:
    def parts(message: Message) -> tuple[Part, ...]:
        return tuple(part for part in message.parts if isinstance(part, Text))

    return replace(example, messages=tuple(replace(m, parts=parts(m)) for m in example.messages))


@torch.no_grad()
def _probe(
    model: Trainee,
    example: Example,
    renderer: Renderer,
    system: str | None,
    encoders: Mapping[str, Encoder],
) -> Probe:
    row = render_row(example, renderer, system)
    batch = collate([row], _fresh_features(model, example, encoders))
    logits = model(batch)
    # evenly over the answers, so that a later turn is looked at, too
    chosen = torch.linspace(0, len(batch.labels) - 1, min(_POSITIONS, len(batch.labels))).round().long()
    tokens = torch.tensor(renderer.conversation(example.messages, system).tokens)
    return Probe(example.messages, tokens, batch.predicting[chosen], logits[chosen], system)


def _fresh_features(model: Trainee, example: Example, encoders: Mapping[str, Encoder]) -> LoadMedium:
    media = {medium.digest: medium for message in example.messages for medium in message.media}

    def load(modality: str, digest: str) -> torch.Tensor:
        features = encode(encoders[modality], [decode(media[digest])])[0]
        return pool(features, model.head(modality).spec)

    return load


def _described(dataset: Dataset, *, private: bool = False) -> dict[str, Any]:
    """Whoever guesses private data is not to be told that they guessed right."""
    facts = {"name": dataset.path.name, "rows": len(dataset)}
    return facts if private else {**facts, "digest": dataset.digest}
