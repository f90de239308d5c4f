"""Metrics and logs. Importing this needs the standard library only, for the engine runs where little is
installed.

METRICS is the one list of what Okavango measures. A name or label that is not in it is a fault of ours, found
by the first test that meets it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from okavango.platform.errors import ConfigError

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """`buckets`: a histogram's upper bounds, in the metric's unit."""

    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_POWERS = tuple(float(2**power) for power in range(14))

METRICS: dict[str, Metric] = {
    "okavango_requests_total": Metric("counter", "Requests that ended.", ("model", "status")),
    "okavango_tokens_total": Metric(
        "counter", "Tokens by kind (prompt, generated) and adapter.", ("kind", "adapter")
    ),
    "okavango_step_seconds": Metric("histogram", "Time of an engine step.", buckets=_STEP_SECONDS),
    "okavango_batch_sequences": Metric("histogram", "Sequences in a step.", buckets=_POWERS[:10]),
    "okavango_batch_tokens": Metric("histogram", "Tokens in a step.", buckets=_POWERS),
    "okavango_batch_adapters": Metric("histogram", "Adapters in a step.", buckets=(0.0, *_POWERS[:8])),
    "okavango_step_tokens_total": Metric(
        "counter", "Tokens computed, by phase: prefill (prompts) and decode (answers).", ("phase",)
    ),
    "okavango_phase_seconds_total": Metric(
        "counter", "Time by phase: draft, before a step; schedule, load, run, sample, deliver.", ("phase",)
    ),
    "okavango_waiting_requests": Metric("gauge", "Requests in the queue."),
    "okavango_running_requests": Metric("gauge", "Requests in the batch."),
    "okavango_kv_blocks_used": Metric("gauge", "Blocks of the KV cache in use."),
    "okavango_kv_blocks_total": Metric("gauge", "Blocks of the KV cache."),
    "okavango_slots_used": Metric("gauge", "Adapter slots that hold an adapter."),
    "okavango_slot_loads_total": Metric("counter", "Adapters copied into a slot."),
    "okavango_preemptions_total": Metric(
        "counter", "Requests that lost their blocks and are computed again."
    ),
    "okavango_parked_requests_total": Metric("counter", "Preempted requests kept on the host."),
    "okavango_restored_tokens_total": Metric("counter", "Tokens that came back from the host."),
    "okavango_draft_tokens_total": Metric(
        "counter",
        "Guessed tokens by source (lookup, draft) that were right (accepted) or not (rejected).",
        ("source", "result"),
    ),
    "okavango_prefix_tokens_total": Metric(
        "counter", "Prompt tokens found in the cache (hit) or computed (miss).", ("result",)
    ),
    "okavango_waits_total": Metric(
        "counter",
        "Steps that requests sat out, by what they waited for: seat, blocks, slot, budget, prefix.",
        ("reason",),
    ),
    "okavango_encoder_loaded": Metric("gauge", "1 while the encoder is in memory.", ("modality",)),
    "okavango_encoder_loads_total": Metric("counter", "Times that an encoder was loaded.", ("modality",)),
    "okavango_encoder_unloads_total": Metric(
        "counter", "Times that an encoder was unloaded: idle, memory, closed.", ("modality", "reason")
    ),
    "okavango_encoder_runs_total": Metric("counter", "Media that an encoder encoded.", ("modality",)),
    "okavango_feature_cache_hits_total": Metric(
        "counter", "Media whose features were cached.", ("modality",)
    ),
    "okavango_feature_cache_misses_total": Metric(
        "counter", "Media whose features were not cached.", ("modality",)
    ),
    "okavango_adapters": Metric("gauge", "Adapter versions by state.", ("state",)),
    "okavango_time_to_first_token_seconds": Metric(
        "histogram", "From a request's arrival to its first token.", buckets=_REQUEST_SECONDS
    ),
    "okavango_request_seconds": Metric(
        "histogram", "From a request's arrival to its end.", buckets=_REQUEST_SECONDS
    ),
}


class Metrics(Protocol):
    """Where parts report what they measure. Safe to call from any thread."""

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter."""

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one observation to a histogram."""


class NullMetrics:
    """Measures nothing, but holds its callers to METRICS as the real one does."""

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        _check("counter", name, labels)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        _check("gauge", name, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        _check("histogram", name, labels)


class PrometheusMetrics:
    """Prometheus' text format, in a registry of its own: two engines in a process do not mix."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry

        self._registry = CollectorRegistry()
        self._metrics = {name: self._declare(name, metric) for name, metric in METRICS.items()}

    @property
    def content_type(self) -> str:
        from prometheus_client import CONTENT_TYPE_LATEST

        return CONTENT_TYPE_LATEST

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        self._child("counter", name, labels).inc(amount)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        self._child("gauge", name, labels).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._child("histogram", name, labels).observe(value)

    def render(self) -> bytes:
        """Everything measured so far, as /metrics serves it."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)

    def _declare(self, name: str, metric: Metric) -> Any:
        import prometheus_client

        if metric.kind == "histogram":
            return prometheus_client.Histogram(
                name, metric.help, metric.labels, registry=self._registry, buckets=metric.buckets
            )
        kinds = {"counter": prometheus_client.Counter, "gauge": prometheus_client.Gauge}
        return kinds[metric.kind](name, metric.help, metric.labels, registry=self._registry)

    def _child(self, kind: Kind, name: str, labels: dict[str, str]) -> Any:
        _check(kind, name, labels)
        metric = self._metrics[name]
        return metric.labels(**labels) if labels else metric


def _check(kind: Kind, name: str, labels: dict[str, str]) -> None:
    assert name in METRICS, f"{name} is not in METRICS"
    metric = METRICS[name]
    assert metric.kind == kind, f"{name} is a {metric.kind}, not a {kind}"
    assert labels.keys() == set(metric.labels), f"{name} has labels {metric.labels}, not {tuple(labels)}"


class OneLine(logging.Formatter):
    """A record is one line, with a traceback or a user's line breaks in it: none can pass for two records."""

    @staticmethod
    def converter(seconds: float | None) -> time.struct_time:
        return time.gmtime(seconds)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")


def setup_logging(level: str = "INFO") -> None:
    """Log lines of a level and above to stderr: time in UTC, level, logger, message.

    Raises:
        ConfigError: no such level.
    """
    names = logging.getLevelNamesMapping()
    if level.upper() not in names:
        known = ", ".join(name for name, number in names.items() if number)
        raise ConfigError("no such log level", where=level, remedy=f"known are {known}")
    handler = logging.StreamHandler()
    form = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s"
    handler.setFormatter(OneLine(form, "%Y-%m-%dT%H:%M:%S"))
    logging.basicConfig(level=names[level.upper()], handlers=[handler], force=True)
