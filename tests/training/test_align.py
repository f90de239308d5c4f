from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_fixtures import picture_row, text_row, write_pictures, write_rows

from okavango.modalities.base import Base, load_decoder, load_head
from okavango.modalities.prompt import Renderer, Span
from okavango.training.align import align, info_nce
from okavango.training.collate import Row, render_rows
from okavango.training.dataset import open_dataset
from okavango.training.loop import TrainingSet
from okavango.training.monitor import Monitor
from okavango.training.pairs import find_pairs
from okavango.training.spec import AlignSpec

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = AlignSpec(steps=80, batch_size=8, lr=1e-2)


def fake_features(modality: str, digest: str) -> torch.Tensor:
    return torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(int(digest[:8], 16)))


def test_the_loss_equals_a_hand_computed_one() -> None:
    seen = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    said = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    c = 1 / math.sqrt(2)
    scores = torch.tensor([[1.0, c], [0.0, c]]) / 0.5
    expected = (F.cross_entropy(scores, torch.arange(2)) + F.cross_entropy(scores.T, torch.arange(2))) / 2
    assert torch.allclose(info_nce(seen, said, torch.tensor([0, 1]), 0.5), expected)


def test_pairs_with_the_same_answer_are_no_negatives_of_each_other() -> None:
    """Of three pictures two are called the same: nothing is left to gain once both lie on that name."""
    said = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1])
    at_best = info_nce(said, said, labels, 0.01)
    # the entropy of choosing between two equal names, for two of three rows
    assert at_best.item() == pytest.approx(math.log(2) * 2 / 3, abs=1e-4)
    worse = info_nce(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), said, labels, 0.01)
    assert worse > at_best + 1


def test_each_picture_is_paired_with_the_answer_after_it() -> None:
    tokens = np.arange(20, dtype=np.int32)
    loss = np.isin(tokens, [8, 9, 10, 16, 17])
    spans = (Span("image", 2, 3), Span("image", 12, 3))
    row = Row(1, tokens[:18], loss[:18], spans, ("a" * 64, "b" * 64))
    # the end of each turn is not part of what was said
    assert [pair.answer for pair in find_pairs([row], "image")] == [(8, 9), (16,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_learns_to_tell_pictures_apart(
    tmp_path: Path, tiny_base: Base, tiny_renderer: Renderer, dtype: torch.dtype
) -> None:
    rows = render_rows(open_dataset(write_pictures(tmp_path)), tiny_renderer, None, 512)
    embedding = load_decoder(tiny_base, dtype).get_input_embeddings()
    losses, weights = [], []
    for steps in (1, 80, 80):
        head = load_head(tiny_base.heads["image"]).requires_grad_(True)
        spec = QUICK.model_copy(update={"steps": steps})
        losses.append(align(head, "image", TrainingSet(rows, fake_features), embedding, spec, 0, Monitor()))
        weights.append(head.up.weight.detach().clone())
    first, last, again = losses
    assert first is not None
    assert last is not None
    assert first > math.log(8) / 2 > 5 * last
    assert last == again
    assert torch.equal(weights[1], weights[2])


@pytest.mark.parametrize(
    ("rows", "steps", "reason"),
    [
        ([text_row("a", "b"), text_row("c", "d")], 9, "the data hold no such media"),
        (
            [picture_row("images/0.png", "same"), picture_row("images/1.png", "same")],
            9,
            "are alike",
        ),
        ([picture_row("images/0.png", "one"), picture_row("images/1.png", "two")], 0, "turned off"),
    ],
)
def test_it_steps_aside_where_there_is_nothing_to_learn(
    tmp_path: Path,
    tiny_base: Base,
    tiny_renderer: Renderer,
    rows: list[dict[str, object]],
    steps: int,
    reason: str,
) -> None:
    write_pictures(tmp_path)
    dataset = open_dataset(write_rows(tmp_path / "rows.jsonl", rows))
    said: list[str] = []
    monitor = Monitor()
    monitor.say = said.append  # type: ignore[method-assign]
    head = load_head(tiny_base.heads["image"])
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    embedding = load_decoder(tiny_base, torch.float32).get_input_embeddings()
    spec = QUICK.model_copy(update={"steps": steps})
    rendered = render_rows(dataset, tiny_renderer, None, 512)
    assert align(head, "image", TrainingSet(rendered, fake_features), embedding, spec, 0, monitor) is None
    assert reason in said[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in head.state_dict().items())


def test_heads_that_come_trained_are_left_alone_unless_steps_are_asked_for() -> None:
    assert AlignSpec().for_head(trained=False).steps == 600
    assert AlignSpec().for_head(trained=True).steps == 0
    for steps in (0, 7):
        assert {AlignSpec(steps=steps).for_head(trained).steps for trained in (False, True)} == {steps}
