"""Embeddings: texts, pictures and sounds in the one space that a joint objective trained.

A text is looked up in the decoder's table, a medium goes through its encoder and head; neither needs a step
of the decoder, so answers in progress go on beside it. The same input gives the same vector, whatever it is
asked with. The space itself: modalities/embedding.py.
"""

# Shapes: B inputs, P the space's width

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from okavango.modalities.base import Base
from okavango.modalities.content import Media
from okavango.modalities.embedding import EmbeddingHead, read_embedding
from okavango.platform.errors import BusyError, InputError, NotReadyError, UnsupportedError
from okavango.serving.adapters.loading import Adapter, HostCache
from okavango.serving.desk import RETRY_AFTER_SECONDS
from okavango.serving.media import MediaRuntime
from okavango.serving.runner import Runner
from okavango.serving.types import AdapterRef

Input = Media | tuple[int, ...]
"""A medium, or a text's tokens."""

_REMEDY = "train one with joint.weight above 0: docs/training.md"


@dataclass(frozen=True)
class Embedded:
    """`vectors`: [B, P], each of length one. `tokens`: text tokens, or decoder positions, of each input.
    `features_cached`: media that no encoder had to see."""

    vectors: Tensor
    tokens: tuple[int, ...]
    features_cached: int


class Embedder:
    """Embeds inputs on threads that it is given.

    Args:
        most: calls at a time; more are refused.
    """

    def __init__(
        self,
        base: Base,
        runner: Runner,
        media: MediaRuntime,
        host: HostCache,
        threads: Executor,
        most: int,
    ) -> None:
        self._base = base
        self._runner = runner
        self._media = media
        self._host = host
        self._threads = threads
        self._most = most
        self._count = 0
        self._lock = threading.Lock()
        self._own: EmbeddingHead | None = None

    async def embed(self, inputs: Sequence[Input], adapter: AdapterRef | None) -> Embedded:
        """What Engine.embed says."""
        with self._admitted():
            loaded, name = None, str(adapter or self._base.name)
            if adapter is not None:  # others may wait for the same load: leaving must not cancel it
                loaded = await asyncio.shield(asyncio.wrap_future(self._host.load(adapter.digest)))
            try:
                work = self._threads.submit(self._embed, tuple(inputs), loaded, name)
            except RuntimeError as error:  # the threads have ended
                raise _stopping() from error
            try:
                return await asyncio.wrap_future(work)
            except asyncio.CancelledError:
                if work.cancelled() and not _is_leaving():
                    raise _stopping() from None
                raise

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        with self._lock:
            if self._count >= self._most:
                raise BusyError(
                    f"{self._count} calls for embeddings wait already", retry_after=RETRY_AFTER_SECONDS
                )
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1

    @torch.inference_mode()
    def _embed(self, inputs: tuple[Input, ...], adapter: Adapter | None, name: str) -> Embedded:
        space = self._space(adapter, name)
        for i, each in enumerate(inputs):
            if isinstance(each, Media) and each.modality not in space.spec.modalities:
                known = ", ".join(("text", *space.spec.modalities))
                raise InputError(f"{name} embeds {known}, and no {each.modality}", where=f"input[{i}]")
        vectors, tokens, cached = [], [], 0
        for each in inputs:
            if isinstance(each, Media):
                made, was_cached = self._media.vectors(each, adapter)
                vectors.append(space.media_of(each.modality, [made]))
                tokens.append(len(made))
                cached += was_cached
            else:
                vectors.append(space.texts([self._runner.look_up(each).cpu()]))
                tokens.append(len(each))
        return Embedded(torch.cat(vectors), tuple(tokens), cached)

    def _space(self, adapter: Adapter | None, name: str) -> EmbeddingHead:
        """The adapter's own, or the base's for the bare base: another's heads are not of that space."""
        space = adapter.embedding if adapter is not None else self._of_base()
        if space is None:
            raise UnsupportedError(f"{name} has no space of embeddings", where="model", remedy=_REMEDY)
        return space

    def _of_base(self) -> EmbeddingHead | None:
        with self._lock:
            if self._own is None and self._base.embedding is not None and self._base.width is not None:
                self._own = read_embedding(self._base.embedding.path.parent, self._base.width)
            return self._own


def _stopping() -> NotReadyError:
    return NotReadyError("the server is stopping")


def _is_leaving() -> bool:
    """Whether it is the caller that is cancelled, and not what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
