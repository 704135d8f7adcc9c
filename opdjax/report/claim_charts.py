"""A claim drawn on one line: where it holds, and where our interval lies."""

from __future__ import annotations

import math
from collections.abc import Sequence

from opdjax.report.markup import Html, number, tag
from opdjax.report.papers.verdicts import Verdict

_WIDTH, _HEIGHT, _EDGE = 260, 40, 12
_LINE = 15  # where the interval lies


def claim_chart(verdict: Verdict) -> Html | None:
    """The difference and its interval over the part of the scale where the claim holds; None where
    nothing has been run.
    """
    if verdict.difference is None:
        return None
    mean, _ = verdict.difference
    low, high = holds(verdict)
    ends = interval(verdict)
    start, end = _scale(verdict, (mean, *(ends or ())), low, high)

    def at(value: float) -> float:
        return round(
            _EDGE + (_WIDTH - 2 * _EDGE) * (min(max(value, start), end) - start) / (end - start), 1
        )

    shade = tag(
        "rect",
        x=at(low),
        y=3,
        width=round(max(at(high) - at(low), 0.0), 1),
        height=2 * (_LINE - 3),
        class_="holds",
    )
    neutral = {"ratio": 1.0}.get(verdict.claim.kind, 0.0)
    marks = [
        value
        for value in dict.fromkeys((neutral, low, high))
        if math.isfinite(value) and start <= value <= end
    ]
    ticks = [
        tag(
            "line",
            x1=at(value),
            x2=at(value),
            y1=3,
            y2=2 * _LINE - 3,
            class_="zero" if value == neutral else "bound",
        )
        for value in marks
    ]
    labels = [
        tag("text", _short(value), x=at(value), y=_HEIGHT - 1, text_anchor="middle")
        for value in _apart(marks, at)
    ]
    first, last = ends or (start, end)
    bar = tag(
        "line", x1=at(first), x2=at(last), y1=_LINE, y2=_LINE, class_="bar" if ends else "bar open"
    )
    dot = tag("circle", cx=at(mean), cy=_LINE, r=4)
    return tag(
        "svg",
        shade,
        *ticks,
        *labels,
        bar,
        dot,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        class_=f"claim {verdict.status.replace(' ', '-')}",
        role="img",
        aria_label=_described(verdict, mean, ends, low, high),
    )


def holds(verdict: Verdict) -> tuple[float, float]:
    """Where the claim is true of the difference (or ratio, or share)."""
    kind, margin = verdict.claim.kind, verdict.claim.margin
    return {
        "more": (margin, math.inf),
        "less": (-math.inf, -margin),
        "equal": (-margin, margin),
        "ratio": (margin, math.inf),
        "gap": (margin, math.inf),
    }[kind]


def interval(verdict: Verdict) -> tuple[float, float] | None:
    """Its two ends; None for one seed. A ratio's interval is even in its logarithm, and the larger
    side is the one that is told.
    """
    mean, half = verdict.difference or (0.0, math.inf)
    if not math.isfinite(half):
        return None
    return (mean / (1 + half / mean) if verdict.claim.kind == "ratio" else mean - half), mean + half


def _scale(
    verdict: Verdict, drawn: Sequence[float], low: float, high: float
) -> tuple[float, float]:
    """Wide enough for the mean, its interval and the bounds, with room at both ends."""
    neutral = 1.0 if verdict.claim.kind == "ratio" else 0.0
    seen = [value for value in (*drawn, neutral, low, high) if math.isfinite(value)]
    start, end = min(seen), max(seen)
    room = 0.15 * (end - start) or 0.01
    return start - room, end + room


def _apart(marks: list[float], at) -> list[float]:
    """Those whose labels do not lie upon each other, the first before the others."""
    kept: list[float] = []
    for value in marks:
        if all(abs(at(value) - at(other)) > 34 for other in kept):
            kept.append(value)
    return kept


def _short(value: float) -> str:
    return number(float(f"{value:.3g}"))


def _described(
    verdict: Verdict, mean: float, ends: tuple[float, float] | None, low: float, high: float
) -> str:
    reach = (
        f"from {_short(ends[0])} to {_short(ends[1])}" if ends else "without an interval: one seed"
    )
    wanted = " and ".join(
        part
        for part in (
            f"above {_short(low)}" if math.isfinite(low) else "",
            f"below {_short(high)}" if math.isfinite(high) else "",
        )
        if part
    )
    return f"mean {_short(mean)}, {reach}; the claim holds {wanted}: {verdict.status}"
