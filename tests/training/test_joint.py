"""The joint objective: one loss over all processes, dropout by seed alone, retrieval that counts captions."""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contrastive_process import compute_share, pairs
from torch import Tensor
from training_fixtures import Workshop, text_row, write_rows
from typer.testing import CliRunner

from okavango.modalities.base import find_base, verify_base
from okavango.modalities.embedding import EmbeddingSpec, new_embedding, read_embedding, write_embedding
from okavango.platform.cli import app
from okavango.platform.errors import BindError
from okavango.training.joint import recall_at_1, without_some
from okavango.training.monitor import Monitor
from okavango.training.objective import contrastive_loss
from okavango.training.run import Outcome
from okavango.training.worker import run_job, submit

pytestmark = pytest.mark.usefixtures("one_thread")
JOINT = {"weight": 1.0, "width": 32}


def by_hand(media: Tensor, texts: Tensor, scale: float) -> Tensor:
    scores, own = media @ texts.T * scale, torch.arange(len(media))
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def test_the_loss_is_clips() -> None:
    media, texts = pairs(6, 0)
    found = contrastive_loss(media, texts, torch.tensor(9.0))
    torch.testing.assert_close(found, by_hand(media, texts, 9.0))


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_tell_apart_costs_nothing_and_has_a_gradient(count: int) -> None:
    media, texts = pairs(count, 0)
    scale = torch.tensor(9.0, requires_grad=True)
    loss = contrastive_loss(media.requires_grad_(), texts, scale)
    assert loss.item() == 0
    loss.backward()
    assert scale.grad is not None


@pytest.mark.parametrize("counts", [[3, 2], [4, 0], [0, 0]])
def test_processes_with_unlike_numbers_of_pairs_agree_and_none_hangs(
    tmp_path: Path, counts: list[int]
) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    started = [
        context.Process(target=compute_share, args=(rank, counts, str(tmp_path), results))
        for rank in range(2)
    ]
    for each in started:
        each.start()
    found = sorted(results.get(timeout=60) for _ in started)
    for each in started:
        each.join(timeout=60)
        assert each.exitcode == 0
    both = [pairs(count, rank) for rank, count in enumerate(counts)]
    media, texts = (torch.cat([each[side] for each in both]) for side in range(2))
    media.requires_grad_()
    expected = contrastive_loss(media, texts, torch.tensor(5.0))
    assert [loss for _, loss, _ in found] == pytest.approx([expected.item()] * 2, abs=1e-6)
    expected.backward()
    assert media.grad is not None
    grads = torch.cat([torch.tensor(grad or []).view(-1, 8) for _, _, grad in found])
    # each process has the whole loss, so a pair's gradient comes from both of them
    torch.testing.assert_close(grads, 2 * media.grad)


def test_dropout_is_drawn_by_seed_and_step_and_keeps_the_others() -> None:
    made = {"image": [torch.ones(2, 3)] * 50, "audio": [torch.ones(4, 3)] * 50}
    first, again, later = (without_some(made, 0.4, 7, step) for step in (1, 1, 2))

    def gone(found: Any) -> list[bool]:
        return [bool((vectors == 0).all()) for name in sorted(found) for vectors in found[name]]

    assert gone(first) == gone(again) != gone(later)
    assert 20 < sum(gone(first)) < 60
    assert without_some(made, 0.0, 7, 1) is made


def test_recall_counts_a_hit_by_caption() -> None:
    left = torch.eye(3)
    right = torch.tensor([[0.9, 0.1, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert recall_at_1(left, right, ["a", "b", "c"]) == pytest.approx(1 / 3)
    assert recall_at_1(left, right, ["a", "a", "c"]) == 1


def test_a_space_is_read_back_and_wants_its_own_decoder(tmp_path: Path) -> None:
    head = new_embedding(EmbeddingSpec(12, 6, ("image", "audio")), 0.1, seed=3)
    head.common.copy_(torch.arange(12.0))
    write_embedding(tmp_path, head)
    found = read_embedding(tmp_path, 12)
    assert found is not None
    vectors = [torch.randn(4, 12), torch.randn(2, 12)]
    assert torch.equal(found.texts(vectors), head.texts(vectors))
    assert torch.equal(found.media_of("audio", vectors), head.media_of("audio", vectors))
    assert found.texts(vectors).norm(dim=-1).tolist() == pytest.approx([1, 1])
    assert found.scale.item() == pytest.approx(10)
    with pytest.raises(BindError, match="width 12, and the decoder has 16"):
        read_embedding(tmp_path, 16)
    assert read_embedding(tmp_path / "none", 12) is None


def train(workshop: Workshop, **values: Any) -> Outcome:
    quick = {"eval": workshop.folder / "pictures.jsonl", "eval_rows": 1, "max_new_tokens": 2, "views": 0}
    job = submit(workshop.catalog, workshop.settings, workshop.spec(**{**quick, **values}))
    return run_job(workshop.catalog, workshop.store, workshop.settings, job.id, Monitor())


def told_by(workshop: Workshop, name: str, **values: Any) -> str:
    """What a job says, trained for a step."""
    job = train(workshop, **{"name": name, "steps": 1, "align": {}, **values}).version.job_id
    assert job is not None
    return "\n".join(event.message for event in workshop.catalog.list_events(job, limit=1000))


def test_pictures_and_captions_find_each_other_after_joint_training(workshop: Workshop) -> None:
    trained = train(workshop, steps=60, batch_size=8, joint=JOINT, align={"steps": 0}).version.metrics
    fresh = train(workshop, steps=1, batch_size=8, joint=JOINT, align={"steps": 0}).version.metrics
    assert trained["retrieval_r1_text"] == trained["retrieval_r1_media"] == 1
    assert fresh["retrieval_r1_text"] < 0.5
    assert "retrieval_r1_text" not in train(workshop, steps=1).version.metrics


def test_heads_that_learnt_alone_become_a_bases_own(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OKAVANGO_HOME", str(workshop.settings.home))
    monkeypatch.setenv("OKAVANGO_CACHE", str(workshop.settings.cache))
    train(workshop, name="heads", steps=2, lora={"train": False}, joint=JOINT)
    made = CliRunner().invoke(app, ["adapters", "to-base", "heads@1", "seeing"])
    assert made.exit_code == 0, made.output
    assert "of heads@1 its image head and space of embeddings" in made.output
    base = find_base("seeing", workshop.settings.bases)
    verify_base(base)
    assert base.heads["image"].trained
    assert base.embedding is not None
    over = train(workshop, base="seeing", head={"train": False}, steps=1).version
    assert over.components["projectors.image"] == base.heads["image"].digest
    assert "No warm start of the image head: it is trained" in told_by(workshop, "own", base="seeing")
    fresh = {"heads": {"image": {"hidden": 40}}, "align": {"steps": 1}}
    assert "No warm start" not in told_by(workshop, "fresh", base="seeing", **fresh)
    refused = CliRunner().invoke(app, ["adapters", "to-base", over.ref, "other"])
    assert refused.exit_code == 1
    assert "train heads alone" in refused.output


def test_text_alone_trains_under_a_joint_objective(workshop: Workshop) -> None:
    rows = [text_row("a", f"b {i}") for i in range(6)]
    path = write_rows(workshop.folder / "text.jsonl", rows)
    metrics = train(workshop, data=path, eval=path, joint=JOINT).version.metrics
    assert math.isfinite(metrics["loss"])
    assert "retrieval_r1_text" not in metrics
