"""Drawings of rows, one for each name, and of lanes of time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from markupsafe import Markup

from opdjax.report import drawing
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
Kind = Literal["angle", "ratio", "stack"]
PARTS = (3, 4, 0)  # slots of the parts of a stack; the second is pale
_WIDTH, _ROW, _GAP, _BELOW = 520, 26, 14, 50


def rows_of(
    title: str,
    groups: Groups,
    x: str,
    kind: Kind,
    *,
    limit: float = 0.0,
    unit: str = "",
    where: str = "",
) -> Markup:
    """A row for each entry: degrees from 0, ratios from 1 on a logarithmic axis, or stacked parts.

    `limit`: the largest angle, or where stacks are cut, with an arrow. `where` joins the
    description of the drawing.
    """
    rows: list[str | Entry] = []
    for heading, entries in groups:
        rows += [heading] if heading and entries else []
        rows += entries
    every = [row for row in rows if isinstance(row, Entry)]
    if not every:
        return drawing.NOTHING
    left = min(max(len(entry.label) for entry in every) * drawing.LETTER + _GAP, 0.48 * _WIDTH)
    right = max(len(entry.text) for entry in every) * drawing.LETTER + _GAP
    width = _WIDTH - left - right

    def paint(canvas: Any) -> None:
        axes = drawing.axes_in(canvas, (left, right, 4, _BELOW), "x", x)
        axes.set_ylim(len(rows), 0)
        axes.set_yticks([])
        _scale(axes, kind, every, limit, unit, width)
        beside = {"transform": axes.get_yaxis_transform(), "va": "center"}
        muted = {"color": drawing.MUTED, "zorder": 6}
        start, end = -left / width, 1 + right / width  # edges of the figure
        for y, row in zip(np.arange(len(rows)) + 0.5, rows):
            if isinstance(row, str):
                axes.text(start, y, row, **beside, **muted, fontweight="bold")
                continue
            size = drawing.TEXT * min(1, (left - _GAP) / (len(row.label) * drawing.LETTER))
            colour = drawing.colour_of(1) if row.is_warning else drawing.INK
            axes.text(start, y, row.label, **beside, fontsize=size, color=colour)
            axes.text(end, y, row.text, **beside, ha="right")
            if row.note:
                axes.axhspan(y - 0.5, y + 0.5, color=drawing.GRID, linewidth=0, zorder=1)
                axes.text(0.5, y, row.note, **beside, **muted, ha="center")
            elif kind == "stack":
                _stack(axes, row, y, limit)
            elif is_number(row.value):
                _mark(axes, row, y, origin=int(kind == "ratio"))

    described = ", ".join(filter(None, (f"{title}: {x}", where)))
    return drawing.figure(title, described, (_WIDTH, 4 + _ROW * len(rows) + _BELOW), paint)


def _scale(
    axes: Any, kind: Kind, every: Sequence[Entry], limit: float, unit: str, width: float
) -> None:
    """The limits and ticks of x."""
    if kind == "angle":
        axes.set_xlim(-0.05 * limit, 1.05 * limit)
        drawing.linear_ticks(axes.xaxis, unit="°")
        axes.set_xticks(range(0, int(1.05 * limit) + 1, 30 if limit < 150 else 45))
    elif kind == "stack":
        axes.set_xlim(0, limit)
        drawing.linear_ticks(axes.xaxis, 4, unit)
        if unit:
            axes.axvline(1, color=drawing.INK, linewidth=1.2, dashes=(4, 3), zorder=2)
    else:
        values = drawing.finite(value for e in every for value in (e.value, e.low, e.high))
        ends = [value for value in values if value > 0]
        low, high = min([*ends, 0.8]) / 1.1, max([*ends, 1.25]) * 1.1
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        drawing.linear_ticks(axes.xaxis, unit="×")
        axes.set_xticks(drawing.log_ticks(low, high, width))
        axes.minorticks_off()
        axes.axvline(1, color=drawing.INK, linewidth=1.2, zorder=2)


def _mark(axes: Any, entry: Entry, y: float, origin: int) -> None:
    """A pale bar from the origin to a dot, or a cross, and the interval."""
    least = axes.get_xlim()[0]
    colour, value = drawing.colour_of(1 if entry.is_warning else 0), max(entry.value, least)
    if entry.is_target:
        ring = {"marker": "o", "markersize": 17, "color": "none", "markeredgewidth": 1.4}
        axes.plot([0], [y], **ring, markeredgecolor=drawing.INK, zorder=4)
    bar = {"height": 0.56, "color": colour, "alpha": 0.3, "linewidth": 0}
    axes.barh([y], [value - origin], left=origin, **bar, zorder=2.5)
    if is_number(entry.low) and is_number(entry.high):
        ends = [max(entry.low, least), entry.high]
        axes.plot(ends, [y, y], color=colour, linewidth=2.2, zorder=3)
    size, marker = (9.5, "X") if entry.is_warning else (8.5, "o")
    dot = {"color": colour, "marker": marker, "markersize": size, "markeredgewidth": 0}
    axes.plot([value], [y], **dot, zorder=5)


def _stack(axes: Any, entry: Entry, y: float, limit: float) -> None:
    start = 0.0
    for slot, size in zip(PARTS, entry.parts):
        style = {"color": drawing.colour_of(slot), "alpha": 0.35 if slot == PARTS[1] else 1.0}
        axes.barh([y], [size], left=start, height=0.62, linewidth=0, zorder=3, **style)
        start += size
    if is_number(entry.value) and 0 <= entry.value <= limit:
        at = [entry.value, entry.value]
        axes.plot(at, [y - 0.44, y + 0.44], color=drawing.INK, linewidth=2.6, zorder=5)
    if start > limit:
        arrow = {"marker": ">", "markersize": 9, "color": drawing.INK, "clip_on": False}
        axes.plot([limit], [y], **arrow, zorder=5)


# Lanes: what each process did, over time


@dataclasses.dataclass(frozen=True)
class Bar:
    """A period of a lane: REST periods are thin. `text` is written inside where it fits."""

    start: float
    end: float
    slot: int
    text: str = ""


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
    width, names, below = 1120, 84, 44

    def paint(canvas: Any) -> None:
        axes = drawing.axes_in(canvas, (names, 10, 0, below), None, "seconds")
        axes.set_xlim(0.0, length)
        axes.set_ylim(len(found) - 0.5, -0.5)
        for row, (who, each) in enumerate(found.items()):
            if shares is None:
                _paint_bars(axes, row, each, (width - names - 10) / length)
            else:
                _paint_shares(axes, row, shares[who], length)
        for cut in cuts:
            axes.axvline(cut, color=drawing.INK, linewidth=1.2, dashes=(1.5, 1.5), zorder=5)
        axes.set_yticks(range(len(found)), found, color=drawing.INK)
        drawing.linear_ticks(axes.xaxis, 10)

    described = f"{title}: lanes of {' and '.join(found)} over time"
    size = (width, len(found) * 62 + below)
    return drawing.figure(title, described, size, paint, is_wide=True)


def _paint_bars(axes: Any, y: float, found: Sequence[Bar], pixels: float) -> None:
    for bar in found:
        height = 0.3 if bar.slot == drawing.REST else 0.75
        style = {"height": height, "color": drawing.colour_of(bar.slot), "linewidth": 0}
        axes.barh(y, bar.end - bar.start, left=bar.start, **style)
        if bar.text and (bar.end - bar.start) * pixels > 6 * len(bar.text) + 2:
            at = {"ha": "center", "va": "center", "color": drawing.PAGE, "fontsize": 9.5}
            axes.text((bar.start + bar.end) / 2, y, bar.text, **at)


def _paint_shares(axes: Any, y: float, found: Sequence[tuple[int, Any]], length: float) -> None:
    at_rest_last = sorted(found, key=lambda each: each[0] == drawing.REST)
    heights = np.minimum(np.cumsum([share for _, share in at_rest_last], axis=0), 1.0)
    edges = np.linspace(0.0, length, heights.shape[1] + 1)
    floor = y + 0.375  # y points down
    for (slot, _), height in zip(at_rest_last, heights):
        top = y + 0.375 - 0.75 * np.append(height, height[-1:])
        style = {"color": drawing.colour_of(slot), "linewidth": 0}
        axes.fill_between(edges, floor, top, step="post", **style)
        floor = top
