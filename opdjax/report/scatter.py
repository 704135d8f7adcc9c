"""A scatter plot with intervals and a Pareto front, as inline SVG written by hand.

Every dot has a tooltip, and names do not overlap.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from opdjax.report.charts import tick
from opdjax.report.markup import Html, tag

_WIDTH, _HEIGHT = 860, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 24, 30, 44
_LETTER, _LINE = 6.8, 15  # about the width and height of a letter of a name

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclasses.dataclass(frozen=True)
class Mark:
    """A dot: (mean, half interval) on both axes, its name and the text of its tooltip."""

    x: tuple[float, float]
    y: tuple[float, float]
    name: str
    title: str
    is_best: bool = False


@dataclasses.dataclass(frozen=True)
class _Axis:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        ends = (self.low, self.high, max(value, 1e-300) if self.is_log else value)
        low, high, value = map(math.log10, ends) if self.is_log else ends
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(self.start + share * (self.end - self.start), 1)


def scatter(
    marks: Sequence[Mark], *, x_label: str, y_label: str, described: str, is_log: bool = False
) -> Html:
    """The plot; the front goes in steps through the best marks."""
    x = _axis([mark.x for mark in marks], _LEFT, _WIDTH - _RIGHT, is_log)
    y = _axis([mark.y for mark in marks], _HEIGHT - _BOTTOM, _TOP, False)
    rest = [mark for mark in marks if not mark.is_best]
    best = sorted((mark for mark in marks if mark.is_best), key=lambda mark: mark.x[0])
    middle = {"x": (_LEFT + _WIDTH - _RIGHT) / 2, "text_anchor": "middle"}
    return tag(
        "svg",
        *_grid(x, y),
        tag("text", y_label, x=4, y=14, class_="axis"),
        tag("text", x_label, **middle, y=_HEIGHT - 6, class_="axis"),
        _front(best, x, y),
        *(_dot(mark, x, y) for mark in (*rest, *best)),
        *_names(best, [*best, *rest], x, y),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        class_="chart scatter",
        role="img",
        aria_label=described,
    )


def _axis(values: Sequence[tuple[float, float]], start: float, end: float, is_log: bool) -> _Axis:
    """An axis that holds all means, and intervals up to the spread of the means."""
    means = [value for value, _ in values]
    spread = max(means) - min(means) or abs(means[0]) * 0.1 or 1.0
    halves = [(value, min(half, spread)) for value, half in values if math.isfinite(half)]
    ends = [value + sign * half for value, half in halves for sign in (-1, 1)]
    if is_log:
        ends = [value for value in ends if value > min(means) / 1.5]
        return _Axis(min([*means, *ends]) / 1.15, max([*means, *ends]) * 1.15, start, end, True)
    low, high = min([*means, *ends]), max([*means, *ends])
    room = 0.05 * (high - low) or 0.5 * spread
    low = max(low - room, 0.0) if min(means) >= 0 else low - room  # scores and costs are >= 0
    return _Axis(low, high + room, start, end)


def ticks(low: float, high: float, is_log: bool) -> list[float]:
    """A few round numbers between the two."""
    if is_log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
        found = [step * 10.0**decade for decade in decades for step in steps]
        return [value for value in found if low <= value <= high]
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough)
    places = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [round(place * step, 12) for place in places]


def _grid(x: _Axis, y: _Axis) -> list[Html]:
    parts = []
    bottom = _HEIGHT - _BOTTOM
    for value in ticks(y.low, y.high, False):
        at = y.at(value)
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", tick(value), x=_LEFT - 8, y=at + 4, text_anchor="end"))
    for value in ticks(x.low, x.high, x.is_log):
        at = x.at(value)
        parts.append(tag("line", x1=at, x2=at, y1=_TOP, y2=bottom, class_="grid"))
        parts.append(tag("text", tick(value), x=at, y=bottom + 16, text_anchor="middle"))
    return parts


def _front(best: Sequence[Mark], x: _Axis, y: _Axis) -> Html | None:
    """The best score at each cost, in steps."""
    if not best:
        return None
    path = [f"M{x.at(best[0].x[0])} {y.at(best[0].y[0])}"]
    path += [f"H{x.at(mark.x[0])}V{y.at(mark.y[0])}" for mark in best[1:]]
    return tag("path", d="".join([*path, f"H{x.end}"]), class_="front")


def _dot(mark: Mark, x: _Axis, y: _Axis) -> Html:
    (across, wide), (up, tall) = mark.x, mark.y
    at_x, at_y, bars = x.at(across), y.at(up), []
    if math.isfinite(wide):
        bars.append(tag("line", x1=x.at(across - wide), x2=x.at(across + wide), y1=at_y, y2=at_y))
    if math.isfinite(tall):
        bars.append(tag("line", x1=at_x, x2=at_x, y1=y.at(up - tall), y2=y.at(up + tall)))
    dot = tag("circle", cx=at_x, cy=at_y, r=5 if mark.is_best else 4)
    class_ = "mark best" if mark.is_best else "mark"
    return tag("g", tag("title", mark.title), *bars, dot, class_=class_)


def _names(best: Sequence[Mark], every: Sequence[Mark], x: _Axis, y: _Axis) -> list[Html]:
    """Each name beside its dot, where it covers no other name and few dots.

    A name that fits nowhere is left out; the list below the plot has it.
    """
    dots = [(x.at(mark.x[0]), y.at(mark.y[0])) for mark in every]
    taken: list[Box] = []
    found = []
    for mark in reversed(best):  # the best score first
        place = _place(mark, dots, taken, x, y)
        if place is not None:
            taken.append(place)
            at = {"x": round(place[0], 1), "y": round(place[3] - 4, 1)}
            found.append(tag("text", mark.name, **at, class_="name"))
    return found


def _place(mark: Mark, dots, taken: Sequence[Box], x: _Axis, y: _Axis) -> Box | None:
    """The place of a name."""
    across, up, width = x.at(mark.x[0]), y.at(mark.y[0]), _LETTER * len(mark.name)
    corners = [(across + side, up + rise) for rise in (-18, 4, -34, 20) for side in (8, -8 - width)]
    boxes = [(left, top, left + width, top + _LINE) for left, top in corners]
    free = [
        (left, top, right, bottom)
        for left, top, right, bottom in boxes
        if left >= _LEFT and right <= _WIDTH and top >= 16 and bottom <= _HEIGHT - _BOTTOM
        if not any(_overlap((left, top, right, bottom), other) for other in taken)
    ]
    covers = lambda box, a, b: box[0] - 4 < a < box[2] + 4 and box[1] - 4 < b < box[3] + 4
    return min(free, key=lambda box: sum(covers(box, *dot) for dot in dots), default=None)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
