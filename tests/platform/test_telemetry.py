from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from okavango.platform.errors import ConfigError
from okavango.platform.telemetry import METRICS, Metrics, NullMetrics, PrometheusMetrics, setup_logging

DECLARED = {
    "okavango_requests_total": ("model", "status"),
    "okavango_tokens_total": ("kind", "adapter"),
    "okavango_step_seconds": (),
    "okavango_batch_sequences": (),
    "okavango_batch_tokens": (),
    "okavango_waiting_requests": (),
    "okavango_running_requests": (),
    "okavango_kv_blocks_used": (),
    "okavango_kv_blocks_total": (),
    "okavango_slots_used": (),
    "okavango_slot_loads_total": (),
    "okavango_encoder_loaded": ("modality",),
    "okavango_encoder_runs_total": ("modality",),
    "okavango_feature_cache_hits_total": ("modality",),
    "okavango_feature_cache_misses_total": ("modality",),
    "okavango_adapters": ("state",),
    "okavango_time_to_first_token_seconds": (),
    "okavango_request_seconds": (),
}


def samples(metrics: PrometheusMetrics) -> dict[str, float]:
    """{name{label=value}: value}, as a scraper reads it."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_the_published_names_are_kept() -> None:
    """Dashboards and alerts rely on these."""
    for name, labels in DECLARED.items():
        assert METRICS[name].labels == labels, name


def test_names_follow_prometheus_conventions() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"okavango_[a-z_]+", name)
        assert name.endswith("_total") == (metric.kind == "counter") or name == "okavango_kv_blocks_total"
        assert bool(metric.buckets) == (metric.kind == "histogram"), name
        assert metric.help.endswith("."), name


def test_what_is_measured_is_what_is_scraped() -> None:
    metrics = PrometheusMetrics()
    metrics.count("okavango_tokens_total", 5, kind="prompt", adapter="emoji@1")
    metrics.count("okavango_tokens_total", kind="prompt", adapter="emoji@1")
    metrics.gauge("okavango_encoder_loaded", 1, modality="image")
    metrics.observe("okavango_step_seconds", 0.02)
    metrics.observe("okavango_step_seconds", 9.0)
    found = samples(metrics)
    assert found["okavango_tokens_total{adapter=emoji@1,kind=prompt}"] == 6
    assert found["okavango_encoder_loaded{modality=image}"] == 1
    assert found["okavango_step_seconds_bucket{le=0.025}"] == 1
    assert found["okavango_step_seconds_bucket{le=+Inf}"] == 2
    assert found["okavango_step_seconds_sum{}"] == pytest.approx(9.02)
    assert found["okavango_waiting_requests{}"] == 0
    assert metrics.content_type.startswith("text/plain")


def test_two_of_them_do_not_mix() -> None:
    first, second = PrometheusMetrics(), PrometheusMetrics()
    first.gauge("okavango_slots_used", 3)
    assert samples(second)["okavango_slots_used{}"] == 0


@pytest.mark.parametrize("metrics", [NullMetrics(), PrometheusMetrics()])
def test_undeclared_measurements_are_our_fault(metrics: Metrics) -> None:
    with pytest.raises(AssertionError, match="okavango_nothing"):
        metrics.count("okavango_nothing")
    with pytest.raises(AssertionError, match="is a gauge, not a counter"):
        metrics.count("okavango_slots_used")
    with pytest.raises(AssertionError, match="labels"):
        metrics.gauge("okavango_encoder_loaded", 1)
    with pytest.raises(AssertionError, match="labels"):
        metrics.observe("okavango_step_seconds", 1, adapter="emoji")


def test_every_metric_takes_its_kind() -> None:
    for metrics in (NullMetrics(), PrometheusMetrics()):
        verbs = {
            "counter": lambda name, labels, to=metrics: to.count(name, 1, **labels),
            "gauge": lambda name, labels, to=metrics: to.gauge(name, 1, **labels),
            "histogram": lambda name, labels, to=metrics: to.observe(name, 1, **labels),
        }
        for name, metric in METRICS.items():
            verbs[metric.kind](name, dict.fromkeys(metric.labels, "x"))


def test_it_imports_where_nothing_is_installed() -> None:
    names = (
        "import sys; before = set(sys.modules); import okavango.platform.telemetry;"
        "ours = {n.split('.')[0] for n in set(sys.modules) - before};"
        "print(*sorted(ours - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", names], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["okavango"]


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    root.handlers = []
    yield
    root.handlers = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("restored_logging")
def test_a_record_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info")
    log = logging.getLogger("okavango.test")
    log.info("model %s is unknown", "x\n2026-01-01T00:00:00.000Z ERROR root forged\r")
    try:
        raise ValueError("boom")
    except ValueError:
        log.exception("failed")
    log.debug("not shown")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(rf"{time} INFO okavango\.test model x\\n2026.*forged\\r is unknown", lines[0])
    assert re.fullmatch(rf"{time} ERROR okavango\.test failed\\nTraceback .*ValueError: boom", lines[1])


@pytest.mark.usefixtures("restored_logging")
def test_setting_up_twice_logs_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("INFO")
    setup_logging("WARNING")
    logging.getLogger("okavango").warning("once")
    logging.getLogger("okavango").info("never")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_unknown_level_names_the_known() -> None:
    with pytest.raises(ConfigError, match=r"loud: no such log level .*WARNING"):
        setup_logging("loud")
