"""The curve of a job's losses, as HTML and SVG: sharp at any width, in the page's colours, light or dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

WAITING = '<div class="okv-empty okv-small">The curve begins with the first step.</div>'
_WIDTH, _HEIGHT = 1000, 300
_MOST_POINTS = 240
_NEIGHBOURS = 5
_TICKS = 5

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class _Frame:
    """What of the plane is seen: steps from 0 to `right`, losses from `bottom` to `top`."""

    right: float
    bottom: float
    top: float

    def x(self, step: float) -> float:
        return step / self.right * _WIDTH

    def y(self, loss: float) -> float:
        return _HEIGHT - (min(max(loss, self.bottom), self.top) - self.bottom) / self.height * _HEIGHT

    @property
    def height(self) -> float:
        return self.top - self.bottom


def curve(losses: Mapping[int, float], held_out: Mapping[int, float], steps: int) -> str:
    """Training and held-out loss over steps, as a figure.

    Args:
        losses, held_out: by step.
        steps: how many there are to be; 0 where that is not known yet.
    """
    if not losses and not held_out:
        return WAITING
    raw = thinned(sorted(losses.items()))
    smooth = smoothed(raw) if len(raw) > 4 * _NEIGHBOURS else raw
    seen = sorted(held_out.items())
    frame = _frame(smooth + [(float(step), loss) for step, loss in seen], steps)
    lines = [
        _path("okv-raw", frame, raw) if smooth is not raw else "",
        _path("okv-train", frame, smooth),
        _path("okv-held", frame, seen),
        _dots(frame, seen),
        *_tips(frame, raw, held_out),
    ]
    grid = "".join(f'<path class="okv-grid" d="M0 {frame.y(t):.1f}H{_WIDTH}"/>' for t in _ticks(frame))
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="loss by step">{grid}{"".join(lines)}</svg>'
    )
    plot = f'<div class="okv-plot">{_axes(frame)}{svg}</div>'
    return f'<figure class="okv-curve">{_legend(smooth, seen)}{plot}</figure>'


def thinned(points: Sequence[tuple[int, float]]) -> Points:
    """At most so many points as can be told apart: each the mean of its neighbourhood."""
    size = max(1, -(-len(points) // _MOST_POINTS))
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(group[-1][0], math.fsum(loss for _, loss in group) / len(group)) for group in groups]


def smoothed(points: Points) -> Points:
    """Each the mean of so many on both sides, so that nothing lags; at the ends, of those there are."""
    found: Points = []
    for i, (step, _) in enumerate(points):
        near = points[max(0, i - _NEIGHBOURS) : i + _NEIGHBOURS + 1]
        found.append((step, math.fsum(loss for _, loss in near) / len(near)))
    return found


def nice(span: float, most: int) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that parts a span into at most so many pieces."""
    power = 10 ** math.floor(math.log10(span / most))
    return next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)


def _frame(points: Points, steps: int) -> _Frame:
    values = [loss for _, loss in points]
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.05 or 0.1
    return _Frame(max(float(steps), *(step for step, _ in points), 1.0), max(0.0, low - room), high + room)


def _ticks(frame: _Frame) -> list[float]:
    size = nice(frame.height, _TICKS)
    first = math.ceil(frame.bottom / size)
    return [i * size for i in range(first, math.floor(frame.top / size) + 1)]


def _path(kind: str, frame: _Frame, points: Sequence[tuple[float, float]]) -> str:
    places = "L".join(f"{frame.x(step):.1f} {frame.y(loss):.1f}" for step, loss in points)
    return f'<path class="{kind}" d="M{places}"/>' if points else ""


def _dots(frame: _Frame, points: Sequence[tuple[int, float]]) -> str:
    """Lines without a length: their round ends stay round, however the picture is stretched."""
    places = "".join(f"M{frame.x(step):.1f} {frame.y(loss):.1f}h0" for step, loss in points)
    return f'<path class="okv-held okv-dots" d="{places}"/>' if points else ""


def _tips(frame: _Frame, points: Points, held_out: Mapping[int, float]) -> Iterator[str]:
    """What the mouse is told over each part of the picture."""
    before = 0.0
    for step, loss in points:
        seen = [value for at, value in held_out.items() if before < at <= step]
        text = f"step {step:,.0f}: training {loss:.3f}" + "".join(f", held out {value:.3f}" for value in seen)
        left, right = frame.x(before), frame.x(step)
        yield (
            f'<rect x="{left:.1f}" y="0" width="{right - left:.1f}" height="{_HEIGHT}">'
            f"<title>{text}</title></rect>"
        )
        before = step


def _axes(frame: _Frame) -> str:
    digits = max(0, -math.floor(math.log10(nice(frame.height, _TICKS))))
    across = nice(frame.right, _TICKS)
    steps = [i * across for i in range(math.floor(frame.right / across) + 1)]
    up = (
        f'<span class="okv-up" style="top:{frame.y(tick) / _HEIGHT * 100:.2f}%">{tick:.{digits}f}</span>'
        for tick in _ticks(frame)
    )
    along = (
        f'<span class="okv-along" style="left:{frame.x(step) / _WIDTH * 100:.2f}%">{step:,.0f}</span>'
        for step in steps
        if step == int(step)
    )
    return "".join((*up, *along))


def _legend(smooth: Points, seen: Sequence[tuple[int, float]]) -> str:
    parts = []
    if smooth:
        parts.append('<span class="okv-key okv-train">training loss</span>')
    if seen:
        parts.append(f'<span class="okv-key okv-held">held-out loss <b>{seen[-1][1]:.3f}</b></span>')
        step, best = min(seen, key=lambda point: point[1])
        if len(seen) > 1:
            parts.append(f'<span class="okv-muted">lowest {best:.3f} at step {step:,}</span>')
    return f"<figcaption>{''.join(parts)}</figcaption>"
