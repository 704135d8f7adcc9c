"""A small chart of a claim: the range where it holds, and our interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from opdjax.report.markup import Html, number, tag
from opdjax.report.papers.compare import Verdict

_WIDTH, _HEIGHT, _EDGE = 260, 40, 12
_LINE = 15  # y of the interval


def claim_chart(verdict: Verdict) -> Html | None:
    """The difference and its interval, with the range where the claim holds shaded; None if nothing
    has been run.
    """
    if verdict.difference is None:
        return None
    mean, _ = verdict.difference
    low, high = claimed_range(verdict)
    ends = verdict.interval
    neutral = 1.0 if verdict.claim.kind == "ratio" else 0.0
    start, end = _scale((mean, *(ends or ()), neutral, low, high))

    def at(value: float) -> float:
        share = (min(max(value, start), end) - start) / (end - start)
        return round(_EDGE + (_WIDTH - 2 * _EDGE) * share, 1)

    def line(first: float, last: float, top: float, bottom: float, class_: str) -> Html:
        return tag("line", x1=at(first), x2=at(last), y1=top, y2=bottom, class_=class_)

    width = round(max(at(high) - at(low), 0.0), 1)
    shade = tag("rect", x=at(low), y=3, width=width, height=2 * (_LINE - 3), class_="holds")
    marks = [
        value
        for value in dict.fromkeys((neutral, low, high))
        if math.isfinite(value) and start <= value <= end
    ]
    ticks = [
        line(value, value, 3, 2 * _LINE - 3, "zero" if value == neutral else "bound")
        for value in marks
    ]
    labels = [
        tag("text", _short(value), x=at(value), y=_HEIGHT - 1, text_anchor="middle")
        for value in _without_overlap(marks, at)
    ]
    bar = line(*(ends or (start, end)), _LINE, _LINE, "bar" if ends else "bar open")
    return tag(
        "svg",
        shade,
        *ticks,
        *labels,
        bar,
        tag("circle", cx=at(mean), cy=_LINE, r=4),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        class_=f"claim {verdict.status.replace(' ', '-')}",
        role="img",
        aria_label=_description(verdict, mean, ends, low, high),
    )


def claimed_range(verdict: Verdict) -> tuple[float, float]:
    """The range of the difference (or ratio, or share) where the claim holds."""
    low, high = verdict.claimed
    return -math.inf if low is None else low, math.inf if high is None else high


def _scale(values: Sequence[float]) -> tuple[float, float]:
    """Covers all finite values, with room at both ends."""
    finite = [value for value in values if math.isfinite(value)]
    start, end = min(finite), max(finite)
    room = 0.15 * (end - start) or 0.01
    return start - room, end + room


def _without_overlap(marks: Sequence[float], at: Callable[[float], float]) -> list[float]:
    """The marks whose labels do not overlap those of earlier ones."""
    kept: list[float] = []
    for value in marks:
        if all(abs(at(value) - at(other)) > 34 for other in kept):
            kept.append(value)
    return kept


def _short(value: float) -> str:
    return number(float(f"{value:.3g}"))


def _description(
    verdict: Verdict, mean: float, ends: tuple[float, float] | None, low: float, high: float
) -> str:
    reach = "without an interval: one seed"
    if ends:
        reach = f"from {_short(ends[0])} to {_short(ends[1])}"
    bounds = [f"above {_short(low)}"] if math.isfinite(low) else []
    bounds += [f"below {_short(high)}"] if math.isfinite(high) else []
    claimed = " and ".join(bounds)
    return f"mean {_short(mean)}, {reach}; the claim holds {claimed}: {verdict.status}"
