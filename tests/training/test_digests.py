import hashlib

from hypothesis import given
from hypothesis import strategies as st

from okavango.training.digests import MOST, Digests

# few first bytes, so that many fall on one slot
DIGESTS = st.binary(min_size=16, max_size=16) | st.sampled_from("abc").map(lambda c: bytes(15) + c.encode())


@given(st.lists(st.tuples(DIGESTS, st.integers(0, MOST))))
def test_it_answers_as_a_dict_does(pairs: list[tuple[bytes, int]]) -> None:
    expected: dict[bytes, int] = {}
    digests = Digests()
    for digest, number in pairs:
        assert digests.setdefault(digest, number) == expected.setdefault(digest, number)
        digests.check_integrity()
    assert len(digests) == len(expected)
    assert {digest: digests.get(digest) for digest, _ in pairs} == expected
    assert digests.get(b"?" * 16) is None


def test_it_stays_small_while_it_grows() -> None:
    digests = Digests()
    for i in range(50_000):
        digests.setdefault(hashlib.sha256(str(i).encode()).digest()[:16], i)
    digests.check_integrity()
    assert 30 <= digests.nbytes / len(digests) <= 60
    assert all(digests.get(hashlib.sha256(str(i).encode()).digest()[:16]) == i for i in range(0, 50_000, 97))
