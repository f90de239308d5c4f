"""Probes: conversations with the logits that training saw, stored in the bundle.

Training writes them from its own forward pass in float32; the parity gate renders, encodes and runs the
same conversations through serving and compares. Full logits at a few answer positions, so that a wrong
scale, head, template or preprocessing cannot hide behind an equal argmax.
"""

# Shapes: N tokens of the probe, P positions compared, V vocabulary

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from okavango.modalities.content import Media, Message, Part, Text
from okavango.platform.bundle import PROBES
from okavango.platform.errors import IntegrityError


@dataclass(frozen=True)
class Probe:
    """A conversation and what training saw of it.

    Attributes:
        messages: the conversation, the assistant's answer included.
        system: the default system prompt it was rendered with.
        tokens: [N] ids of its rendering.
        positions: [P] token positions whose next-token logits are stored.
        logits: [P, V] in float32.
    """

    messages: tuple[Message, ...]
    tokens: Tensor
    positions: Tensor
    logits: Tensor
    system: str | None = None


def write_probes(folder: Path, probes: Sequence[Probe]) -> None:
    """Write <folder>/probes.safetensors."""
    tensors: dict[str, Tensor] = {}
    described = []
    for i, probe in enumerate(probes):
        tensors[f"{i}.tokens"] = probe.tokens.to(torch.int64).contiguous()
        tensors[f"{i}.positions"] = probe.positions.to(torch.int64).contiguous()
        tensors[f"{i}.logits"] = probe.logits.float().contiguous()
        media = [medium for message in probe.messages for medium in message.media]
        for k, medium in enumerate(media):
            tensors[f"{i}.media.{k}"] = torch.frombuffer(bytearray(medium.data), dtype=torch.uint8)
        described.append({"system": probe.system, "messages": _describe(probe.messages)})
    save_file(tensors, folder / PROBES, metadata={"probes": json.dumps(described)})


def read_probes(folder: Path) -> tuple[Probe, ...]:
    """Read <folder>/probes.safetensors.

    Raises:
        IntegrityError: the file is not as write_probes leaves it.
    """
    path = folder / PROBES
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            described = json.loads(file.metadata()["probes"])
        return tuple(_probe(i, item, tensors) for i, item in enumerate(described))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"not a probe file: {error}", where=str(path)) from error


def _describe(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [
        {
            "role": message.role,
            "parts": [
                {"text": part.text} if isinstance(part, Text) else {"media": part.modality}
                for part in message.parts
            ],
        }
        for message in messages
    ]


def _probe(i: int, described: dict[str, Any], tensors: dict[str, Tensor]) -> Probe:
    count = 0

    def part(raw: dict[str, Any]) -> Part:
        nonlocal count
        if "text" in raw:
            return Text(raw["text"])
        data = tensors[f"{i}.media.{count}"].numpy().tobytes()
        count += 1
        return Media(raw["media"], data)

    messages = tuple(
        Message(item["role"], tuple(part(raw) for raw in item["parts"])) for item in described["messages"]
    )
    return Probe(
        messages,
        tensors[f"{i}.tokens"],
        tensors[f"{i}.positions"],
        tensors[f"{i}.logits"],
        described["system"],
    )
