"""The pool of KV blocks: who holds which. Plain Python; the tensors are the runner's.

    free ──reserve──▶ reserved by a sequence ──take──▶ in its block table ──release──▶ free

A sequence reserves all that it may need when it is admitted, and takes blocks as it grows: what is reserved
but not taken belongs to nobody else, so a running sequence never waits for memory.
"""

from __future__ import annotations

from collections import Counter


class BlockPool:
    """`blocks` KV blocks of `block_size` token positions each, reference-counted.

    A block has one holder now; counts above one are for prompts that share a prefix.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.num_blocks = blocks
        self.block_size = block_size
        self._free = list(range(blocks - 1, -1, -1))
        self._refs: Counter[int] = Counter()
        self._reserved = 0

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_available(self) -> int:
        """Blocks that are neither held nor promised."""
        return len(self._free) - self._reserved

    def reserve(self, blocks: int) -> bool:
        """Promise blocks to a sequence; False if there are not enough."""
        if blocks > self.num_available:
            return False
        self._reserved += blocks
        return True

    def take(self) -> int:
        """One block out of the caller's reservation."""
        assert self._reserved > 0, "taken without a reservation"
        self._reserved -= 1
        block = self._free.pop()
        self._refs[block] = 1
        return block

    def release(self, blocks: list[int], *, unused: int) -> None:
        """Give back held blocks and `unused` blocks that were reserved and never taken."""
        self._reserved -= unused
        for block in blocks:
            self._refs[block] -= 1
            if self._refs[block] == 0:
                del self._refs[block]
                self._free.append(block)

    def check_integrity(self) -> None:
        """Every block is free or held, never both; no promise exceeds what is free."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & self._refs.keys(), "a block is free and held"
        assert len(free) + len(self._refs) == self.num_blocks, "a block is lost"
        assert all(count > 0 for count in self._refs.values()), "a held block has no holder"
        assert 0 <= self._reserved <= len(self._free), "more is promised than is free"
