"""A trained adapter → a sealed bundle → a version in the catalog."""

# Shapes: N tokens of a probe, L predicted ones, V vocabulary

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from okavango.modalities.base import Base, load_decoder, load_head
from okavango.modalities.content import Limits, Message, Part, Text
from okavango.modalities.image import ImageEncoder, decode_image
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
from okavango.training.collate import LoadFeatures, collate, render_row
from okavango.training.dataset import Dataset, Example
from okavango.training.lora import quiet_peft
from okavango.training.model import Trainee
from okavango.training.packing import ATTENTION
from okavango.training.spec import TrainSpec

_PACKAGES = ("okavango", "torch", "transformers", "peft")
_MEDIA_PROBES = 3
_PROBES = 4
_POSITIONS = 4


@dataclass(frozen=True)
class Origin:
    """What made an adapter, for its bundle's lineage. `data` and `held_out` as Dataset."""

    base: Base
    spec: TrainSpec
    data: Dataset
    held_out: Dataset | None
    job: str
    steps: int

    def lineage(self) -> dict[str, Any]:
        spec = self.spec.to_json()
        # names and digests: where the files lay on one machine is nobody else's business
        for key in ("base", "data", "eval"):
            spec.pop(key)
        return {
            "base": {"name": self.base.name, "digest": self.base.digest},
            "data": _described(self.data),
            "eval": _described(self.held_out) if self.held_out else None,
            "spec": spec,
            "job": self.job,
            "seed": self.spec.seed,
            "steps": self.steps,
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
    _write_decoder(partial / "decoder", trainee.decoder)
    if trainee.head is not None and trainee.trains_head:
        _write_head(partial / "projectors", trainee.head)
    if origin.spec.system is not None:
        (partial / bundle.PROMPT).write_text(json.dumps({"system": origin.spec.system}) + "\n")
    write_probes(partial, _probes(partial, trainee, origin, renderer))
    modalities = ("image",) if trainee.head is not None else ()
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
    if trainee.head is not None:
        used.append("encoders.image")
        if not trainee.trains_head:
            used.append("projectors.image")
    return {name: base.components[name] for name in used}


def _write_decoder(folder: Path, decoder: PeftModel) -> None:
    # without embedding layers: nothing here trains them, and to look for them PEFT would ask a model hub
    decoder.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / CONFIG
    config = json.loads(path.read_text())
    # PEFT keeps a set, whose order differs between processes, and with it the bundle's digest
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_head(folder: Path, head: ProjectionHead) -> None:
    folder.mkdir()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / "image.safetensors")
    (folder / "image.json").write_text(json.dumps(head.spec.to_json(), sort_keys=True) + "\n")


def _probes(folder: Path, trainee: Trainee, origin: Origin, renderer: Renderer) -> list[Probe]:
    """Probes of an adapter as it lies in a bundle's folder."""
    decoder = load_decoder(origin.base, torch.float32, attention=ATTENTION)
    with quiet_peft():
        model = PeftModel.from_pretrained(decoder, str(folder / "decoder"))
    head = _read_head(folder, trainee, origin.base)
    fresh = Trainee(model, head, trains_head=False).eval()
    encoder = ImageEncoder.load(origin.base.encoders["image"]) if head is not None else None
    examples = _probe_examples(origin, with_media=head is not None)
    return [_probe(fresh, example, renderer, origin.spec.system, encoder) for example in examples]


def _read_head(folder: Path, trainee: Trainee, base: Base) -> ProjectionHead | None:
    if trainee.head is None:
        return None
    if not trainee.trains_head:
        return load_head(base.heads["image"])
    path = folder / "projectors" / "image.safetensors"
    return bind_head(trainee.head.spec, load_file(path), where=path.name)


def _probe_examples(origin: Origin, *, with_media: bool) -> list[Example]:
    """Three conversations with media, and one of text alone; where there are no media, four of text."""
    wanted = _MEDIA_PROBES if with_media else 0
    seen: list[Example] = []
    texts: list[Example] = []
    for example in chain.from_iterable(each.rows() for each in (origin.held_out, origin.data) if each):
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
    model: Trainee, example: Example, renderer: Renderer, system: str | None, encoder: ImageEncoder | None
) -> Probe:
    row = render_row(example, renderer, system)
    batch = collate([row], _fresh_features(model, example, encoder))
    logits = model(batch)
    # evenly over the answers, so that a later turn is looked at, too
    chosen = torch.linspace(0, len(batch.labels) - 1, min(_POSITIONS, len(batch.labels))).round().long()
    tokens = torch.tensor(renderer.conversation(example.messages, system).tokens)
    return Probe(example.messages, tokens, batch.predicting[chosen], logits[chosen], system)


def _fresh_features(model: Trainee, example: Example, encoder: ImageEncoder | None) -> LoadFeatures:
    media = {medium.digest: medium for message in example.messages for medium in message.media}
    if not media:
        return lambda digest: torch.empty(0)
    assert encoder is not None
    assert model.head is not None
    pictures = [decode_image(medium.data, Limits()) for medium in media.values()]
    pooled = pool(encoder.encode(pictures), model.head.spec)
    return dict(zip(media, pooled, strict=True)).__getitem__


def _described(dataset: Dataset) -> dict[str, Any]:
    return {"name": dataset.path.name, "digest": dataset.digest, "rows": len(dataset)}
