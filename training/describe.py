"""A check's report as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from okavango.training.memory import Estimate
from okavango.training.report import Place, Report
from okavango.training.spread import Summary

_SHOWN = 3


def describe(report: Report) -> Iterator[str]:
    """Faults, warnings, how many more there are, and what the data hold."""
    counts = report.counts
    yield from map(str, report.faults)
    if len(report.faults) < counts.faults:
        yield f"… and {counts.faults - len(report.faults):,} more faults; --max-faults shows more"
    yield from (f"{warning} (warning)" for warning in report.warnings)
    if len(report.warnings) < counts.warnings:
        yield f"… and {counts.warnings - len(report.warnings):,} more warnings"
    if report.tokens:
        yield f"tokens a row: {_spread(report.tokens)}; the longest: {_places(report.longest, 'tokens')}"
    for modality, summary in report.media.items():
        yield f"bytes of each {modality}: {_spread(summary)}"
    if report.largest_media:
        yield f"the largest media: {_places(report.largest_media, 'bytes')}"
    if report.memory:
        yield _memory(report.memory)
    yield f"{report.path}: {_held(report)}: {_verdict(report)}"


def _held(report: Report) -> str:
    counts = report.counts
    held = f"{_number(counts.rows, 'row')}, {_number(counts.messages, 'message')}, {counts.media:,} media"
    if counts.media:
        held += f" ({counts.distinct_media:,} distinct, {counts.media_bytes / 1e6:.1f} MB)"
    if counts.tokens:
        held += f", {counts.tokens:,} tokens, {counts.longest:,} in the longest row"
    return f"{held}, read as {report.format}" if report.format else held


def _verdict(report: Report) -> str:
    counts = report.counts
    verdict = "no faults" if report.ok else _number(counts.faults, "fault")
    if counts.faulty_rows:
        verdict += f" in {_number(counts.faulty_rows, 'row')}"
    if counts.warnings:
        verdict += f", {_number(counts.warnings, 'warning')}"
    return verdict


def _spread(summary: Summary) -> str:
    return (
        f"half have up to {summary.p50:,}, 90 % up to {summary.p90:,}, 99 % up to {summary.p99:,}, "
        f"all up to {summary.largest:,}"
    )


def _places(places: Sequence[Place], unit: str) -> str:
    shown = [
        f"{'line' if place.line == place.row else 'row'} {place.row:,} ({place.size:,} {unit})"
        for place in places[:_SHOWN]
    ]
    return ", ".join(shown)


def _memory(estimate: Estimate) -> str:
    parts = ("weights", "learned", "activations", "attention", "logits")
    listed = ", ".join(f"{name} {_gigabytes(getattr(estimate, name))}" for name in parts)
    return (
        f"a batch of the {_number(estimate.rows, 'longest row')} ({estimate.tokens:,} tokens) takes about "
        f"{_gigabytes(estimate.total)}: {listed}"
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
