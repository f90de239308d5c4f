"""What one request looked like from outside, and the figures of many. Plain Python: no torch, no HTTP."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trace:
    """One request. Times are seconds on one clock that never goes back.

    Attributes:
        model: whom it asked.
        sent: when it set out.
        times: when pieces of the answer arrived; the first holds one token. Empty if it came whole.
        ended: when the answer was complete, or failed.
        tokens: how many were generated.
        wanted: how many were asked for.
        prompt_tokens: as the server counts them; 0 where it doesn't say.
        error: why there is no answer.
    """

    model: str
    sent: float
    times: tuple[float, ...]
    ended: float
    tokens: int
    wanted: int
    prompt_tokens: int = 0
    error: str | None = None

    @property
    def first(self) -> float | None:
        """Seconds to the first token."""
        return self.times[0] - self.sent if self.times else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second from the first token on: the prompt's time is not in it."""
        if len(self.times) < 2 or self.times[-1] == self.times[0]:
            return None
        return (self.tokens - 1) / (self.times[-1] - self.times[0])


@dataclass(frozen=True)
class Spread:
    """Percentiles of some seconds; None if there was nothing to measure."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        return cls(*(percentile(values, share) for share in (0.5, 0.95, 0.99))) if values else None


@dataclass(frozen=True)
class Figures:
    """Many requests.

    Attributes:
        requests: all, those that failed included.
        errors: how often, by message.
        short: answers with fewer tokens than asked for; a fair comparison has none.
        seconds: from the first request's start to the last one's end.
        output_rate: generated tokens a second, the time for prompts included.
        request_rate: answers a second.
        first: seconds to the first token.
        gap: seconds between pieces of an answer.
        whole: seconds to the last token.
        decode_rate: median over the answers of tokens a second after the first.
    """

    requests: int
    errors: dict[str, int]
    short: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    output_rate: float
    request_rate: float
    first: Spread | None
    gap: Spread | None
    whole: Spread | None
    decode_rate: float | None

    @classmethod
    def of(cls, traces: Sequence[Trace]) -> Figures:
        """The figures of at least one request."""
        good = [trace for trace in traces if trace.error is None]
        seconds = max(trace.ended for trace in traces) - min(trace.sent for trace in traces)
        output = sum(trace.tokens for trace in good)
        return cls(
            requests=len(traces),
            errors=dict(Counter(trace.error for trace in traces if trace.error is not None)),
            short=sum(trace.tokens < trace.wanted for trace in good),
            seconds=seconds,
            prompt_tokens=sum(trace.prompt_tokens for trace in good),
            output_tokens=output,
            output_rate=output / seconds,
            request_rate=len(good) / seconds,
            first=Spread.of(present(trace.first for trace in good)),
            gap=Spread.of([gap for trace in good for gap in trace.gaps]),
            whole=Spread.of([trace.ended - trace.sent for trace in good]),
            decode_rate=median(present(trace.decode_rate for trace in good)),
        )


def by_model(traces: Iterable[Trace]) -> dict[str, Figures]:
    found: dict[str, list[Trace]] = {}
    for trace in traces:
        found.setdefault(trace.model, []).append(trace)
    return {model: Figures.of(own) for model, own in found.items()}


def percentile(values: Sequence[float], share: float) -> float:
    """Between the two nearest ranks, in proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
