"""What a request needs before it can be scheduled: its adapter on the host, its media as embeddings.

Called from several threads. Knows nothing of queues and steps: see serving/engine.py.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from okavango.platform.errors import UnsupportedError
from okavango.serving.adapters.loading import NO_LORA, Adapter, HostCache
from okavango.serving.media import MediaRuntime
from okavango.serving.sampler import make_rng
from okavango.serving.sequence import Sequence
from okavango.serving.stream import TextStream
from okavango.serving.types import AdapterRef, Request


class Preparation:
    """Turns requests into sequences.

    Args:
        host: gives adapters, bound; may take long.
        max_rank: adapters over it are refused.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        media: MediaRuntime,
        host: HostCache,
        max_rank: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._media = media
        self._host = host
        self._max_rank = max_rank

    def is_instant(self, request: Request) -> bool:
        """Whether preparing the request takes no time, so that no thread is needed."""
        adapter = request.adapter
        return not request.prompt.media and (adapter is None or self._host.peek(adapter.digest) is not None)

    def prepare(self, request: Request, max_tokens: int) -> Sequence:
        """The request's sequence.

        Raises:
            OkavangoError: its adapter cannot be fetched or bound, or a medium is not accepted.
        """
        adapter = self._adapter(request.adapter) if request.adapter else None
        embeds, hits = self._media.embed(request.prompt.media, adapter)
        return Sequence(
            request,
            max_tokens,
            embeds=embeds,
            weights=adapter.lora if adapter else NO_LORA,
            rng=make_rng(request.params),
            stream=TextStream(self._tokenizer, request.params.stop),
            features_cached=hits,
        )

    def _adapter(self, ref: AdapterRef) -> Adapter:
        adapter = self._host.get(ref.digest)
        if adapter.lora.rank > self._max_rank:
            raise UnsupportedError(
                f"adapter {ref} has rank {adapter.lora.rank}, over the limit of {self._max_rank}",
                remedy=f"okavango serve --max-rank {adapter.lora.rank}",
            )
        return adapter
