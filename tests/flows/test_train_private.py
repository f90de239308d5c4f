"""A private job's bundle passes the gate of serving, with probes that quote no row that it learned from."""

from __future__ import annotations

import pytest
from training_fixtures import NAMES, Workshop, picture_row, text_row, write_rows

from okavango.modalities.probes import read_probes
from okavango.serving.adapters.gate import ParityGate
from okavango.training.monitor import Monitor
from okavango.training.worker import run_job, submit


@pytest.mark.parametrize("with_eval", [True, False])
def test_a_private_job_passes_the_gate_and_quotes_no_row(workshop: Workshop, with_eval: bool) -> None:
    rows = [picture_row(f"images/{i}.png", f"public {i}", "Which one?") for i in range(4)]
    held_out = write_rows(workshop.folder / "held-out.jsonl", [*rows, text_row("Who is it?", "public text")])
    spec = workshop.spec(
        privacy={"epsilon": 4.0, "delta": 1e-2, "eval_is_public": True},
        eval=held_out if with_eval else None,
        align={"steps": 0},
        compare=False,
        max_new_tokens=4,
    )
    job = submit(workshop.catalog, workshop.settings, spec)
    outcome = run_job(workshop.catalog, workshop.store, workshop.settings, job.id, Monitor())
    folder = workshop.store.fetch(outcome.version.digest)
    verdict = ParityGate(workshop.base).check(folder)
    assert verdict.state == "ready"
    assert verdict.verification["probes"] == 4
    said = [message.text for probe in read_probes(folder) for message in probe.messages]
    assert any("public" in text for text in said) == with_eval
    assert not set(said) & set(NAMES)
    assert 0 < outcome.version.metrics["epsilon"] <= 4.0
