"""Drawings of rows, one for each name, of lanes of time, and of points with intervals."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from markupsafe import Markup

from opdjax.report.drawing import (
    GRID,
    INK,
    LETTER,
    MUTED,
    NOTHING,
    PAGE,
    REST,
    TEXT,
    Bars,
    bare_axes,
    colour_of,
    figure,
    fill_of,
    finite,
    label_below,
    picture,
    tick,
)
from opdjax.runs.results import is_number

# Rows: one per name, with its mark and its number


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row: its name, its mark, and its number as `text`. Without a value, `note` is written."""

    label: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    # Sizes of the parts of a stack, drawn in the slots of PARTS. `value` is then their sum, in
    # which a negative part counts as negative.
    parts: tuple[float, ...] = ()
    is_warning: bool = False  # a cross instead of a dot
    is_target: bool = False  # a ring at 0: it claims to be there
    text: str = ""
    note: str = ""


Groups = Sequence[tuple[str, Sequence[Entry]]]  # a heading ("" for none) and its rows
PARTS = (3, 4, 0)  # slots of the parts of a stack; the second is hatched
_ROW_WIDTH, _ROW, _ROW_FONT = 560, 27, 14
_ROW_TOP, _ROW_BOTTOM, _ROW_GAP, _HEADING = 4, 54, 14, 1.15


def rows_of(
    title: str,
    groups: Groups,
    x: str,
    kind: Literal["angle", "ratio", "stack"],
    *,
    limit: float = 0.0,
    unit: str = "",
    where: str = "",
) -> Markup:
    """A row for each entry: degrees from 0, ratios as logarithmic bars from 1, or stacked parts.

    `limit`: the largest angle, or where stacks are cut, with an arrow. `where` joins the
    description of the drawing.
    """
    groups = [(heading, entries) for heading, entries in groups if entries]
    every = [entry for _, entries in groups for entry in entries]
    if not every:
        return NOTHING
    count = len(every) + sum(_HEADING for heading, _ in groups if heading)
    height = _ROW_TOP + _ROW * count + _ROW_BOTTOM
    left = min(max(len(e.label) for e in every) * LETTER + _ROW_GAP, 0.48 * _ROW_WIDTH)
    texts = max(len(e.text) for e in every) * LETTER
    width = _ROW_WIDTH - left - (texts + _ROW_GAP if texts else _ROW_GAP)

    def paint(canvas: Any) -> None:
        share = (left / _ROW_WIDTH, _ROW_BOTTOM / height, width / _ROW_WIDTH, _ROW * count / height)
        axes = bare_axes(canvas, share, "x")
        axes.set_ylim(count, 0)
        axes.set_yticks([])
        mark = _KINDS[kind](axes, every, limit, unit, width)
        axes.minorticks_off()
        axes.tick_params(pad=6)
        beside = {"transform": axes.get_yaxis_transform(), "va": "center"}
        muted = {"color": MUTED, "zorder": 6}
        axes.text(0, count + 1.6, x, **beside, **muted, clip_on=False)
        start, end = -left / width, (_ROW_WIDTH - left) / width  # edges of the figure
        y = 0.0
        for heading, entries in groups:
            if heading:
                axes.text(start, y + 0.72, heading, **beside, **muted, fontweight="bold")
                y += _HEADING
            for entry in entries:
                colour = colour_of(1) if entry.is_warning else INK
                size = _ROW_FONT * min(1, (left - _ROW_GAP) / (len(entry.label) * LETTER or 1))
                label = beside | {"fontsize": size, "color": colour}
                axes.text(start, y + 0.5, entry.label, **label)
                axes.text(end, y + 0.5, entry.text, **beside, ha="right")
                if entry.note:
                    axes.axhspan(y, y + 1, color=GRID, linewidth=0, zorder=1)
                    axes.text(0.5, y + 0.5, entry.note, **beside, **muted, ha="center")
                elif is_number(entry.value) or entry.parts:
                    mark(entry, y + 0.5)
                y += 1

    described = ", ".join(filter(None, (f"{title}: {x}", where)))
    return figure(title, picture(described, _ROW_WIDTH, height, paint, _ROW_FONT))


