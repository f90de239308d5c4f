"""A draft model changes how soon tokens come, never which."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from okavango.modalities.base import Base, load_tokenizer
from okavango.modalities.prompt import Rendered
from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tiny_bundle import picture_bytes
from okavango.platform.errors import ConfigError
from okavango.serving.drafting import check_vocabulary, make_drafting
from okavango.serving.engine import EngineOptions
from okavango.serving.sequence import Sequence
from okavango.serving.speculation import Guesses
from okavango.serving.types import Request, SamplingParams

GREEDY = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=60, temperature=0.7, top_k=8, seed=5, ignore_eos=True)
TEXTS = ("What a day.", "Name a river, please!", "Why is that so?", "One more: 42.")


@pytest.fixture
def computing(kernels):
    """The backend on which guesses are made."""
    return {"kernels": kernels}


class Counting:
    """Metrics that keep what was proposed, and count steps."""

    def __init__(self) -> None:
        self.drafts: Counter[str] = Counter()
        self.phases: Counter[str] = Counter()
        self.steps = self.preempted = 0

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        if name == "okavango_draft_tokens_total" and labels["source"] == "draft":
            self.drafts[labels["result"]] += int(value)
        if name == "okavango_phase_seconds_total":
            self.phases[labels["phase"]] += value > 0
        if name == "okavango_preemptions_total":
            self.preempted += int(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.steps += name == "okavango_step_seconds"

    def gauge(self, name: str, value: float, **labels: str) -> None: ...


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A base of the same vocabulary that says other things."""
    return write_tiny_base(tmp_path_factory.mktemp("stranger") / "other", seed=9, name="other", image=False)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A base of the same vocabulary that only torch computes."""
    folder = tmp_path_factory.mktemp("gpt2") / "gpt2"
    return write_tiny_base(folder, name="gpt2", architecture="gpt2", image=False)


@pytest.fixture
def drafting(make_harness, tiny_base):
    """An engine that drafts with a given base, its own by default; checked after every step."""

    def make(draft: Base = tiny_base, **options):
        metrics = Counting()
        harness = make_harness(metrics=metrics, draft=draft, **{"draft_kv_bytes": 1 << 20, **options})
        step, core = harness.engine.core.step, harness.engine.core

        def checked_step() -> None:
            step()
            core.drafting.check_integrity()

        core.step = checked_step
        return harness, metrics

    return make


def requests(harness, adapters, params, texts=TEXTS):
    return [
        harness.request(texts[i % len(texts)], name, params=replace(params, seed=i))
        for i, name in enumerate(adapters)
    ]


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("adapters", [[None], [None, "r4", "r8", "r16", None]], ids=["base", "mixed"])
def test_answers_are_the_same(drafting, make_harness, stranger, tiny_gpt2, params, adapters):
    expected = (plain := make_harness(draft_rows=0)).tokens(requests(plain, adapters, params))
    for options in ({}, {"draft": stranger}, {"draft": tiny_gpt2}):
        harness, metrics = drafting(**options)
        assert harness.tokens(requests(harness, adapters, params)) == expected
        assert metrics.drafts.total() > 0


EOS = 257
PICKY = {
    "stops": replace(GREEDY, stop=("-", "S", ">")),
    "min_tokens and stops": replace(GREEDY, stop=("-", "S", ">"), min_tokens=23),
    "min_tokens and the end": replace(GREEDY, ignore_eos=False, min_tokens=40, logit_bias=((EOS, 8.0),)),
    "penalties": replace(DRAWN, frequency_penalty=0.4, presence_penalty=0.2, repetition_penalty=1.2),
    "logprobs": replace(DRAWN, logprobs=3),
}


@pytest.mark.parametrize("params", PICKY.values(), ids=PICKY)
def test_whatever_a_request_asks_for_is_as_without_drafts(drafting, make_harness, params):
    def answers(harness) -> list[object]:
        found = harness.run(requests(harness, [None, "r4", None], params))
        return [
            (
                "".join(event.text for event in events),
                [token for event in events for token in event.tokens],
                [chosen for event in events for chosen in event.logprobs],
                (events[-1].finish, events[-1].usage, events[-1].error),
            )
            for events in found
        ]

    harness, metrics = drafting()
    assert answers(harness) == answers(make_harness(draft_rows=0))
    assert metrics.drafts.total() > 0


def test_a_draft_that_says_the_same_saves_steps(drafting):
    harness, metrics = drafting()
    [tokens] = harness.tokens(requests(harness, [None], GREEDY))
    assert len(tokens) == 60
    assert metrics.drafts["accepted"] > 20
    assert metrics.drafts["rejected"] == 0
    assert metrics.steps < 40
    assert metrics.phases["draft"] > 0


def test_a_draft_that_says_something_else_is_asked_less_and_less(drafting, stranger):
    harness, metrics = drafting(stranger)
    params = replace(GREEDY, max_tokens=300)
    harness.tokens(requests(harness, [None], params))
    assert 0 < metrics.drafts.total() < 100


def test_also_where_memory_is_short(drafting, make_harness):
    params = replace(DRAWN, max_tokens=90)
    adapters = [None, "r4", "r8", "r16"] * 2
    expected = (plain := make_harness(draft_rows=0)).tokens(requests(plain, adapters, params))
    harness, metrics = drafting(draft_rows=32, kv_bytes=1 << 17, slots=2)
    assert harness.tokens(requests(harness, adapters, params)) == expected
    assert metrics.preempted > 0
    assert metrics.drafts.total() > 0


def test_also_where_the_draft_has_little_memory(drafting, make_harness):
    adapters = [None, "r4", "r8", "r16"] * 2
    expected = (plain := make_harness(draft_rows=0)).tokens(requests(plain, adapters, GREEDY))
    harness, metrics = drafting(draft_rows=32, draft_kv_bytes=1 << 16)
    assert harness.tokens(requests(harness, adapters, GREEDY)) == expected
    assert metrics.drafts.total() > 0


def test_pictures_are_left_out(drafting, make_harness):
    def asked(harness):
        picture = [picture_bytes(3)]
        return [harness.request("And this?", name, picture, replace(GREEDY)) for name in (None, "r8")]

    expected = (plain := make_harness(draft_rows=0)).tokens(asked(plain))
    harness, metrics = drafting()
    assert harness.tokens(asked(harness)) == expected
    assert metrics.drafts.total() > 0


def test_those_who_leave_take_their_drafts_along(drafting):
    harness, metrics = drafting()
    engine = harness.engine
    left, ended = threading.Event(), threading.Event()
    leaving, staying = requests(harness, [None, "r8"], replace(GREEDY, max_tokens=200))

    def leave(event) -> None:
        if event.finish is None and metrics.drafts.total() > 0 and not left.is_set():
            left.set()
            engine.abort(leaving.id)

    engine.submit(leaving, leave)
    engine.submit(staying, lambda event: ended.set() if event.finish is not None else None)
    assert ended.wait(60)
    assert left.is_set()
    harness.tokens(requests(harness, [None], GREEDY))
    assert len(engine.core.drafting._tracks) <= 1


def test_a_long_prompt_is_read_in_pieces(drafting, make_harness):
    """While others' streams go on."""
    texts = ("x? " * 110 + "Go on.", "y! " * 100 + "Why?", "Short.")
    expected = (plain := make_harness(draft_rows=0)).tokens(requests(plain, [None] * 3, GREEDY, texts))
    harness, metrics = drafting()
    assert harness.tokens(requests(harness, [None] * 3, GREEDY, texts)) == expected
    assert metrics.drafts["accepted"] > metrics.drafts["rejected"]


