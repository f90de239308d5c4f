from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from okavango.training.order import DataOrder

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=200)


@given(LENGTHS, st.integers(1, 9), st.integers(1, 3), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_takes_each_row_once(
    lengths: list[int], batch_size: int, accumulation: int, seed: int, epoch: int
) -> None:
    order = DataOrder(lengths, batch_size, accumulation, seed)
    steps = range(epoch * order.steps_an_epoch, (epoch + 1) * order.steps_an_epoch)
    batches = [order.batches(step) for step in steps]
    assert sorted(row for step in batches for batch in step for row in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for step in batches for batch in step)
    assert all(1 <= len(step) <= accumulation for step in batches)


@given(LENGTHS, st.integers(50, 300), st.integers(1, 3), st.integers(0, 5), st.integers(0, 3))
def test_batches_are_filled_with_tokens(
    lengths: list[int], batch_tokens: int, accumulation: int, seed: int, epoch: int
) -> None:
    order = DataOrder(lengths, 16, accumulation, seed, batch_tokens)
    steps = range(epoch * order.steps_an_epoch, (epoch + 1) * order.steps_an_epoch)
    batches = [batch for step in steps for batch in order.batches(step)]
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[row] for row in batch) <= batch_tokens for batch in batches)
    sizes = sorted(((max(lengths[row] for row in batch), len(batch)) for batch in batches), reverse=True)
    assert all(count == batch_tokens // longest for longest, count in sizes[:-1])


def test_equally_long_rows_meet_others_in_each_epoch() -> None:
    order = DataOrder([10] * 40, 16, 1, seed=0, batch_tokens=80)
    assert order.steps_an_epoch == 5
    first, second = ({order.batches(step) for step in range(start, start + 5)} for start in (0, 5))
    assert not first & second


def test_a_step_is_a_function_of_seed_and_step_alone() -> None:
    lengths = [i % 7 + 1 for i in range(100)]
    order = DataOrder(lengths, 8, 1, seed=3)
    walked = [order.batches(step) for step in range(40)]
    assert [DataOrder(lengths, 8, 1, seed=3).batches(step) for step in reversed(range(40))] == walked[::-1]
    assert walked[:13] != walked[13:26]
    assert DataOrder(lengths, 8, 1, seed=4).batches(0) != walked[0]


def test_rows_of_a_step_are_about_as_long_as_each_other() -> None:
    lengths = [(i * 37) % 101 + 1 for i in range(320)]
    order = DataOrder(lengths, 10, 1, seed=0)
    spreads = [
        max(lengths[row] for row in rows) - min(lengths[row] for row in rows)
        for step in range(order.steps_an_epoch)
        for rows in order.batches(step)
    ]
    assert max(spreads) <= 16
