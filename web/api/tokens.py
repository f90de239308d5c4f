"""Texts and token ids that callers send as they are, without a chat template."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from okavango.platform.errors import InputError


def tokens_of(
    prompt: str | Sequence[int], tokenizer: PreTrainedTokenizerBase, where: str, *, special: bool
) -> tuple[int, ...]:
    """A text's tokens, or the ids as they were sent.

    Args:
        special: whether a text gets what the tokenizer puts before it.

    Raises:
        InputError: there are none, or no token has such an id.
    """
    if isinstance(prompt, str):
        tokens = tuple(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    else:
        tokens = tuple(prompt)
        for at, token in enumerate(tokens):
            if not 0 <= token < len(tokenizer):
                raise InputError(
                    f"there is no token {token}; they go from 0 to {len(tokenizer) - 1}",
                    where=f"{where}[{at}]",
                )
    if not tokens:
        raise InputError("is empty", where=where)
    return tokens