def test_a_draft_that_fails_ends_the_drafting_alone(drafting, make_harness, monkeypatch, caplog):
    expected = (plain := make_harness(draft_rows=0)).tokens(requests(plain, [None], GREEDY))
    harness, metrics = drafting()

    def fail(*_) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(harness.engine.core.drafting._runner, "run", fail)
    with caplog.at_level(logging.ERROR):
        assert harness.tokens(requests(harness, [None], GREEDY)) == expected
    assert "not used any more" in caplog.text
    assert metrics.drafts.total() == 0


def test_a_request_too_long_for_the_draft_is_not_drafted(drafting, make_harness, stranger):
    short = replace(stranger, decoder=replace(stranger.decoder, context=32))
    expected = (plain := make_harness(draft_rows=0)).tokens(requests(plain, [None], GREEDY))
    harness, metrics = drafting(short)
    assert harness.tokens(requests(harness, [None], GREEDY)) == expected
    assert metrics.drafts.total() == 0


def test_none_is_loaded_where_guesses_could_change_an_answer(make_harness, stranger, caplog):
    harness = make_harness(kernels=None, draft=stranger)
    assert harness.engine.core.drafting is None
    assert "draft base other is not used" in caplog.text


def test_a_base_of_another_vocabulary_is_refused(make_harness, stranger, tmp_path):
    folder = tmp_path / "swapped"
    shutil.copytree(stranger.decoder.path, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    swapped = replace(stranger, decoder=replace(stranger.decoder, path=folder))
    with pytest.raises(ConfigError, match="another vocabulary: token 64 is 'b' there and 'a' in the base"):
        make_harness(draft=swapped)


def test_options_that_contradict_each_other_are_refused(make_harness, stranger):
    with pytest.raises(ConfigError, match="no step has room for what the draft base other guesses"):
        make_harness(draft=stranger, draft_rows=0)
    with pytest.raises(ConfigError) as raised:
        make_harness(draft=stranger, draft_kv_bytes=1)
    assert "--draft-kv-memory" in (raised.value.remedy or "")


def test_what_differs_between_vocabularies_is_named():
    check_vocabulary({"a": 0, "b": 1}, {"b": 1, "a": 0}, "small")
    with pytest.raises(ConfigError, match="token 1 is 'c' there and 'b' in the base") as raised:
        check_vocabulary({"a": 0, "b": 1}, {"a": 0, "c": 1}, "small")
    assert raised.value.where == "draft base small"
    with pytest.raises(ConfigError, match="token 2 is 'c' there and None in the base"):
        check_vocabulary({"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2}, "small")


def test_proposals_depend_on_nothing_but_what_was_said(tiny_base, kernels):
    """Not on what was proposed and rejected, evicted, or read for others: as of one who reads it anew."""
    options = EngineOptions(dtype="float32", draft=tiny_base, draft_kv_bytes=1 << 18, kernels=kernels)
    lived, anew = (make_drafting(options, load_tokenizer(tiny_base), 259, is_used=True) for _ in range(2))
    generator, sequences, checked = Random(3), [], 0
    for number in range(120):
        if number % 10 == 0:
            sequences = [*sequences[-5:], new_sequence(generator, number)]
        lived._draft(sequences)
        for sequence in sequences:
            proposed = sequence.guesses.proposals.rest(sequence.tokens, 9)
            if proposed:
                copy = Sequence(Request("copy", Rendered(tuple(sequence.tokens))), 1000, guesses=Guesses([]))
                while not (expected := copy.guesses.proposals.rest(copy.tokens, 9)):
                    anew._draft([copy])
                assert proposed == expected[: len(proposed)]
                checked += 1
                anew._forget([copy])
            right = proposed[: generator.randint(0, len(proposed))]
            more = [generator.randrange(256) for _ in range(generator.randint(1, 5))]
            sequence.tokens += [*right, *more]
        lived.check_integrity()
    assert checked > 200


def test_what_begins_alike_is_read_once(tiny_base, kernels, monkeypatch):
    options = EngineOptions(dtype="float32", draft=tiny_base, draft_kv_bytes=1 << 20, kernels=kernels)
    drafting = make_drafting(options, load_tokenizer(tiny_base), 259, is_used=True)
    prompt = tuple(Random(1).randrange(256) for _ in range(200))
    sequences = [Sequence(Request(f"{i}", Rendered(prompt)), 100, guesses=Guesses(prompt)) for i in range(4)]
    rows, run = [], drafting._runner.run

    def counted(step, wanted):
        rows.append(step.num_tokens)
        return run(step, wanted)

    monkeypatch.setattr(drafting._runner, "run", counted)
    for number in range(8):
        drafting._draft(sequences)
        drafting.check_integrity()
        for i, sequence in enumerate(sequences):
            sequence.tokens.append((7 * number + 31 * i) % 256)
    assert len(drafting._tracks) == 4
    assert sum(rows) < 2 * len(prompt)


def new_sequence(generator: Random, number: int) -> Sequence:
    """A prompt that begins like every other one."""
    own = [generator.randrange(256) for _ in range(generator.randint(5, 100))]
    tokens = (*range(40), *own)
    return Sequence(Request(f"request-{number}", Rendered(tokens)), 1000, guesses=Guesses(tokens))
