import pytest
from hypothesis import given
from hypothesis import strategies as st

from okavango.training.spread import Large, Spread


@given(st.lists(st.integers(0, 10**9), min_size=1), st.integers(0, 5))
def test_a_summary_is_that_of_the_sizes(sizes: list[int], keep: int) -> None:
    spread = Spread(keep)
    for row, size in enumerate(sizes, 1):
        spread.add(size, row)
    summary = spread.summary()
    assert summary is not None
    assert (summary.count, summary.total, summary.largest) == (len(sizes), sum(sizes), max(sizes))
    ordered = sorted(sizes)
    for share, found in ((50, summary.p50), (90, summary.p90), (99, summary.p99)):
        exact = ordered[max(0, -(-len(sizes) * share // 100) - 1)]
        assert found == pytest.approx(exact, rel=0.006)
    rows = sorted((-size, row) for row, size in enumerate(sizes, 1))[:keep]
    assert spread.largest() == [Large(-size, 0, row) for size, row in rows]


def test_nothing_has_no_summary() -> None:
    assert Spread(3).summary() is None
    assert Spread(3).largest() == []


def test_counts_stay_few_whatever_comes() -> None:
    spread = Spread()
    for size in range(0, 2_000_000, 7):
        spread.add(size, 1)
    assert len(spread._counts) < 4000
