"""Guided decoding by llguidance: a guide is compiled once, and every token narrows what may follow.

A sequence's mask for its next token is computed on threads of its own while the decoder computes that
token's logits, so that a step seldom waits for it.
"""

# Shapes: V vocabulary

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from okavango.platform.errors import InputError, OkavangoError, UnsupportedError
from okavango.serving.sampling.state import Vocabulary
from okavango.serving.types import Guide

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELD = "response_format"
# JSON may have any space between its tokens, and a small model that begins with spaces may never end them.
_SPACE = r"\n?[ ]{0,16}"
_MOST_CACHED = 64


class GuideState:
    """One answer's place in its guide.

    `accept` and `mask` are called in turn, on one thread. Between them the matcher belongs to the thread
    that computes the mask.

    Attributes:
        is_complete: whether nothing may follow.
    """

    def __init__(self, matcher: Any, size: int, pool: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._size = size
        self._pool = pool
        self.is_complete = False
        self._next: Future[Tensor] = pool.submit(self._compute)

    def mask(self) -> Tensor:
        """What to add to the logits: [V], 0 for tokens that may come next, -inf for others.

        The end of the turn may come where the answer may end.

        Raises:
            OkavangoError: the library gave up on the guide: it has grown too complex.
        """
        return self._next.result()

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        self._next.exception()  # waits: a matcher has one user at a time
        taken = self._matcher.consume_token(token)
        self.is_complete = taken and self._matcher.is_stopped()
        if not self.is_complete:
            self._next = self._pool.submit(self._compute)

    def _compute(self) -> Tensor:
        try:
            packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        except Exception as error:  # what the library raises has no class of its own
            raise _gave_up(self._matcher.get_error() or str(error)) from error
        if self._matcher.is_error():
            raise _gave_up(self._matcher.get_error())
        bits = np.unpackbits(packed, count=self._size, bitorder="little")
        return torch.from_numpy(np.where(bits, np.float32(0), np.float32(-np.inf)))


class Guides:
    """Compiles guides for one tokenizer; keeps those used last. Safe to use from several threads.

    The library is loaded with the first guide.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="okavango-guide")
        self._lock = threading.Lock()
        self._loaded: Any = None
        self._compiled: OrderedDict[Guide, Any] = OrderedDict()

    def start(self, guide: Guide) -> GuideState:
        """The guide at the beginning of an answer. Takes milliseconds, the first one most of a second.

        Raises:
            InputError: it is no guide of its kind, or uses what the library cannot do.
            UnsupportedError: the library is not installed, or cannot read the tokenizer.
        """
        with self._lock:
            matcher = self._compiled.get(guide)
            tokenizer = self._load()
        if matcher is None:
            matcher = _compile(guide, tokenizer)
        with self._lock:
            self._compiled[guide] = matcher
            self._compiled.move_to_end(guide)
            if len(self._compiled) > _MOST_CACHED:
                self._compiled.popitem(last=False)
        return GuideState(matcher.deep_copy(), self._vocabulary.size, self._pool)

    def _load(self) -> Any:
        if self._loaded is None:
            self._loaded = _read_tokenizer(self._tokenizer, self._vocabulary)
        return self._loaded


def _read_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> Any:
    try:
        import llguidance.hf
    except ImportError as error:
        raise UnsupportedError(
            "guided decoding needs a library that is not installed",
            where=FIELD,
            remedy="pip install 'okavango[guided]'",
        ) from error
    fast: Any = tokenizer  # it refuses one that is not, by a ValueError
    size = max(vocabulary.size, len(tokenizer))
    try:
        return llguidance.hf.from_tokenizer(fast, n_vocab=size, eos_token=list(vocabulary.eos))
    except Exception as error:  # a ValueError, or what its Rust part makes of a tokenizer it cannot read
        raise UnsupportedError(f"guides cannot be used with this tokenizer: {error}", where=FIELD) from error


def _compile(guide: Guide, tokenizer: Any) -> Any:
    """A matcher at its beginning."""
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, _GRAMMARS[guide.kind](guide.text), log_level=0)
    if matcher.is_error():
        raise InputError(f"not a usable {guide.kind}: {_in_short(matcher.get_error())}", where=FIELD)
    return matcher


def _json_grammar(text: str) -> str:
    from llguidance import LLMatcher

    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the schema is not JSON: {error}", where=FIELD) from error
    if not isinstance(schema, dict | bool):
        raise InputError(f"a JSON schema is an object, not {_in_short(text)}", where=FIELD)
    found: str = LLMatcher.grammar_from_json_schema(
        json.dumps(schema), defaults={"whitespace_pattern": _SPACE}
    )
    return found


def _regex_grammar(text: str) -> str:
    from llguidance import LLMatcher

    found: str = LLMatcher.grammar_from_regex(text)
    return found


def _lark_grammar(text: str) -> str:
    from llguidance import LLMatcher

    found: str = LLMatcher.grammar_from_lark(text)
    return found


_GRAMMARS: dict[str, Callable[[str], str]] = {
    "json_schema": _json_grammar,
    "regex": _regex_grammar,
    "grammar": _lark_grammar,
}


def _gave_up(reason: str) -> OkavangoError:
    return OkavangoError(f"the guide cannot be followed any further: {_in_short(reason)}", where=FIELD)


def _in_short(text: str) -> str:
    return " ".join(text.split())[:300]
