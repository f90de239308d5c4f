"""A workshop: a home of its own with the tiny base, a catalog and a store, and small data to train on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from okavango.modalities.base import Base, load_tokenizer
from okavango.modalities.encoders import make_renderer
from okavango.modalities.prompt import Renderer
from okavango.modalities.tiny_bundle import picture_bytes
from okavango.platform.artifacts import ArtifactStore
from okavango.platform.catalog.store import Catalog, open_catalog
from okavango.platform.config import Settings
from okavango.training.spec import TrainSpec, parse_spec

NAMES = ("red fox", "blue car", "big tree", "small cat", "hot tea", "old map", "ice cube", "wet dog")


@dataclass
class Workshop:
    """Where a job finds its base, data, catalog and store. `folder` is free for the test's own files."""

    folder: Path
    settings: Settings
    base: Base
    catalog: Catalog
    store: ArtifactStore

    def spec(self, **values: Any) -> TrainSpec:
        """A specification that trains fast; pictures.jsonl is what it trains on."""
        quick: dict[str, Any] = {
            "base": self.base.name,
            "data": self.folder / "pictures.jsonl",
            "name": "emoji",
            "steps": 4,
            "batch_size": 4,
            "lr": 1e-2,
            "precision": "float32",
            "lora": {"r": 4, "alpha": 8},
            "align": {"steps": 5},
        }
        return parse_spec(quick | values)


def picture_row(path: str, answer: str, question: str = "What is this?") -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": path}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}


def text_row(*turns: str) -> dict[str, Any]:
    """Turns of user and assistant by turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pictures(folder: Path, names: Sequence[str] = NAMES) -> Path:
    """pictures.jsonl: a random picture a name, asked about in words of different lengths."""
    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for i, name in enumerate(names):
        (folder / "images" / f"{i}.png").write_bytes(picture_bytes(i))
        rows.append(picture_row(f"images/{i}.png", name, "What is this" + "?" * (1 + i % 3)))
    return write_rows(folder / "pictures.jsonl", rows)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors are quicker on one, above all when other tests run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_renderer(tiny_base: Base) -> Renderer:
    return make_renderer(tiny_base, load_tokenizer(tiny_base))


@pytest.fixture
def workshop(tmp_path: Path, tiny_base: Base, one_thread: None) -> Iterator[Workshop]:
    settings = Settings(home=tmp_path / "home", cache=tmp_path / "cache")
    shutil.copytree(tiny_base.folder, settings.bases / tiny_base.name)
    write_pictures(tmp_path)
    catalog = open_catalog(settings)
    store = ArtifactStore(settings.artifacts, settings.cache / "artifacts")
    yield Workshop(tmp_path, settings, tiny_base, catalog, store)
    catalog.close()
