"""Dots with intervals and a front, as inline SVG drawn by hand: every dot has a title to be pointed
at, and names do not overlap.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from opdjax.report.charts import tick
from opdjax.report.markup import Html, tag

_WIDTH, _HEIGHT = 860, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 24, 30, 44
_LETTER, _LINE = 6.8, 15  # about the size of a name's letters


@dataclasses.dataclass(frozen=True)
class Mark:
    """A dot: (mean, half interval) of both, its name and what is told when it is pointed at."""

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
        low, high, value = (
            map(math.log10, (self.low, self.high, max(value, 1e-300)))
            if self.is_log
            else (self.low, self.high, value)
        )
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(self.start + share * (self.end - self.start), 1)


def scatter(
    marks: Sequence[Mark], *, x_label: str, y_label: str, described: str, is_log: bool = False
) -> Html:
    """The drawing; the front goes through the best marks by rising x, in steps."""
    x = _axis([mark.x for mark in marks], _LEFT, _WIDTH - _RIGHT, is_log)
    y = _axis([mark.y for mark in marks], _HEIGHT - _BOTTOM, _TOP, False)
    rest, best = (
        [mark for mark in marks if not mark.is_best],
        sorted((m for m in marks if m.is_best), key=lambda mark: mark.x[0]),
    )
    names = [] if not best else _names(best, [*best, *rest], x, y)
    return tag(
        "svg",
        *_grid(x, y),
        tag("text", y_label, x=4, y=14, class_="axis"),
        tag(
            "text",
            x_label,
            x=(_LEFT + _WIDTH - _RIGHT) / 2,
            y=_HEIGHT - 6,
            text_anchor="middle",
            class_="axis",
        ),
        _front(best, x, y),
        *(_dot(mark, x, y) for mark in (*rest, *best)),
        *names,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        class_="chart scatter",
        role="img",
        aria_label=described,
    )


def _axis(values: Sequence[tuple[float, float]], start: float, end: float, is_log: bool) -> _Axis:
    """All means, and intervals as far as they are not several times wider than what lies between
    the means.
    """
    means = [value for value, _ in values]
    spread = max(means) - min(means) or abs(means[0]) * 0.1 or 1.0
    ends = [
        value + sign * min(half, spread)
        for value, half in values
        if math.isfinite(half)
        for sign in (-1, 1)
    ]
    if is_log:
        ends = [value for value in ends if value > min(means) / 1.5]
        return _Axis(min([*means, *ends]) / 1.15, max([*means, *ends]) * 1.15, start, end, True)
    low, high = min([*means, *ends]), max([*means, *ends])
    room = 0.05 * (high - low) or 0.5 * spread
    low = (
        max(low - room, 0.0) if min(means) >= 0 else low - room
    )  # neither scores nor costs are below 0
    return _Axis(low, high + room, start, end)


def ticks(low: float, high: float, is_log: bool) -> list[float]:
    """A handful of round numbers between the two."""
    if is_log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
        return [
            step * 10.0**decade
            for decade in decades
            for step in steps
            if low <= step * 10.0**decade <= high
        ]
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough)
    return [
        round(number * step, 12)
        for number in range(math.ceil(low / step), math.floor(high / step) + 1)
    ]


def _grid(x: _Axis, y: _Axis) -> list[Html]:
    parts = []
    for value in ticks(y.low, y.high, False):
        parts.append(
            tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y.at(value), y2=y.at(value), class_="grid")
        )
        parts.append(tag("text", tick(value), x=_LEFT - 8, y=y.at(value) + 4, text_anchor="end"))
    for value in ticks(x.low, x.high, x.is_log):
        parts.append(
            tag(
                "line", x1=x.at(value), x2=x.at(value), y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="grid"
            )
        )
        parts.append(
            tag("text", tick(value), x=x.at(value), y=_HEIGHT - _BOTTOM + 16, text_anchor="middle")
        )
    return parts


def _front(best: Sequence[Mark], x: _Axis, y: _Axis) -> Html | None:
    """In steps: until the next arm's cost is paid, the one before it is the best there is."""
    if not best:
        return None
    path = [f"M{x.at(best[0].x[0])} {y.at(best[0].y[0])}"]
    path += [f"H{x.at(mark.x[0])}V{y.at(mark.y[0])}" for mark in best[1:]]
    return tag("path", d="".join([*path, f"H{x.end}"]), class_="front")


def _dot(mark: Mark, x: _Axis, y: _Axis) -> Html:
    (across, wide), (up, tall) = mark.x, mark.y
    bars = []
    if math.isfinite(wide):
        bars.append(
            tag("line", x1=x.at(across - wide), x2=x.at(across + wide), y1=y.at(up), y2=y.at(up))
        )
    if math.isfinite(tall):
        bars.append(
            tag("line", x1=x.at(across), x2=x.at(across), y1=y.at(up - tall), y2=y.at(up + tall))
        )
    dot = tag("circle", cx=x.at(across), cy=y.at(up), r=5 if mark.is_best else 4)
    return tag(
        "g", tag("title", mark.title), *bars, dot, class_="mark best" if mark.is_best else "mark"
    )


def _names(best: Sequence[Mark], every: Sequence[Mark], x: _Axis, y: _Axis) -> list[Html]:
    """Beside each dot, on the side where it covers no other name and few dots; a name that finds no
    place is left to the list below.
    """
    dots = [(x.at(mark.x[0]), y.at(mark.y[0])) for mark in every]
    taken: list[tuple[float, float, float, float]] = []
    found = []
    for mark in reversed(best):  # the best score first
        place = _place(mark, dots, taken, x, y)
        if place is not None:
            taken.append(place)
            found.append(
                tag(
                    "text", mark.name, x=round(place[0], 1), y=round(place[3] - 4, 1), class_="name"
                )
            )
    return found


def _place(mark: Mark, dots, taken, x: _Axis, y: _Axis) -> tuple[float, float, float, float] | None:
    """(left, top, right, bottom) of the name."""
    across, up, width = x.at(mark.x[0]), y.at(mark.y[0]), _LETTER * len(mark.name)
    corners = [(across + side, up + rise) for rise in (-18, 4, -34, 20) for side in (8, -8 - width)]
    boxes = [(left, top, left + width, top + _LINE) for left, top in corners]
    boxes = [
        box
        for box in boxes
        if box[0] >= _LEFT and box[2] <= _WIDTH and box[1] >= 16 and box[3] <= _HEIGHT - _BOTTOM
    ]
    boxes = [box for box in boxes if not any(_touch(box, other) for other in taken)]
    return min(
        boxes,
        key=lambda box: sum(
            box[0] - 4 < a < box[2] + 4 and box[1] - 4 < b < box[3] + 4 for a, b in dots
        ),
        default=None,
    )


def _touch(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
