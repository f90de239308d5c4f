"""A sequence's block table: what it wants of the pool, what it can take over instead of computing, and what
it needs no longer.

Where every layer has a sliding window, blocks before the widest are given up as the sequence goes on. Their
places in the table stay, so that a position's block is found as ever. Whoever begins alike still finds what
is in them, for as long as nobody needs the room.
"""

from __future__ import annotations

from okavango.serving.cache.blocks import BlockPool
from okavango.serving.cache.prefix import keys_of
from okavango.serving.sequence import Sequence

NO_BLOCK = -1
GROUP = 128
"""Positions that native/attention.h reads together, from a multiple of it on, so the first may be unseen."""


def shareable(sequence: Sequence, pool: BlockPool) -> int:
    """Blocks that may come from elsewhere; the last token's logits are needed, so it is computed."""
    return (len(sequence.tokens) - 1) // pool.block_size


def next_key(sequence: Sequence, pool: BlockPool) -> bytes | None:
    """What the block of its next token will hold, where that may come from elsewhere."""
    index = sequence.num_computed // pool.block_size
    if index >= shareable(sequence, pool):
        return None
    return keys_of(sequence, index + 1, pool.block_size)[index]


def missing(sequence: Sequence, pool: BlockPool) -> tuple[set[bytes], int]:
    """What its tokens still want: contents that nobody holds, and so many blocks that only it can fill."""
    have, shared = len(sequence.blocks), shareable(sequence, pool)
    keys = keys_of(sequence, shared, pool.block_size)[have:] if have < shared else []
    own = pool.blocks_for(len(sequence.tokens)) - max(have, shared)
    return {key for key in keys if not pool.is_held(key)}, own


def growth(sequence: Sequence, pool: BlockPool) -> int:
    """Blocks that it may want beyond its present tokens, if it generates all that it may."""
    most = sequence.num_prompt + sequence.max_tokens
    return pool.blocks_for(most) - pool.blocks_for(len(sequence.tokens))


def reuse(sequence: Sequence, pool: BlockPool) -> int:
    """Take over blocks whose content is there, while none of its own is begun; the number of tokens."""
    before = sequence.num_computed
    while sequence.num_computed % pool.block_size == 0:
        key = next_key(sequence, pool)
        block = pool.share(key) if key is not None else None
        if block is None:
            break
        sequence.blocks.append(block)
        sequence.num_computed += pool.block_size
    return sequence.num_computed - before


def publish(sequence: Sequence, start: int, end: int, pool: BlockPool) -> None:
    """Positions [start, end) are computed: the blocks that this filled may be shared."""
    size = pool.block_size
    keys = keys_of(sequence, end // size, size)
    for i in range(max(start // size, sequence.num_dropped), end // size):
        pool.publish(sequence.blocks[i], keys[i])


def span(window: int, tokens: int, pool: BlockPool) -> int:
    """Most blocks that a sequence holds at a time which computes so many tokens a step, under a window."""
    return pool.blocks_for(window + GROUP + tokens) + 1


def drop_unseen(sequence: Sequence, window: int, pool: BlockPool) -> None:
    """Give up the blocks that no token to come can see, `window` being the widest of all layers."""
    first = max(0, sequence.num_computed - window + 1) // GROUP * GROUP
    drop(sequence, first // pool.block_size, pool)


def drop(sequence: Sequence, count: int, pool: BlockPool) -> None:
    """Give up the first `count` blocks, or never take them where the table is shorter."""
    if count > sequence.num_dropped:
        pool.release(sequence.blocks[sequence.num_dropped : count])
        sequence.blocks[:count] = [NO_BLOCK] * count
        sequence.num_dropped = count


def check_table(sequence: Sequence, pool: BlockPool) -> None:
    """What is computed has a block, and what the pool knows of a block is what the sequence has in it."""
    size = pool.block_size
    assert sequence.num_computed <= len(sequence.blocks) * size, "computed tokens lie nowhere"
    full, dropped = sequence.num_computed // size, sequence.num_dropped
    assert sequence.blocks[:dropped] == [NO_BLOCK] * dropped, "a block is dropped and held"
    assert dropped <= full, "a block is dropped before it was filled"
    for block, key in zip(sequence.held, keys_of(sequence, full, size)[dropped:], strict=False):
        assert pool.key_of(block) in (key, None), "a block holds something else"
