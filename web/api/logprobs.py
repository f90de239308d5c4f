"""Tokens and their log probabilities, in the shapes of OpenAI's chat and completions."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from okavango.serving.types import Chosen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACE = "\u2581"  # SentencePiece's


class TokenText:
    """Single tokens as bytes, which need not be whole characters, and as text for people."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = "ByteLevel" in _decoder_of(tokenizer)
        self._added = {token: str(text) for token, text in tokenizer.added_tokens_decoder.items()}

    def raw(self, token: int) -> bytes:
        """What the token adds to a text, special tokens by their names."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):  # a row of the decoder's that the tokenizer has no token for
            return b""
        if self._is_byte_level:
            return bytes(_byte_of()[char] for char in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()

    def text(self, token: int) -> str:
        """As OpenAI shows it: text, or bytes:\\xf0\\x9f where it is no whole characters."""
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(chosen: Iterable[Chosen], tokens: TokenText) -> dict[str, Any]:
    """A chat choice's `logprobs`."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": tokens.text(token), "logprob": logprob, "bytes": list(tokens.raw(token))}

    content = [
        {**entry(each.token, each.logprob), "top_logprobs": [entry(*other) for other in each.top]}
        for each in chosen
    ]
    return {"content": content, "refusal": None}


class LegacyLogprobs:
    """A completion choice's `logprobs`, piece by piece: each token's offset counts from the text's start.

    Args:
        offset: characters before the first token: the prompt's, where it is repeated.
    """

    def __init__(self, tokens: TokenText, offset: int = 0) -> None:
        self._tokens = tokens
        self._offset = offset
        # Characters count once they are whole.
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")

    def shape(self, chosen: Iterable[Chosen]) -> dict[str, Any]:
        chosen = tuple(chosen)
        text = self._tokens.text
        return {
            "tokens": [text(each.token) for each in chosen],
            "token_logprobs": [each.logprob for each in chosen],
            "top_logprobs": [{text(token): logprob for token, logprob in _with_own(each)} for each in chosen],
            "text_offset": [self._step(each.token) for each in chosen],
        }

    def _step(self, token: int) -> int:
        offset = self._offset
        self._offset += len(self._decoder.decode(self._tokens.raw(token)))
        return offset


def _with_own(chosen: Chosen) -> list[tuple[int, float]]:
    """The alternatives and the token itself, as OpenAI's older API reports them: one more than was asked for
    where it is none of the likeliest."""
    if any(token == chosen.token for token, _ in chosen.top):
        return list(chosen.top)
    return [*chosen.top, (chosen.token, chosen.logprob)]


def _decoder_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The fast tokenizer's decoder as JSON; "" for one that has none."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return "" if decoder is None else json.dumps(json.loads(decoder.__getstate__()))


@lru_cache(1)
def _byte_of() -> dict[str, int]:
    """Characters that byte-level tokenizers (Radford et al. 2019) write for bytes: printable ones stand for
    themselves, the others for the code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
