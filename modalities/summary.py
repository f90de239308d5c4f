"""What `okavango base` says of a base, read from its files without loading a weight."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

from okavango.modalities.base import Base
from okavango.modalities.projector import HeadSpec


def decoder_summary(folder: Path) -> tuple[str, str]:
    """(architecture, parameters) of a decoder's directory; a dash for what its files do not tell."""
    try:
        config = json.loads((folder / "config.json").read_text())
        count = sum(_parameters(file) for file in folder.glob("*.safetensors"))
    except (OSError, ValueError, struct.error):
        return "missing", "-"
    names = config.get("architectures") or [config.get("model_type", "-")]
    return names[0], _short(count)


def base_fields(base: Base) -> Iterator[tuple[str, str]]:
    """(field, value) lines, in the order of base.toml."""
    architecture, parameters = decoder_summary(base.decoder.path)
    yield "name", base.name
    yield "folder", str(base.folder)
    yield "digest", base.digest
    yield "decoder", f"{architecture}, {parameters} parameters"
    yield "decoder.path", str(base.decoder.path)
    yield "decoder.context", f"{base.decoder.context} tokens"
    yield "decoder.digest", base.decoder.digest
    for name, encoder in base.encoders.items():
        yield f"encoders.{name}.path", str(encoder.path)
        yield f"encoders.{name}.kind", encoder.kind
        if encoder.image_size:
            yield f"encoders.{name}.image_size", f"{encoder.image_size} pixels"
            yield f"encoders.{name}.tiles", str(encoder.tiles)
        yield f"encoders.{name}.layers", ", ".join(str(layer) for layer in encoder.layers)
        yield f"encoders.{name}.features", f"{encoder.grid[0]} × {encoder.grid[1]} of width {encoder.width}"
        yield f"encoders.{name}.digest", encoder.digest
    for name, head in base.heads.items():
        yield f"projectors.{name}.path", str(head.path)
        yield f"projectors.{name}.kind", head.spec.kind
        yield f"projectors.{name}.tokens", _tokens(head.spec)
        yield f"projectors.{name}.hidden", str(head.spec.hidden)
        yield f"projectors.{name}.trained", "yes" if head.trained else "no: it means little before training"
        yield f"projectors.{name}.digest", head.digest


def _tokens(spec: HeadSpec) -> str:
    if spec.stride:
        return f"one each {spec.stride} positions, {spec.tokens} a window"
    return f"{spec.tokens} a medium"


def _parameters(file: Path) -> int:
    """Numbers in a safetensors file, by its header: a length of eight bytes, then JSON."""
    with file.open("rb") as handle:
        (size,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(size))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
