"""What a request needs before it can be scheduled: its adapter on the host, its media as embeddings.

Called from several threads. Knows nothing of queues and steps: see serving/engine.py.
"""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okavango.platform.errors import UnsupportedError
from okavango.serving.adapters.loading import NO_LORA, Adapter, HostCache
from okavango.serving.media import MediaRuntime
from okavango.serving.sampling.guide import Guides
from okavango.serving.sampling.state import SamplingState, Vocabulary
from okavango.serving.sequence import Sequence
from okavango.serving.speculation import Guesses
from okavango.serving.stream import TextStream
from okavango.serving.types import AdapterRef, Request


def vocabulary_of(decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """What the decoder picks from. Answers end with the tokenizer's token, or with those that the decoder's
    generation config names."""
    config = decoder.generation_config
    named = config.eos_token_id if config is not None else None
    ids = named if isinstance(named, list) else [named]
    eos = {i for i in (*ids, tokenizer.eos_token_id) if i is not None}
    return Vocabulary(decoder.config.get_text_config().vocab_size, tuple(sorted(eos)))


class Preparation:
    """Turns requests into sequences.

    Args:
        host: gives adapters, bound; may take long.
        max_rank: adapters over it are refused.
        vocabulary: what the decoder picks tokens from.
        guesses: whether tokens may be guessed: see serving/speculation.py.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        media: MediaRuntime,
        host: HostCache,
        max_rank: int,
        vocabulary: Vocabulary,
        *,
        guesses: bool = False,
    ) -> None:
        self._guesses = guesses
        self._tokenizer = tokenizer
        self._media = media
        self._host = host
        self._max_rank = max_rank
        self._vocabulary = vocabulary
        self._guides = Guides(tokenizer, vocabulary)

    def is_instant(self, request: Request) -> bool:
        """Whether preparing the request takes no time, so that no thread is needed."""
        adapter = request.adapter
        if request.prompt.media or request.params.guide is not None:
            return False
        return adapter is None or self._host.peek(adapter.digest) is not None

    def prepare(self, request: Request, max_tokens: int) -> Sequence:
        """The request's sequence.

        Raises:
            OkavangoError: its adapter cannot be fetched or bound, a medium is not accepted, or its guide
                or logit bias is not usable.
        """
        adapter = self.adapter(request.adapter) if request.adapter else None
        embeds, hits = self._media.embed(request.prompt, adapter)
        return Sequence(
            request,
            max_tokens,
            embeds=embeds,
            weights=adapter.lora if adapter else NO_LORA,
            sampling=self._sampling(request),
            stream=TextStream(self._tokenizer, request.params.stop, request.params.min_tokens),
            features_cached=hits,
            guesses=self._guess(request),
        )

    def _guess(self, request: Request) -> Guesses | None:
        """None for guided answers, too: what a guide allows after a guess is not known before."""
        return Guesses(request.prompt.tokens) if self._guesses and request.params.guide is None else None

    def _sampling(self, request: Request) -> SamplingState:
        guide, prompt = request.params.guide, request.prompt
        media = {position for span in prompt.spans for position in range(span.start, span.end)}
        return SamplingState(
            request.params,
            self._vocabulary,
            # what stands for a medium's embeddings was not said by anybody
            [token for position, token in enumerate(prompt.tokens) if position not in media],
            self._guides.start(guide) if guide is not None else None,
        )

    def adapter(self, ref: AdapterRef) -> Adapter:
        """The adapter, bound; may take long. Raises OkavangoError where it cannot be served."""
        adapter = self._host.get(ref.digest)
        if adapter.lora.rank > self._max_rank:
            raise UnsupportedError(
                f"adapter {ref} has rank {adapter.lora.rank}, over the limit of {self._max_rank}",
                remedy=f"okavango serve --max-rank {adapter.lora.rank}",
            )
        return adapter
