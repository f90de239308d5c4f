"""The engine's manners: limits, errors, aborts, encoders on demand."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import pytest
import torch

from okavango.modalities.content import Message, Text
from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tiny_bundle import picture_bytes, write_tiny_bundle
from okavango.platform.bundle import read_manifest
from okavango.platform.errors import (
    BindError,
    BusyError,
    ConfigError,
    ContextLengthError,
    NotFoundError,
    NotReadyError,
    PromptError,
    UnsupportedError,
)
from okavango.serving.engine import EngineOptions
from okavango.serving.types import AdapterRef, FinishReason, SamplingParams

LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def is_idle(harness) -> bool:
    stats = harness.engine.stats()
    return (stats.preparing, stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0, 0)


def test_text_alone_loads_no_encoder_and_a_picture_loads_it_once(harness):
    harness.tokens([harness.request("hi", adapter) for adapter in (None, "r4")])
    assert harness.engine.stats().encoders_loaded == ()
    harness.tokens([harness.request("hi", "r4", [picture_bytes(1)])])
    assert harness.engine.stats().encoders_loaded == ("image",)


def test_features_are_shared_across_adapters(harness):
    hits = []
    for adapter in (None, "r4", "r16"):
        events = harness.run([harness.request("what?", adapter, [picture_bytes(9)])])[0]
        hits.append(events[-1].features_cached)
    assert hits == [0, 1, 1]


def test_events_join_to_the_tokens_text_and_count_them(harness):
    events = harness.run([harness.request("tell me a story", "r8", [picture_bytes(2)])])[0]
    tokens = [token for event in events for token in event.tokens]
    text = "".join(event.text for event in events)
    assert text == harness.engine.tokenizer.decode(tokens, skip_special_tokens=True)
    usage = events[-1].usage
    assert usage.completion_tokens == len(tokens) == 12
    assert usage.media_tokens == 4
    assert usage.prompt_tokens > 4


def test_the_end_of_turn_token_ends_the_answer(harness):
    eos = harness.engine.tokenizer.eos_token_id
    harness.engine.core.runner.run = lambda step, rows: torch.eye(300)[[eos] * len(rows)] * 9
    events = harness.run([harness.request("hi", params=SamplingParams(max_tokens=9, temperature=0))])[0]
    assert events[-1].finish is FinishReason.STOP
    assert events[-1].text == ""
    events = harness.run([harness.request("hi", params=replace(LONG, max_tokens=3))])[0]
    assert events[-1].finish is FinishReason.LENGTH


def test_a_stop_string_ends_the_answer(harness):
    free = "".join(e.text for e in harness.run([harness.request("hi", "r4", params=LONG)])[0])
    stop = free[5:8]
    events = harness.run([harness.request("hi", "r4", params=replace(LONG, stop=(stop,)))])[0]
    assert "".join(event.text for event in events) == free[: free.index(stop)]
    assert events[-1].finish is FinishReason.STOP


@pytest.mark.parametrize(("length", "max_tokens"), [(600, None), (600, 1), (10, 600)])
def test_what_exceeds_the_context_is_refused(harness, length, max_tokens):
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    with pytest.raises(ContextLengthError, match="512"):
        harness.engine.submit(harness.request("x" * length, params=params), lambda event: None)
    assert is_idle(harness)


def test_without_max_tokens_an_answer_may_fill_the_context(harness):
    params = SamplingParams(temperature=0, ignore_eos=True)
    request = harness.request("x" * 460, params=params)
    events = harness.run([request])[0]
    assert events[-1].usage.prompt_tokens + events[-1].usage.completion_tokens == 512


def test_more_requests_than_may_wait_are_refused(make_harness):
    harness = make_harness(max_sequences=1, max_waiting=2)
    busy = [harness.request("go on", params=LONG) for _ in range(3)]
    done = threading.Semaphore(0)
    for request in busy:
        harness.engine.submit(request, lambda e: done.release() if e.finish else None)
    with pytest.raises(BusyError):
        harness.engine.submit(harness.request("one more"), lambda event: None)
    for _ in busy:
        assert done.acquire(timeout=60)
    assert len(harness.tokens([harness.request("now")])[0]) == 12


def test_an_abort_frees_everything(harness):
    events, started = [], threading.Event()

    def sink(event) -> None:
        events.append(event)
        started.set()

    request = harness.request("go on", "r8", params=LONG)
    harness.engine.submit(request, sink)
    assert started.wait(30)
    harness.engine.abort(request.id)
    wait_until(lambda: is_idle(harness))
    assert events[-1].finish is FinishReason.ABORT
    assert events[-1].usage.completion_tokens < 400


def test_closing_a_stream_aborts_its_request(harness):
    async def read_two() -> None:
        stream = harness.engine.stream(harness.request("go on", params=LONG))
        assert (await anext(stream)).finish is None
        assert (await anext(stream)).finish is None
        await stream.aclose()

    asyncio.run(read_two())
    wait_until(lambda: is_idle(harness))


def test_a_failing_step_fails_its_own_requests_only(harness, caplog):
    run = harness.engine.core.runner.run

    def fail(step, rows):
        if any(chunk.sequence.digest for chunk in step.chunks):
            raise RuntimeError("no luck")
        return run(step, rows)

    harness.engine.core.runner.run = fail
    failed = harness.run([harness.request("hi", "r4")])[0]
    assert failed[-1].finish is FinishReason.ERROR
    assert "no luck" not in str(failed[-1].error)
    assert "no luck" in caplog.text
    assert len(harness.tokens([harness.request("hi")])[0]) == 12
    harness.engine.core.runner.run = run
    # the failed load is forgotten: the adapter is copied into its slot again
    assert len(harness.tokens([harness.request("hi", "r4")])[0]) == 12


def test_an_adapter_that_cannot_be_fetched_fails_its_request(harness):
    def missing(digest):
        raise NotFoundError("no such bundle")

    harness.engine._source = type("Source", (), {"fetch": staticmethod(missing)})()
    events = harness.run([harness.request("hi", "r4"), harness.request("hi")])
    assert isinstance(events[0][-1].error, NotFoundError)
    assert events[1][-1].finish is FinishReason.LENGTH


def test_an_adapter_of_another_base_does_not_bind(harness, tmp_path):
    other = write_tiny_base(tmp_path / "other", seed=5, name="other")
    write_tiny_bundle(tmp_path / "bundle", other)
    digest = read_manifest(tmp_path / "bundle").digest
    harness.bundles.folders["other"], harness.bundles.digests["other"] = tmp_path / "bundle", digest
    try:
        events = harness.run([harness.request("hi", "other")])[0]
    finally:
        del harness.bundles.folders["other"], harness.bundles.digests["other"]
    assert isinstance(events[-1].error, BindError)
    assert "decoder" in str(events[-1].error)
    assert "'tiny'" in str(events[-1].error)


def test_a_rank_over_the_limit_names_the_option(make_harness):
    harness = make_harness(max_rank=8)
    error = harness.run([harness.request("hi", "r16")])[0][-1].error
    assert isinstance(error, UnsupportedError)
    assert "--max-rank 16" in str(error)
    assert len(harness.tokens([harness.request("hi", "r8")])[0]) == 12


def test_a_base_without_an_encoder_refuses_pictures(make_harness, tmp_path):
    harness = make_harness(base=write_tiny_base(tmp_path / "blind", image=False))
    with pytest.raises(PromptError, match="no image encoder"):
        harness.request("hi", pictures=[picture_bytes(1)])
    assert len(harness.tokens([harness.request("hi")])[0]) == 12


def test_a_stopped_engine_refuses_and_what_ran_is_aborted(make_harness):
    harness = make_harness()
    events = []
    request = harness.request("go on", params=LONG)
    harness.engine.submit(request, events.append)
    wait_until(lambda: events)
    harness.engine.stop()
    assert events[-1].finish is FinishReason.ABORT
    assert not harness.engine.is_running
    with pytest.raises(NotReadyError):
        harness.engine.submit(harness.request("hi"), events.append)


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="max_sequences"):
        EngineOptions(max_sequences=64, max_step_tokens=64)
    with pytest.raises(ConfigError, match="slots"):
        EngineOptions(slots=0)


def test_a_digest_not_a_name_decides(harness):
    """Two names of one digest share a slot; one name of two digests does not."""
    digests = harness.bundles.digests
    request = harness.request("hi", "r4")
    renamed = replace(request, id="other", adapter=AdapterRef("another", 7, digests["r4"]))
    moved = replace(request, id="moved", adapter=AdapterRef("r4", 2, digests["r8"]))
    tokens = harness.tokens([request, renamed, moved])
    assert tokens[0] == tokens[1] != tokens[2]
    assert set(harness.engine.stats().slots) == {digests["r4"], digests["r8"]}


def test_a_system_prompt_default_yields_to_the_requests_own(harness):
    renderer = harness.engine.renderer
    user = Message("user", (Text("hi"),))
    own = renderer.prompt([Message("system", (Text("be brief"),)), user], system="be verbose")
    assert "be brief" in harness.engine.tokenizer.decode(own.tokens)
    assert "be verbose" not in harness.engine.tokenizer.decode(own.tokens)
    assert "be verbose" in harness.engine.tokenizer.decode(renderer.prompt([user], "be verbose").tokens)


def test_a_reader_that_raises_ends_its_own_request_only(harness, caplog):
    def sink(event) -> None:
        raise OSError("gone")

    harness.engine.submit(harness.request("go on", params=LONG), sink)
    wait_until(lambda: is_idle(harness))
    assert len(harness.tokens([harness.request("hi")])[0]) == 12
    assert "reader failed" in caplog.text
