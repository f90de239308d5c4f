"""What identifies a block's content: everything that its keys and values were computed from.

A block's key is a hash over the key before it, so over all that stands before it too (Merkle 1979, as a
chain). The first one is over the adapter's digest and, unless prefixes are shared by all, the principal: who
can see what was reused could else find out, sixteen tokens at a time, what others have asked. Names and
requests are no part of it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING

from okavango.modalities.prompt import Rendered

if TYPE_CHECKING:
    from okavango.serving.sequence import Sequence


def keys_of(sequence: Sequence, blocks: int, block_size: int) -> list[bytes]:
    """Keys of the sequence's first full blocks, so many; each is computed once and kept with it."""
    keys = sequence.keys
    while len(keys) < blocks:
        start = len(keys) * block_size
        tokens = sequence.tokens[start : start + block_size]
        assert len(tokens) == block_size, "a block that is not full has no key"
        parent = keys[-1] if keys else root_key(sequence.digest, sequence.salt)
        keys.append(block_key(parent, tokens, media_in(sequence.request.prompt, start, start + block_size)))
    return keys[:blocks]


def root_key(adapter_digest: str | None, salt: str) -> bytes:
    """Where a chain begins. The base is the engine's own, and one engine has one precision."""
    return hashlib.sha256(f"{adapter_digest or ''}\n{salt}".encode()).digest()


def block_key(parent: bytes, tokens: Tokens[int], media: Tokens[str]) -> bytes:
    """Tokens are of fixed length in a pool, so what follows them cannot pass for them."""
    content = struct.pack(f"<{len(tokens)}q", *tokens) + "\n".join(media).encode()
    return hashlib.sha256(parent + content).digest()


def media_in(prompt: Rendered, start: int, end: int) -> list[str]:
    """What fills positions [start, end) instead of placeholders: modality, content, from which of its
    embeddings on, from where to where.

    Placeholders of all media are the same token, so the tokens alone would take two pictures for one.
    """
    return [
        f"{medium.modality}:{medium.digest}:{span.offset}:{span.start - start}:{span.end - start}"
        for span, medium in zip(prompt.spans, prompt.media, strict=True)
        if span.start < end and span.end > start
    ]
