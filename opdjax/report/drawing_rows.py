"""Drawings of rows, one for each name, and of lanes of time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from opdjax.report import drawing
from opdjax.runs.results import is_number

# Rows: one per name, with its mark and its number


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row: its name, its mark, and its number as `text`."""

    label: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    is_warning: bool = False  # a cross instead of a dot
    text: str = ""


Groups = Sequence[tuple[str, Sequence[Entry]]]  # a heading and its rows
_WIDTH, _ROW, _GAP, _BELOW = 520, 26, 14, 50


def rows_of(title: str, groups: Groups, x: str, limit: float | None = None) -> Markup:
    """A row for each entry: degrees from 0 to `limit`, or without it ratios from 1, logarithmic."""
    rows: list[str | Entry] = []
    for heading, entries in groups:
        rows += [heading, *entries] if entries else []
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
        drawing.linear_ticks(axes.xaxis, 4, unit="°")
        if limit is None:
            _ratio_scale(axes, every, width)
        else:
            axes.set_xlim(0, limit)
        beside = {"transform": axes.get_yaxis_transform(), "va": "center"}
        start, end = -left / width, 1 + right / width  # edges of the figure
        for y, row in zip(np.arange(len(rows)) + 0.5, rows):
            if isinstance(row, str):
                axes.text(start, y, row, **beside, color=drawing.MUTED, zorder=6, weight="bold")
                continue
            size = drawing.TEXT * min(1, (left - _GAP) / (len(row.label) * drawing.LETTER))
            colour = drawing.SLOTS[1] if row.is_warning else drawing.INK
            axes.text(start, y, row.label, **beside, fontsize=size, color=colour)
            axes.text(end, y, row.text, **beside, ha="right")
            if is_number(row.value):
                _mark(axes, row, y, origin=int(limit is None))

    size = (_WIDTH, 4 + _ROW * len(rows) + _BELOW)
    return drawing.figure(title, f"{title}: {x}", size, paint)


def _ratio_scale(axes: Any, every: Sequence[Entry], width: float) -> None:
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
    colour, value = drawing.SLOTS[1 if entry.is_warning else 0], max(entry.value, least)
    bar = {"height": 0.56, "color": colour, "alpha": 0.3, "linewidth": 0}
    axes.barh([y], [value - origin], left=origin, **bar, zorder=2.5)
    if is_number(entry.low) and is_number(entry.high):
        ends = [max(entry.low, least), entry.high]
        axes.plot(ends, [y, y], color=colour, linewidth=2.2, zorder=3)
    size, marker = (9.5, "X") if entry.is_warning else (8.5, "o")
    dot = {"color": colour, "marker": marker, "markersize": size, "markeredgewidth": 0}
    axes.plot([value], [y], **dot, zorder=5, clip_on=False)


# Lanes: what each process did, over time

Shares = Sequence[tuple[int, np.ndarray]]  # (slot, its share of each stretch of time)


def lanes(
    title: str, edges: np.ndarray, found: dict[str, Shares], cuts: Sequence[float] = ()
) -> Markup:
    """A lane for each process: the shares of each stretch between two `edges` (seconds), stacked,
    waiting on top. Dotted lines mark `cuts`.
    """
    width, names, below = 1120, 84, 44

    def paint(canvas: Any) -> None:
        axes = drawing.axes_in(canvas, (names, 10, 0, below), None, "seconds")
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(len(found) - 0.5, -0.5)
        for row, shares in enumerate(found.values()):
            floor = np.full(len(edges), row + 0.375)  # y points down
            for slot, share in sorted(shares, key=lambda each: each[0] == drawing.REST):
                top = np.maximum(floor - 0.75 * np.append(share, share[-1]), row - 0.375)
                style = {"color": drawing.SLOTS[slot], "linewidth": 0}
                axes.fill_between(edges, floor, top, step="post", **style)
                floor = top
        for cut in cuts:
            axes.axvline(cut, color=drawing.INK, linewidth=1.2, dashes=(1.5, 1.5), zorder=5)
        axes.set_yticks(range(len(found)), found, color=drawing.INK)
        drawing.linear_ticks(axes.xaxis, 10)

    described = f"{title}: lanes of {' and '.join(found)} over time"
    size = (width, len(found) * 62 + below)
    return drawing.figure(title, described, size, paint, is_wide=True)
