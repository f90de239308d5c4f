from __future__ import annotations

import math

import pytest
import torch

from okavango.training.objective import answer_loss, parted_loss


def test_the_loss_is_the_sum_of_the_tokens_surprises() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    expected = math.log(2) + math.log(4 / 3)
    assert math.isclose(answer_loss(logits, torch.tensor([1, 0])).item(), expected, rel_tol=1e-6)


def test_it_is_computed_in_float32() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(5)
    assert answer_loss(logits, labels).dtype == torch.float32
    assert torch.equal(answer_loss(logits, labels), answer_loss(logits.float(), labels))


def test_batches_of_a_step_add_up_whatever_their_counts() -> None:
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(7)
    parts = answer_loss(logits[:2], labels[:2]) / 7 + answer_loss(logits[2:], labels[2:]) / 7
    assert torch.allclose(parts, torch.nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("rows", [1, 7, 23, 50])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_in_parts_it_is_the_same(rows: int, smoothing: float) -> None:
    seen: list[int] = []
    layer = torch.nn.Linear(8, 300).requires_grad_(False)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        logits: torch.Tensor = layer(hidden)
        return logits

    hidden, labels = torch.randn(23, 8), torch.randint(0, 300, (23,))
    found = []
    for parted in (False, True):
        own = (2 * hidden).requires_grad_()
        scaled = own * 3
        if parted:
            loss = parted_loss(scaled, labels, head, rows, smoothing)
        else:
            loss = answer_loss(layer(scaled), labels, smoothing)
        (loss / 5).backward()
        found.append((loss.detach(), own.grad))
    torch.testing.assert_close(*found)
    assert max(seen) <= rows
    assert sum(seen) == 23
    with torch.no_grad():
        torch.testing.assert_close(parted_loss(2 * hidden * 3, labels, head, rows, smoothing), found[0][0])
