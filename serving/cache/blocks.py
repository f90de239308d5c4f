"""The pool of KV blocks: who holds which, and what is in them. Plain Python; the tensors are the runner's.

    free ──take──▶ held ──release──▶ free            its content has no key
                    │ ▲ └──release──▶ idle           it has one: whoever wants that content shares it
           publish ─┘ └────share───── idle ──take──▶ held by another, the longest idle first, its key gone

A held block may have several holders. They only read it: a block gets a key when it is full, and nothing is
written to a full block. So no holder ever needs a copy of its own.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence


class BlockPool:
    """`blocks` KV blocks of `block_size` token positions each, reference-counted."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.num_blocks = blocks
        self.block_size = block_size
        self._free = list(range(blocks - 1, -1, -1))
        self._refs: Counter[int] = Counter()
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._by_key: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return len(self._refs)

    @property
    def num_available(self) -> int:
        """Blocks that nobody holds, whether their content is known or not."""
        return len(self._free) + len(self._idle)

    def is_held(self, key: bytes) -> bool:
        """Whether somebody holds this content, so that sharing it takes no block from anyone."""
        return self._by_key.get(key) in self._refs

    def is_known(self, key: bytes) -> bool:
        return key in self._by_key

    def key_of(self, block: int) -> bytes | None:
        return self._keys.get(block)

    def take(self) -> int | None:
        """A block to write to, the longest idle content dropped for it; None if all are held."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._by_key[self._keys.pop(block)]
        else:
            return None
        self._refs[block] = 1
        return block

    def share(self, key: bytes) -> int | None:
        """The block that holds this content, with one holder more; None if there is none."""
        block = self._by_key.get(key)
        if block is not None:
            self._idle.pop(block, None)
            self._refs[block] += 1
        return block

    def publish(self, block: int, key: bytes) -> None:
        """Say what a held block now holds for good. Content that another block holds already stays there."""
        assert block in self._refs, "published by nobody"
        if key not in self._by_key and block not in self._keys:
            self._by_key[key] = block
            self._keys[block] = key

    def forget(self, block: int) -> None:
        """Let nobody new share a block's content; who shares it already goes on."""
        key = self._keys.pop(block, None)
        if key is not None:
            del self._by_key[key]
        if block in self._idle:
            del self._idle[block]
            self._free.append(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Give up a block table. Its end goes idle first: without what stands before it, it is of no use."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] > 0:
                continue
            del self._refs[block]
            if block in self._keys:
                self._idle[block] = None
            else:
                self._free.append(block)

    def check_holders(self, tables: Sequence[Sequence[int]]) -> None:
        """The pool counts exactly these tables' entries."""
        assert Counter(block for table in tables for block in table) == self._refs, (
            "block tables and pool disagree"
        )

    def check_integrity(self) -> None:
        """Every block is free, idle or held, and only one of these; keys and blocks name each other."""
        states = [*self._free, *self._idle, *self._refs]
        assert sorted(states) == list(range(self.num_blocks)), "a block is lost, or in two states"
        assert all(count > 0 for count in self._refs.values()), "a held block has no holder"
        assert {block: key for key, block in self._by_key.items()} == self._keys, "a key names another block"
        assert len(self._by_key) == len(self._keys), "two keys name one block"
        assert self._idle.keys() <= self._keys.keys(), "an idle block's content is unknown"
        assert not self._keys.keys() & set(self._free), "a free block has a key"
