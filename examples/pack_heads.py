"""The heads of a version that trained heads alone, as the one file in which a base's defaults come along.

python examples/pack_heads.py heads@1 modalities/starter_heads.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from okavango.modalities.aligned import heads_of_bundle, write_heads
from okavango.platform.artifacts import ArtifactStore
from okavango.platform.catalog.store import open_catalog
from okavango.platform.config import load_settings
from okavango.platform.errors import OkavangoError


def pack(ref: str, file: Path) -> None:
    """Write the version's heads, its space of embeddings and its scores to `file`."""
    settings = load_settings()
    catalog = open_catalog(settings)
    try:
        version = catalog.resolve(ref)
    finally:
        catalog.close()
    store = ArtifactStore(settings.artifacts, settings.cache / "artifacts")
    write_heads(file, heads_of_bundle(store.fetch(version.digest)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", help="as the catalog names it: heads, heads@1 or heads@production")
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    try:
        pack(options.version, options.file)
    except OkavangoError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{options.file}: {options.file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
