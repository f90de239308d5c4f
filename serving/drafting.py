"""A draft model at work: a small decoder reads what the sequences say and proposes how they go on.

Between two steps it computes a few greedy tokens for all sequences that want some, in batches. It has blocks
of its own and no adapters, and sees no pictures: it reads a conversation without them. Whatever it proposes
is a guess like any other (serving/speculation.py): it may cost time, never change an answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Sequence_
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from okavango.modalities.base import load_tokenizer
from okavango.platform.errors import ConfigError
from okavango.serving.cache.blocks import BlockPool
from okavango.serving.cache.tables import next_key, publish, reuse
from okavango.serving.options import EngineOptions
from okavango.serving.runner import Runner
from okavango.serving.scheduler import Chunk, Step
from okavango.serving.sequence import Sequence
from okavango.serving.tracks import Track
from okavango.serving.turns import most_guesses
from okavango.serving.worth import Seen, Worth

log = logging.getLogger(__name__)

_READ_TOKENS = 256  # read between two steps, so that streams keep moving
_AT_ONCE = 16  # unread tokens that are computed with the first proposal


class Drafting:
    """Proposes tokens for an engine's sequences. Its steps run on the engine's step thread.

    Args:
        rows: what a step of the engine is filled up to with guesses.
        context: most tokens that the draft model can read.
        vocabulary: tokens that the engine's own decoder knows.
    """

    def __init__(self, runner: Runner, rows: int, context: int, vocabulary: int) -> None:
        self._runner = runner
        self._rows = rows
        self._context = context
        self._vocabulary = vocabulary
        self._readable = runner.decoder.config.get_text_config().vocab_size
        self._pool = _pool_of(runner)
        self._tracks: dict[Sequence, Track] = {}  # the one that was drafted last is the last
        self._worth = Worth()
        self._seconds = 0.0  # since the last step that was judged
        self._failed = False

    def propose(self, running: Sequence_[Sequence]) -> None:
        """Offer drafts to sequences that go on with their answers. Whatever fails only ends the drafting."""
        if self._failed:
            return
        try:
            self._forget(self._tracks.keys() - set(running))
            is_decoding = all(sequence.num_uncomputed == 1 for sequence in running)
            if is_decoding and self._worth.wants_drafts(len(running)):
                self._draft(running)
        except Exception:
            log.exception("the draft model failed; it is not used any more")
            self._failed = True
            self._tracks, self._pool = {}, _pool_of(self._runner)

    def saw(self, chunks: Sequence_[Chunk], seconds: float) -> None:
        """A step that only went on with answers took so long, apart from its drafts."""
        drafts = [chunk for chunk in chunks if chunk.draft and _is_proposed(chunk.sequence)]
        step = Seen(
            sequences=len(chunks),
            rows=sum(chunk.count for chunk in chunks),
            seconds=seconds,
            drafted=sum(len(chunk.draft) for chunk in drafts),
            accepted=sum(max(0, len(c.sequence.tokens) - c.sure_end - 1) for c in drafts),
            draft_seconds=self._seconds,
        )
        self._worth.saw(step)
        self._seconds = 0.0

    def check_integrity(self) -> None:
        """Tracks and pool agree with each other."""
        self._pool.check_integrity()
        self._pool.check_holders([track.shadow.blocks for track in self._tracks.values()])

    def _draft(self, running: Sequence_[Sequence]) -> None:
        drafts: list[tuple[Sequence, Track, int]] = []
        for sequence, count in self._shares(running):
            track = self._track(sequence, count, len(drafts))
            if track is not None:
                drafts.append((sequence, track, count))
            elif sequence.guesses is not None:
                sequence.guesses.proposals.decline(sequence.tokens)
        began = time.perf_counter()
        self._read([track for _, track, _ in drafts])
        read = time.perf_counter()
        self._worth.owe(read - began)
        ready = [(s, track, count) for s, track, count in drafts if track.num_unread <= _AT_ONCE]
        found = self._continue([(track, count) for _, track, count in ready])
        for (sequence, _, _), proposed in zip(ready, found, strict=True):
            assert sequence.guesses is not None
            sequence.guesses.proposals.put(len(sequence.tokens), proposed)
        self._seconds += time.perf_counter() - read if ready else 0.0

    def _shares(self, running: Sequence_[Sequence]) -> list[tuple[Sequence, int]]:
        """Who gets drafts of how many tokens: what look-up leaves of the step's rows, shared evenly."""
        room, wanting = self._rows - len(running), []
        for sequence in running:
            guesses = sequence.guesses
            if guesses is None:
                continue
            most = most_guesses(sequence, room, self._pool.block_size)
            known = guesses.guess(sequence.tokens, most)
            room -= len(known)
            if not known and (wanted := guesses.proposals.wanted(sequence.tokens, most)):
                wanting.append((sequence, wanted))
        shares = []
        for i, (sequence, wanted) in enumerate(wanting):
            share = min(wanted, room, max(1, room // (len(wanting) - i)))
            room -= share
            shares += [(sequence, share)] if share > 0 else []
        return shares

    def _track(self, sequence: Sequence, count: int, busy: int) -> Track | None:
        """The sequence's track, with room for so many more tokens; None where the draft model can't have it.

        `busy`: as many tracks have a part in this round; they are the last ones, and keep their blocks.
        """
        track = self._tracks.pop(sequence, None) or Track.of(sequence)
        shadow = track.shadow
        before = shadow.num_computed
        if track.follow(sequence):
            publish(shadow, before, shadow.num_computed, self._pool)
        is_new = not shadow.blocks
        if is_new:
            reuse(shadow, self._pool)
        unread, most = shadow.tokens[shadow.num_computed :], len(shadow.tokens) + count
        assert unread, "drafted twice without a token between"
        fits = most <= self._context and max(unread) < self._readable
        if not fits or (is_new and self._is_being_read(shadow)) or not self._grow(shadow, most, busy):
            self._pool.release(shadow.blocks)
            return None
        self._tracks[sequence] = track
        return track

    def _is_being_read(self, shadow: Sequence) -> bool:
        """Whether another track is about to read what comes next in this one, which can have it later."""
        key = next_key(shadow, self._pool)
        reading = [t.shadow for t in self._tracks.values() if t.num_unread > _AT_ONCE]
        return key is not None and key in (next_key(other, self._pool) for other in reading)

    def _grow(self, shadow: Sequence, tokens: int, busy: int) -> bool:
        """Take blocks for so many tokens, from the tracks that were drafted longest ago, too."""
        while len(shadow.blocks) < self._pool.blocks_for(tokens):
            block = self._pool.take()
            if block is not None:
                shadow.blocks.append(block)
            elif len(self._tracks) > busy:
                self._forget([next(iter(self._tracks))])
            else:
                return False
        return True

    def _forget(self, sequences: Iterable[Sequence]) -> None:
        """Give up tracks. What is in their full blocks stays until somebody needs the room."""
        for sequence in sequences:
            self._pool.release(self._tracks.pop(sequence).shadow.blocks)

    def _read(self, tracks: Iterable[Track]) -> None:
        """Read what is too much to be computed with a first proposal, so much of it as is due now."""
        budget, chunks = _READ_TOKENS, []
        for track in tracks:
            count = min(track.num_unread - 1, budget)
            if track.num_unread > _AT_ONCE and count:
                chunks.append(Chunk(track.shadow, track.shadow.num_computed, count))
                budget -= count
        if chunks:
            self._runner.run(Step((), tuple(chunks)), [0])
            self._confirm(chunks)

    def _continue(self, wanted: Sequence_[tuple[Track, int]]) -> list[list[int]]:
        """The greedy tokens that follow, so many for each."""
        found: list[list[int]] = [[] for _ in wanted]
        for number in range(max((count for _, count in wanted), default=0)):
            going = [i for i, (_, count) in enumerate(wanted) if number < count]
            chunks = [wanted[i][0].chunk(found[i]) for i in going]
            for i, token in zip(going, self._greedy(chunks), strict=True):
                found[i].append(token)
            if number == 0:
                self._confirm(chunks)
        for (track, _), proposed in zip(wanted, found, strict=True):
            track.fed = tuple(proposed[:-1])
        return found

    def _greedy(self, chunks: Sequence_[Chunk]) -> list[int]:
        """The likeliest token after each chunk, of those that the engine's own decoder knows."""
        rows = [end - 1 for end in accumulate(chunk.count for chunk in chunks)]
        logits = self._runner.run(Step((), tuple(chunks)), rows)
        tokens: list[int] = logits[:, : self._vocabulary].argmax(-1).tolist()
        return tokens

    def _confirm(self, chunks: Iterable[Chunk]) -> None:
        """Chunks of what was really said are computed."""
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end
            publish(chunk.sequence, chunk.start, chunk.end, self._pool)


def _pool_of(runner: Runner) -> BlockPool:
    return BlockPool(runner.num_blocks, runner.options.block_size)


def _is_proposed(sequence: Sequence) -> bool:
    return sequence.guesses is not None and sequence.guesses.source == "draft"


def make_drafting(
    options: EngineOptions, tokenizer: PreTrainedTokenizerBase, vocabulary: int, *, is_used: bool
) -> Drafting | None:
    """The draft model that the options name, loaded; None where there is none, or where it may not be used.

    Args:
        vocabulary: tokens that the engine's own decoder knows.
        is_used: whether a guess cannot change an answer here.

    Raises:
        ConfigError: it has another vocabulary, or too little memory.
        UnsupportedError: it cannot be served.
    """
    draft = options.draft
    if draft is None:
        return None
    check_vocabulary(tokenizer.get_vocab(), load_tokenizer(draft).get_vocab(), draft.name)
    if not is_used:
        log.warning("draft base %s is not used: on torch, guesses could change answers", draft.name)
        return None
    try:
        runner = Runner(draft, options.draft_runner)
    except ConfigError as error:
        raise ConfigError(
            error.message, where=f"draft base {draft.name}", remedy="give it more --draft-kv-memory"
        ) from error
    return Drafting(runner, options.draft_rows, draft.decoder.context, vocabulary)


def check_vocabulary(own: Mapping[str, int], other: Mapping[str, int], name: str) -> None:
    """Raises ConfigError where a draft base's token ids stand for something else."""
    ours, theirs = ({number: token for token, number in each.items()} for each in (own, other))
    for number in sorted(ours.keys() | theirs.keys()):
        if ours.get(number) != theirs.get(number):
            raise ConfigError(
                f"has another vocabulary: token {number} is {theirs.get(number)!r} there and "
                f"{ours.get(number)!r} in the base",
                where=f"draft base {name}",
                remedy="take a smaller decoder of the same family, with the very same tokenizer",
            )