_Painter = Callable[[Entry, float], None]  # draws an entry at a height


def _dot(axes: Any, x: float, y: float, entry: Entry, zorder: float) -> None:
    size, marker = (9.5, "X") if entry.is_warning else (8.5, "o")
    style = {"color": _own(entry), "marker": marker, "markeredgewidth": 0}
    axes.plot([x], [y], **style, markersize=size, zorder=zorder)


def _own(entry: Entry) -> str:
    return colour_of(1 if entry.is_warning else 0)


def _angles(axes: Any, every: Sequence[Entry], limit: float, unit: str, width: float) -> _Painter:
    axes.set_xlim(-0.05 * limit, 1.05 * limit)
    room = width / (5 * LETTER)  # labels that fit side by side
    step = next(step for step in (15, 30, 45, 90) if limit <= step * room or step == 90)
    axes.set_xticks(range(0, math.floor(1.05 * limit) + 1, step))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}°")

    def mark(entry: Entry, y: float) -> None:
        if entry.is_target:
            ring = {"marker": "o", "markersize": 17, "color": "none", "markeredgewidth": 1.4}
            axes.plot([0], [y], **ring, markeredgecolor=INK, zorder=4)
        axes.plot([0, entry.value], [y, y], color=_own(entry), linewidth=1.8, zorder=2.5)
        _dot(axes, entry.value, y, entry, 5)

    return mark


def _ratios(axes: Any, every: Sequence[Entry], limit: float, unit: str, width: float) -> _Painter:
    values = finite(value for e in every for value in (e.value, e.low, e.high))
    ends = [value for value in values if value > 0]
    low, high = min([*ends, 0.8]) / 1.1, max([*ends, 1.25]) * 1.1
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(log_ticks(low, high, width))
    axes.xaxis.set_major_formatter(lambda value, _: f"{tick(value)}×")
    axes.axvline(1, color=INK, linewidth=1.2, zorder=2)

    def mark(entry: Entry, y: float) -> None:
        value = max(entry.value, low)
        bar = {"height": 0.56, "color": _own(entry), "alpha": 0.3, "linewidth": 0}
        axes.barh([y], [value - 1], left=1, **bar, zorder=2.5)
        if is_number(entry.low) and is_number(entry.high):
            line = {"color": _own(entry), "linewidth": 2.2, "zorder": 3}
            axes.plot([max(entry.low, low), entry.high], [y, y], **line)
        _dot(axes, value, y, entry, 4)

    return mark


def _stacks(axes: Any, every: Sequence[Entry], limit: float, unit: str, width: float) -> _Painter:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, limit)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{tick(value)}{unit}")
    if unit:
        axes.axvline(1, color=INK, linewidth=1.2, dashes=(4, 3), zorder=2)

    def mark(entry: Entry, y: float) -> None:
        start = 0.0
        for slot, size in zip(PARTS, entry.parts):
            fill = fill_of(Bars((), slot, is_hatched=slot == PARTS[1]))
            axes.barh([y], [size], left=start, height=0.62, **fill, zorder=3)
            start += size
        if is_number(entry.value) and 0 <= entry.value <= limit:
            at = [entry.value, entry.value]
            axes.plot(at, [y - 0.44, y + 0.44], color=INK, linewidth=2.6, zorder=5)
        if start > limit:
            arrow = {"marker": ">", "markersize": 9, "color": INK, "clip_on": False}
            axes.plot([limit], [y], **arrow, zorder=5)

    return mark


_KINDS = {"angle": _angles, "ratio": _ratios, "stack": _stacks}


