"""The slot table, without tensors."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from okavango.serving.adapters.slots import Lease, SlotTable


def test_slots_evict_the_longest_idle_and_never_a_leased_one():
    table = SlotTable(2)
    assert table.acquire("a") == Lease(1, load=True)
    assert table.acquire("b") == Lease(2, load=True)
    assert [table.has_room(digest) for digest in "abc"] == [True, True, False]
    table.release("b")
    table.release("a")
    assert table.acquire("b") == Lease(2, load=False)
    assert table.acquire("c") == Lease(1, load=True)
    assert table.residents == ("b", "c")


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef")), max_size=60), st.integers(1, 4))
def test_slots_stay_whole(moves, slots):
    table, leased = SlotTable(slots), []
    for acquire, digest in moves:
        if acquire and table.has_room(digest):
            table.acquire(digest)
            leased.append(digest)
        elif acquire:
            assert len(set(leased)) == slots
        elif not acquire and digest in leased:
            leased.remove(digest)
            table.release(digest)
        table.check_integrity()
        table.check_holders(leased)
        assert set(leased) <= set(table.residents)
