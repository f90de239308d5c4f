"""Adapters as `okavango train` makes them pass the gate of serving, and say what they have learned."""

from __future__ import annotations

from typing import Any

import pytest
from training_fixtures import NAMES, Workshop, text_row, write_rows

from okavango.serving.adapters.gate import ParityGate
from okavango.training.monitor import Monitor
from okavango.training.run import Outcome
from okavango.training.worker import run_job, submit


def train(workshop: Workshop, **values: Any) -> Outcome:
    job = submit(workshop.catalog, workshop.settings, workshop.spec(**values))
    return run_job(workshop.catalog, workshop.store, workshop.settings, job.id, Monitor())


def worst_error(workshop: Workshop, outcome: Outcome) -> float:
    """What serving's logits differ by from those that training stored, once every tensor is bound."""
    verdict = ParityGate(workshop.base).check(workshop.store.fetch(outcome.version.digest))
    assert verdict.state == "ready"
    assert verdict.verification["probes"] == 4
    return float(verdict.verification["float32"])


def test_eight_pictures_are_learned_by_heart(workshop: Workshop) -> None:
    outcome = train(
        workshop,
        eval=workshop.folder / "pictures.jsonl",
        steps=150,
        batch_size=8,
        label_smoothing=0.0,
        views=1,
        lora={"r": 8, "alpha": 16, "dropout": 0.0},
        align={"steps": 60},
        max_new_tokens=12,
    )
    assert [sample.answer for sample in outcome.samples] == list(NAMES)
    metrics = outcome.version.metrics
    assert metrics["exact_match"] == 1.0
    assert metrics["bleu4"] == pytest.approx(100)
    # a fresh model is at about 10 nats
    assert metrics["loss"] < 0.1
    assert worst_error(workshop, outcome) < 1e-4


@pytest.mark.parametrize(
    "values",
    [
        {"lora": {"r": 4, "targets": ["q_proj", "v_proj"]}},
        {"lora": {"r": 4, "alpha": 5, "use_rslora": True, "targets": r".*layers\.1\.mlp\.\w+_proj"}},
        {"head": {"train": False}},
        {"precision": "bf16", "system": "You are brief."},
        {"lora": {"train": False}},
        {"quantization": "nf4", "recompute": True},
        {"joint": {"weight": 0.5, "width": 16, "modality_dropout": 0.3}},
        {"encoders": {"image": {"r": 2}}},
        {"encoders": {"image": {"r": 2, "targets": ["c_fc"]}}, "head": {"train": False}},
        {"heads": {"image": {"kind": "resampler", "tokens": 3, "hidden": 64}}},
        {"heads": {"image": {"kind": "linear", "pooling": "stack"}}, "encoders": {"image": {}}},
    ],
    ids=[
        "q and v",
        "rslora on one layer",
        "the base's head",
        "bf16 with a system prompt",
        "heads alone",
        "four bits, layers computed anew",
        "a joint objective",
        "an encoder that learns",
        "an encoder that learns before the base's head",
        "a resampler",
        "a stacking linear head after an encoder that learns",
    ],
)
def test_every_kind_of_adapter_passes_the_gate(workshop: Workshop, values: dict[str, Any]) -> None:
    assert worst_error(workshop, train(workshop, **values)) < 1e-4


def test_so_does_one_of_text_alone(workshop: Workshop) -> None:
    rows = [text_row(f"say {i}", f"it is {i}", "again", f"{i}") for i in range(6)]
    outcome = train(workshop, data=write_rows(workshop.folder / "text.jsonl", rows))
    assert worst_error(workshop, outcome) < 1e-4