def log_ticks(low: float, high: float, width: float) -> list[float]:
    """As many round numbers, up to six and 1 among them, as have labels that do not touch on an
    axis of this width.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    within = ((1, 1.2, 1.5, 2, 3, 5, 8), (1, 2, 5), (1, 3), (1,))
    for steps, every in (*((steps, 1) for steps in within), *(((1,), n) for n in range(2, 99))):
        powers = [decade for decade in decades if decade % every == 0]
        values = [round(step * 10.0**decade, 12) for decade in powers for step in steps]
        found = [value for value in values if low <= value <= high]
        at = [width * math.log(value / low) / math.log(high / low) for value in found]
        room = [LETTER * (len(tick(value)) + 2) for value in found]
        gaps = (right - left for left, right in itertools.pairwise(at))
        needed = ((one + two) / 2 for one, two in itertools.pairwise(room))
        if len(found) <= 6 and all(gap >= least for gap, least in zip(gaps, needed)):
            break
    return found


# Lanes: what each process did, over time


@dataclasses.dataclass(frozen=True)
class Bar:
    """A period of a lane: REST periods are thin. `text` is written inside where it fits."""

    start: float
    end: float
    slot: int
    text: str = ""


_LANE_WIDTH, _LANE, _LANE_GAP, _LANE_AXIS, _LANE_NAMES = 1120, 46, 16, 44, 84


def lanes(
    title: str,
    found: dict[str, Sequence[Bar]],
    length: float,
    cuts: Sequence[float] = (),
    shares: dict[str, Sequence[tuple[int, Sequence[float]]]] | None = None,
) -> Markup:
    """A lane for each process, from 0 to `length` seconds; dotted lines mark `cuts`.

    With `shares`, for too many periods to draw, each lane has the share of each of equal
    stretches of time that a slot takes, stacked.
    """
    height = len(found) * (_LANE + _LANE_GAP) + _LANE_AXIS
    width = _LANE_WIDTH - _LANE_NAMES - 10
    gap = _LANE_GAP / _LANE

    def paint(canvas: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        inner = height - _LANE_AXIS
        place = (_LANE_NAMES / _LANE_WIDTH, _LANE_AXIS / height)
        axes = bare_axes(canvas, (*place, width / _LANE_WIDTH, inner / height), None)
        name = {"ha": "right", "va": "center", "color": INK}
        for row, (who, each) in enumerate(found.items()):
            y = (1 + gap) * (len(found) - 1 - row)
            axes.text(-0.008, y, who, transform=axes.get_yaxis_transform(), **name)
            if shares is None:
                _paint_bars(axes, y, each, width / length)
            else:
                _paint_shares(axes, y, shares[who], length)
        for cut in cuts:
            axes.axvline(cut, color=INK, linewidth=1.2, dashes=(1.5, 1.5), zorder=5)
        axes.set_ylim(-0.5 - gap / 2, (1 + gap) * (len(found) - 1) + 0.5 + gap / 2)
        axes.set_yticks([])
        axes.set_xlim(0.0, length)
        axes.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(tick)
        label_below(axes, "seconds", -25 / inner)

    described = f"{title}: lanes of {' and '.join(found)} over time"
    return figure(title, picture(described, _LANE_WIDTH, height, paint, TEXT), is_wide=True)


def _paint_bars(axes: Any, y: float, found: Sequence[Bar], pixels: float) -> None:
    for bar in found:
        height = 0.4 if bar.slot == REST else 1.0
        style = {"height": height, "color": colour_of(bar.slot), "linewidth": 0}
        axes.barh(y, bar.end - bar.start, left=bar.start, **style)
        if bar.text and (bar.end - bar.start) * pixels > 6 * len(bar.text) + 2:
            at = {"ha": "center", "va": "center", "color": PAGE, "fontsize": 9.5}
            axes.text((bar.start + bar.end) / 2, y, bar.text, **at)


def _paint_shares(axes: Any, y: float, found: Sequence[tuple[int, Any]], length: float) -> None:
    bins = len(found[0][1]) if found else 0
    edges, floor = np.linspace(0.0, length, bins + 1), np.full(bins, y - 0.5)
    for slot, share in sorted(found, key=lambda each: each[0] == REST):
        top = np.minimum(floor + np.asarray(share), y + 0.5)
        sides = (np.append(side, side[-1:]) for side in (floor, top))
        axes.fill_between(edges, *sides, step="post", color=colour_of(slot), linewidth=0)
        floor = top


# Points


@dataclasses.dataclass(frozen=True)
class Mark:
    """A dot: (mean, half interval) on both axes, its name and the text of its tooltip."""

    x: tuple[float, float]
    y: tuple[float, float]
    name: str
    title: str
    is_best: bool = False  # filled, named, and on the front


def points(title: str, found: Sequence[Mark], y: str, x: str, *, log_x: bool = False) -> Markup:
    """Dots with their intervals; the front goes in steps through the best, by rising x."""
    best = sorted((mark for mark in found if mark.is_best), key=lambda mark: mark.x[0])

    def paint(canvas: Any) -> None:
        axes = bare_axes(canvas, (0.06, 0.12, 0.92, 0.8), "both")
        axes.text(-0.05, 1.04, y, transform=axes.transAxes, color=MUTED)
        label_below(axes, x, -0.09)
        axes.set_xscale("log" if log_x else "linear")
        means = [mark.y[0] for mark in found]
        spread = max(means) - min(means) or 0.1 * abs(means[0]) or 1.0
        for mark in found:
            _paint_mark(axes, mark, spread)
        axes.margins(0.05)
        axes.set_xlim(*axes.get_xlim())  # fixes the limits, which the places of names need
        axes.set_ylim(*axes.get_ylim())
        x_best = [*(mark.x[0] for mark in best), axes.get_xlim()[1]]
        y_best = [mark.y[0] for mark in (*best, *best[-1:])]
        front = {"color": colour_of(0), "linewidth": 1.5, "dashes": (6, 3), "zorder": 2}
        axes.step(x_best[: len(y_best)], y_best, where="post", **front)
        axes.minorticks_off()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(tick)
        if log_x:
            axes.set_xticks(log_ticks(*axes.get_xlim(), 790))
        _names(axes, list(reversed(best)))  # the best score first

    names = ", ".join(mark.name for mark in best)
    described = f"{title}: {y} against {x}; on the front: {names}"
    return figure("", picture(described, 860, 380, paint, TEXT), is_wide=True)


def _paint_mark(axes: Any, mark: Mark, spread: float) -> None:
    (x, wide), (y, tall) = mark.x, mark.y
    colour = colour_of(0 if mark.is_best else REST)
    bar = {"color": colour, "linewidth": 1.2, "zorder": 2.5}
    if math.isfinite(wide):
        axes.plot([max(x - wide, 0.7 * x), x + wide], [y, y], **bar)
    if math.isfinite(tall):  # an interval wider than all means together is cut
        axes.plot([x, x], [y - min(tall, spread), y + min(tall, spread)], **bar)
    edge = colour if mark.is_best else MUTED
    fill = {"markerfacecolor": colour if mark.is_best else PAGE, "markeredgecolor": edge}
    style = {"marker": "o", "markersize": 9 if mark.is_best else 7, "zorder": 4 + mark.is_best}
    dot = axes.plot([x], [y], **style, **fill)
    dot[0].set_gid(f"title:{mark.title}")


def _names(axes: Any, found: Sequence[Mark]) -> None:
    """Each name beside its dot; one that would cover another is left out (a table has it)."""
    taken: list[tuple[float, float, float]] = []
    for mark in found:
        x, y = axes.transData.transform((mark.x[0], mark.y[0]))
        width = 1.1 * LETTER * len(mark.name)  # bold
        for dx, dy in itertools.product((9, -9 - width), (7, -17, 23, -33)):
            left, up = x + dx, y + dy
            is_free = all(
                abs(up - other) > 15 or left > end or start > left + width
                for start, end, other in taken
            )
            if is_free and left >= 50 and left + width <= 860:
                taken.append((left, left + width, up))
                style = {"color": INK, "fontweight": "bold", "textcoords": "offset points"}
                axes.annotate(mark.name, (mark.x[0], mark.y[0]), (dx, dy), **style)
                break
