"""A PEFT directory that was made elsewhere → a sealed bundle without probes → a version in the catalog.

Every tensor is bound against the base before anything is stored. Whether the adapter was trained on these
very weights cannot be told from its tensors: a version without probes is `bound`, never `ready`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from okavango.modalities.base import Base, empty_decoder, list_bases, load_tokenizer
from okavango.modalities.lora import LoraWeights, find_targets
from okavango.modalities.peft_files import CONFIG, WEIGHTS, read_peft
from okavango.platform import bundle
from okavango.platform.artifacts import ArtifactStore
from okavango.platform.bundle import Manifest
from okavango.platform.catalog.names import check_name
from okavango.platform.catalog.records import VersionRecord
from okavango.platform.catalog.store import Catalog
from okavango.platform.errors import ConfigError, NotFoundError
from okavango.training.publish import register

_PACKAGES = ("okavango", "peft")


@dataclass(frozen=True)
class Imported:
    """What came of an import.

    Attributes:
        layers: linear layers that the adapter adapts.
        rank: the highest of their ranks; a server's --max-rank must reach it.
        made_for: the base that the adapter itself names, if it does.
        same_template: False where a chat template lies beside the adapter that is not the base's.
    """

    version: VersionRecord
    layers: int
    rank: int
    made_for: str | None
    same_template: bool


def choose_base(bases: Path) -> str:
    """The only base that there is. Raises ConfigError where there are several, or none."""
    known = list_bases(bases)
    if len(known) != 1:
        remedy = f"known: {', '.join(known)}" if known else "okavango base build starter makes one"
        raise ConfigError("which base was it trained on?", where="--base", remedy=remedy)
    return known[0]


def import_peft(
    folder: Path, name: str, base: Base, catalog: Catalog, store: ArtifactStore, principal: str = "local"
) -> Imported:
    """Register a PEFT LoRA directory, as save_pretrained writes it, as the adapter's next version.

    The same files again return the version that they have.

    Raises:
        NotFoundError: no such directory.
        UnsupportedError: the adapter uses something that is not served.
        BindError: a tensor fits nothing in the base's decoder; all such are named.
        InputError, ConflictError: the name is taken by something else; see Catalog.register_version.
        NotReadyError: store or catalog cannot be reached.
    """
    check_name(name, "adapter")
    if not folder.is_dir():
        raise NotFoundError("no such directory", where=str(folder))
    weights = read_peft(folder, find_targets(empty_decoder(base)))
    with tempfile.TemporaryDirectory(prefix="okavango-import-") as temporary:
        copied = Path(temporary) / "bundle"
        _write_bundle(copied, folder, base)
        registered = register(catalog, store, copied, base, name, principal=principal)
    return _described(registered, weights, folder, base)


def _write_bundle(bundle_folder: Path, source: Path, base: Base) -> Manifest:
    """PEFT's two files as they are; nothing else of what lies beside them."""
    decoder = bundle_folder / "decoder"
    decoder.mkdir(parents=True)
    for file in (CONFIG, WEIGHTS):
        shutil.copyfile(source / file, decoder / file)
    components = {"decoder": base.components["decoder"]}
    return bundle.seal(bundle_folder, Manifest(components, lineage=_lineage(source, base)))


def _lineage(source: Path, base: Base) -> dict[str, Any]:
    config = json.loads((source / CONFIG).read_text())
    return {
        "base": {"name": base.name, "digest": base.digest},
        "imported": {
            "folder": source.resolve().name,
            "made_for": config.get("base_model_name_or_path"),
            "peft": config.get("peft_version"),
        },
        "versions": {package: version(package) for package in _PACKAGES},
    }


def _described(registered: VersionRecord, weights: LoraWeights, folder: Path, base: Base) -> Imported:
    return Imported(
        registered,
        layers=len(weights.factors),
        rank=weights.rank,
        made_for=registered.lineage.get("imported", {}).get("made_for"),
        same_template=_template(folder) in (None, load_tokenizer(base).chat_template),
    )


def _template(folder: Path) -> str | None:
    """The chat template that a trainer has saved beside the adapter, if any."""
    alone, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if alone.is_file():
            return alone.read_text()
        if config.is_file():
            return json.loads(config.read_text()).get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"not a tokenizer's: {error}", where=str(folder)) from error
    return None
