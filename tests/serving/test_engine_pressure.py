"""The engine with too little memory for its requests, and with prompts that begin alike: same answers."""

from __future__ import annotations

from itertools import count

from okavango.modalities.tiny_bundle import picture_bytes
from okavango.serving.types import FinishReason, SamplingParams

ADAPTERS = [None, "r4", "r8", "r16"]


def squeeze(harness, blocks: int) -> None:
    """Leave the pool so many blocks, as less --kv-memory would."""
    pool = harness.engine.core.scheduler.pool
    pool._free = pool._free[-blocks:]
    pool.num_blocks = blocks
    assert sorted(pool._free) == list(range(blocks))


def mix(harness, params: SamplingParams | None = None) -> list:
    return [
        harness.request("tell me more about it"[: 5 + 2 * (i % 8)] + str(i), ADAPTERS[i % 4], params=params)
        for i in range(12)
    ]


def preempt_everybody(harness) -> list:
    """Beside those who must go for want of blocks, in every third step somebody who never went; who came."""
    scheduler, sequences, steps = harness.engine.core.scheduler, [], count()
    add, schedule = scheduler.add, scheduler.schedule

    def remember(sequence) -> None:
        sequences.append(sequence)
        add(sequence)

    def force():
        for sequence in [s for s in scheduler.running if not s.num_preempted and next(steps) % 3 == 0][:1]:
            scheduler._preempt(sequence)
        return schedule()

    scheduler.add, scheduler.schedule = remember, force
    return sequences


def test_with_everybody_preempted_the_answers_are_the_same(make_harness, reference):
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    harness = make_harness(slots=3)
    squeeze(harness, 14)  # each request grows to six or seven
    sequences = preempt_everybody(harness)
    requests = mix(harness, params)
    assert harness.tokens(requests) == [reference.tokens(request) for request in requests]
    assert all(sequence.num_preempted for sequence in sequences)
    assert len(sequences) == len(requests)


def test_sampled_answers_survive_preemption(make_harness):
    params = SamplingParams(max_tokens=50, temperature=0.9, top_p=0.95, seed=11, ignore_eos=True)
    roomy, tight = make_harness(), make_harness()
    squeeze(tight, 12)
    preempt_everybody(tight)
    events = [harness.run(mix(harness, params)) for harness in (roomy, tight)]
    texts, tokens = (
        [
            [(each.text if what == "text" else each.tokens) for each in answer]
            for answers in events
            for answer in answers
        ]
        for what in ("text", "tokens")
    )
    half = len(texts) // 2
    assert (texts[:half], tokens[:half]) == (texts[half:], tokens[half:])


def test_what_is_parked_on_the_host_comes_back_the_same(make_harness, reference):
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    harness = make_harness(slots=3, parking_bytes=1 << 24)
    squeeze(harness, 14)
    preempt_everybody(harness)
    harness.engine.core.scheduler.parking.pays = lambda tokens, blocks: True
    restore, restored = harness.engine.core.runner.restore, []

    def counted(parked, first, blocks) -> None:
        restored.append(len(blocks))
        restore(parked, first, blocks)

    harness.engine.core.runner.restore = counted
    requests = mix(harness, params)
    assert harness.tokens(requests) == [reference.tokens(request) for request in requests]
    assert restored  # how many depends on what the prefix cache still had


def test_samples_of_one_prompt_share_its_blocks_and_differ(harness, reference):
    text = "a prompt that is long enough to fill a few blocks of sixteen tokens each"
    [alone] = harness.tokens([harness.request(text, "r8")])
    many = [harness.request(text, "r8") for _ in range(6)]
    assert harness.tokens(many) == [alone] * 6
    assert alone == reference.tokens(many[0])
    sampled = [
        harness.request(text, "r8", params=SamplingParams(max_tokens=12, seed=i, ignore_eos=True))
        for i in range(4)
    ]
    assert len({tuple(tokens) for tokens in harness.tokens(sampled)}) == 4


def test_equal_tokens_with_another_adapter_or_picture_share_nothing(harness, reference):
    text = "what do you see in the picture? say it in as many words as you like, please"
    requests = [
        harness.request(text, adapter, [picture_bytes(seed)])
        for adapter in (None, "r4")
        for seed in (1, 2, 1)
    ]
    expected = [reference.tokens(request) for request in requests]
    # one by one: every later request could take over blocks of those before it
    assert [harness.tokens([request])[0] for request in requests] == expected
    assert len({tuple(tokens) for tokens in expected}) == 4


def test_usage_says_what_of_the_prompt_was_there_already(harness):
    text = "the same words again and again, long enough to fill some blocks"
    usages = [harness.run([harness.request(text)])[0][-1].usage for _ in range(2)]
    assert usages[0].cached_tokens == 0
    assert usages[1].cached_tokens == (usages[1].prompt_tokens - 1) // 16 * 16 > 0


def test_a_step_that_raises_leaves_nothing_to_share(harness, reference):
    run = harness.engine.core.runner.run
    text = "these words are computed wrongly once, and must not be remembered so"

    def fail(step, rows):
        run(step, rows)
        raise RuntimeError("after the cache was written")

    harness.engine.core.runner.run = fail
    assert harness.run([harness.request(text, "r4")])[0][-1].finish is FinishReason.ERROR
    harness.engine.core.runner.run = run
    request = harness.request(text, "r4")
    [events] = harness.run([request])
    assert events[-1].usage.cached_tokens == 0
    assert [token for event in events for token in event.tokens] == reference.tokens(request)
