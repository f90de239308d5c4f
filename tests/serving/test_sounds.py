"""Sounds, pictures and text on several adapters in one batch, each as it would be answered alone."""

from __future__ import annotations

import pytest

from okavango.modalities.content import Media, Message, Text
from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tiny_bundle import picture_bytes, sound_bytes, write_tiny_bundle
from okavango.platform.errors import MediaError, PromptError, UnsupportedError
from okavango.platform.telemetry import PrometheusMetrics
from okavango.serving.types import FinishReason, Request

PICTURE = Media("image", picture_bytes(1))
SHORT, LONG = Media("audio", sound_bytes(1, 0.5)), Media("audio", sound_bytes(2, 3.3))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base that sees and hears."""
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "both", audio=True, name="both")


@pytest.fixture(scope="module")
def bundles(base, tiny_bundles, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    write_tiny_bundle(folder / "r4", base, seed=4, rank=4)
    write_tiny_bundle(folder / "sees", base, seed=5, rank=8, encoder=True)
    return type(tiny_bundles)({name: folder / name for name in ("r4", "sees")})


@pytest.fixture
def hearing(make_harness, base, bundles):
    return make_harness(base, bundles)


def ask(harness, adapter, *parts) -> Request:
    request = harness.request("", adapter)
    said = tuple(Text(part) if isinstance(part, str) else part for part in parts)
    prompt = harness.engine.renderer.prompt([Message("user", said)])
    return Request(request.id, prompt, request.adapter, request.params)


def test_mixed_with_pictures_and_text_each_equals_the_reference(hearing, make_reference, base, bundles):
    reference = make_reference(base, bundles)
    requests = [
        ask(hearing, None, SHORT, "What is said?"),
        ask(hearing, "r4", LONG, "What is said?"),
        ask(hearing, "sees", "Between ", PICTURE, " and ", SHORT, " and ", LONG, "?"),
        ask(hearing, "r4", PICTURE, "What is this?"),
        ask(hearing, None, "Only text, and more of it than the others have."),
        ask(hearing, "sees", PICTURE, PICTURE, "Twice?"),
    ]
    expected = [reference.tokens(request) for request in requests]
    assert hearing.tokens(requests) == expected
    assert [hearing.tokens([request])[0] for request in requests] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(expected)


def test_a_sound_costs_the_decoder_its_own_length(hearing):
    lengths = [ask(hearing, None, sound, "?").prompt.spans[0].length for sound in (SHORT, LONG)]
    assert lengths == [3, 17]  # strides of ten positions of 20 ms


def test_one_sound_under_two_adapters_is_heard_once(make_harness, base, bundles):
    metrics = PrometheusMetrics()
    harness = make_harness(base, bundles, metrics=metrics)
    assert harness.engine.stats().encoders_loaded == ()
    events = harness.run([ask(harness, adapter, LONG, "?") for adapter in (None, "r4", "sees")])
    assert sorted(answer[-1].features_cached for answer in events) == [0, 1, 1]
    assert 'okavango_encoder_runs_total{modality="audio"} 1.0' in metrics.render().decode()
    assert harness.engine.stats().encoders_loaded == ("audio",)


def test_a_damaged_sound_fails_its_own_request_alone(hearing):
    broken = Media("audio", LONG.data[:5000])
    with pytest.raises(MediaError):
        ask(hearing, None, broken, "?")
    answered = hearing.run([ask(hearing, None, SHORT, "?")])
    assert answered[0][-1].finish is FinishReason.LENGTH


def test_a_base_that_does_not_hear_refuses_sounds(make_harness, tiny_base, tiny_bundles):
    harness = make_harness(tiny_base, tiny_bundles)
    with pytest.raises(PromptError, match="no audio encoder"):
        ask(harness, None, SHORT, "?")


def test_what_is_switched_off_is_refused_and_the_rest_goes_on(make_harness, base, bundles):
    harness = make_harness(base, bundles, disabled=("audio",))
    heard, seen = harness.run([ask(harness, None, SHORT, "?"), ask(harness, None, PICTURE, "?")])
    assert isinstance(heard[-1].error, UnsupportedError)
    assert "audio is switched off" in str(heard[-1].error)
    assert seen[-1].finish is FinishReason.LENGTH
