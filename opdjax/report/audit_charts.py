"""Charts of the audit: one row per estimator, with its name and number beside the mark."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from opdjax.report.charts import (
    COLOURS,
    bare_axes,
    box,
    colour_of,
    figure,
    label_below,
    picture,
    swatch,
    tick,
)
from opdjax.report.markup import Html, tag
from opdjax.runs.results import is_number

_WIDTH, _ROW, _FONT = 560, 27, 14
_TOP, _BOTTOM = 4, 54
_LETTER, _GAP = 7.2, 14  # width of a letter of a label, and the space beside it
_HEADING = 1.15  # height of a heading, in rows
# Colour and marker of recipes and of pitfalls.
_SLOTS, _MARKERS = {False: 0, True: 1}, {False: "o", True: "X"}
PARTS = {"prompt": 3, "trajectory": 4, "action": 0}  # of the noise, with their colours
_HATCHES = {"trajectory": "////"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of a chart. `value` is an angle or a ratio; without a value, `note` is written."""

    label: str
    is_pitfall: bool = False
    value: float | None = None
    low: float | None = None
    high: float | None = None
    # Sizes of the PARTS. `value` is then their sum, in which a negative part counts as negative.
    parts: tuple[float, ...] = ()
    is_target: bool = False  # it claims to point here
    text: str = ""  # the number, written at the right edge
    note: str = ""

    @property
    def colour(self) -> str:
        """The colour of its mark."""
        return colour_of(_SLOTS[self.is_pitfall])


Groups = Sequence[tuple[str, Sequence[Entry]]]  # a heading ("" for none) and its rows
Mark = Callable[[Any, float, Entry], None]  # draws an entry on axes at a height


def _dot(axes: Any, x: float, y: float, entry: Entry, zorder: float) -> None:
    size = 9.5 if entry.is_pitfall else 8.5
    style = {"color": entry.colour, "marker": _MARKERS[entry.is_pitfall], "markeredgewidth": 0}
    axes.plot([x], [y], **style, markersize=size, zorder=zorder)


def angles(title: str, x_label: str, groups: Groups, *, widest: float, where: str) -> Html | None:
    """Degrees between expected and exact gradients; a ring marks what an estimator claims."""

    def frame(axes: Any) -> None:
        axes.set_xlim(-0.05 * widest, 1.05 * widest)
        room = axes.get_position().width * _WIDTH / (5 * _LETTER)  # labels that fit side by side
        every = next(step for step in (15, 30, 45, 90) if widest <= step * room or step == 90)
        axes.set_xticks(range(0, math.floor(1.05 * widest) + 1, every))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}°")

    def mark(axes: Any, y: float, entry: Entry) -> None:
        if entry.is_target:
            ring = {"marker": "o", "markersize": 17, "color": "none", "markeredgewidth": 1.4}
            axes.plot([0], [y], **ring, markeredgecolor=COLOURS["ink"], zorder=4)
        axes.plot([0, entry.value], [y, y], color=entry.colour, linewidth=1.8, zorder=2.5)
        _dot(axes, entry.value, y, entry, 5)

    return _figure(title, x_label, groups, frame, mark, where)


def ratios(title: str, x_label: str, groups: Groups) -> Html | None:
    """Ratios on a logarithmic scale, as bars from 1."""
    entries = [entry for _, rows in groups for entry in rows]
    values = [value for entry in entries for value in (entry.value, entry.low, entry.high)]
    ends = [value for value in values if is_number(value) and value > 0]
    low, high = min([*ends, 0.8]) / 1.1, max([*ends, 1.25]) * 1.1

    def frame(axes: Any) -> None:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_xticks(_log_ticks(low, high, axes.get_position().width * _WIDTH))
        axes.xaxis.set_major_formatter(lambda value, _: f"{tick(value)}×")
        axes.axvline(1, color=COLOURS["ink"], linewidth=1.2, zorder=2)

    def mark(axes: Any, y: float, entry: Entry) -> None:
        value = max(entry.value, low)
        bar = {"height": 0.56, "color": entry.colour, "alpha": 0.3, "linewidth": 0}
        axes.barh([y], [value - 1], left=1, **bar, zorder=2.5)
        if is_number(entry.low) and is_number(entry.high):
            x = [max(entry.low, low), entry.high]
            axes.plot(x, [y, y], color=entry.colour, linewidth=2.2, zorder=3)
        _dot(axes, value, y, entry, 4)

    return _figure(title, x_label, groups, frame, mark)


def stacks(title: str, x_label: str, groups: Groups, *, limit: float, unit: str) -> Html | None:
    """The PARTS of a sum, end to end; an arrow marks a sum beyond `limit`, which is cut."""
    ink = COLOURS["ink"]

    def frame(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.set_xlim(0, limit)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(lambda value, _: f"{tick(value)}{unit}")
        if unit:
            axes.axvline(1, color=ink, linewidth=1.2, dashes=(4, 3), zorder=2)

    def mark(axes: Any, y: float, entry: Entry) -> None:
        start = 0.0
        for (part, slot), size in zip(PARTS.items(), entry.parts):
            fill = _fill(slot, _HATCHES.get(part, ""))
            axes.barh([y], [size], left=start, height=0.62, **fill, zorder=3)
            start += size
        if is_number(entry.value) and 0 <= entry.value <= limit:
            at = [entry.value, entry.value]
            axes.plot(at, [y - 0.44, y + 0.44], color=ink, linewidth=2.6, zorder=5)
        if start > limit:
            arrow = {"marker": ">", "markersize": 9, "color": ink, "clip_on": False}
            axes.plot([limit], [y], **arrow, zorder=5)

    return _figure(title, x_label, groups, frame, mark)


def _fill(slot: int, hatch: str) -> dict[str, Any]:
    """The style of a bar."""
    colour = colour_of(slot)
    if not hatch:
        return {"edgecolor": colour, "facecolor": colour, "linewidth": 0}
    return {"edgecolor": colour, "facecolor": "none", "linewidth": 0.8, "hatch": hatch}


def _figure(
    title: str, x_label: str, groups: Groups, frame: Callable, mark: Mark, where: str = ""
) -> Html | None:
    """The chart of the groups. `frame` sets up the axes, `mark` draws one entry."""
    entries = [entry for _, rows in groups for entry in rows]
    if not entries:
        return None
    rows = len(entries) + sum(_HEADING for heading, _ in groups if heading)
    height = _TOP + _ROW * rows + _BOTTOM
    left = min(max(len(entry.label) for entry in entries) * _LETTER + _GAP, 0.48 * _WIDTH)
    texts = max(len(entry.text) for entry in entries) * _LETTER
    width = _WIDTH - left - (texts + _GAP if texts else _GAP)

    def paint(canvas: Any) -> None:
        place = (left / _WIDTH, _BOTTOM / height, width / _WIDTH, _ROW * rows / height)
        axes = bare_axes(canvas, place, "x")
        axes.set_ylim(rows, 0)
        axes.set_yticks([])
        frame(axes)
        axes.minorticks_off()
        axes.tick_params(pad=6, labelsize=_FONT)
        beside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": _FONT}
        muted = {"color": COLOURS["muted"], "zorder": 6}
        axes.text(0, rows + 1.6, x_label, **beside, **muted, clip_on=False)
        start, end = -left / width, (_WIDTH - left) / width  # edges of the figure
        y = 0.0
        for heading, found in groups:
            if heading:
                axes.text(start, y + 0.72, heading, **beside, **muted, fontweight="bold")
                y += _HEADING
            for entry in found:
                colour = entry.colour if entry.is_pitfall else COLOURS["ink"]
                size = min(_FONT, _FONT * (left - _GAP) / (len(entry.label) * _LETTER or 1))
                label = beside | {"fontsize": size, "color": colour}
                axes.text(start, y + 0.5, entry.label, **label)
                axes.text(end, y + 0.5, entry.text, **beside, ha="right")
                if entry.note:
                    axes.axhspan(y, y + 1, color=COLOURS["grid"], linewidth=0, zorder=1)
                    axes.text(0.5, y + 0.5, entry.note, **beside, **muted, ha="center")
                elif is_number(entry.value) or entry.parts:
                    mark(axes, y + 0.5, entry)
                y += 1

    described = ", ".join(filter(None, (f"{title}: {x_label}", where)))
    return figure(title, picture(described, _WIDTH, height, paint, _FONT))


def _log_ticks(low: float, high: float, width: float) -> list[float]:
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
        room = [_LETTER * (len(tick(value)) + 2) for value in found]
        gaps = (right - left for left, right in itertools.pairwise(at))
        needed = ((one + two) / 2 for one, two in itertools.pairwise(room))
        if len(found) <= 6 and all(gap >= least for gap, least in zip(gaps, needed)):
            break
    return found


# Shares of a whole


@dataclasses.dataclass(frozen=True)
class Share:
    """One kind of share, a value per bin."""

    name: str
    values: Sequence[float | None]
    slot: int
    hatch: str = ""


def shares(title: str, x_label: str, categories: Sequence[str], kinds: Sequence[Share]) -> Html:
    """Bars side by side in every bin; the shares of one kind add up to 100 %."""

    def paint(canvas: Any) -> None:
        axes = bare_axes(canvas, (0.1, 0.2, 0.89, 0.75), "y")
        width = 0.84 / len(kinds)
        for number, kind in enumerate(kinds):
            shift = width * (number - (len(kinds) - 1) / 2)
            x = [at + shift for at in range(len(categories))]
            heights = [100 * value if is_number(value) else 0.0 for value in kind.values]
            axes.bar(x, heights, width=0.9 * width, **_fill(kind.slot, kind.hatch), zorder=3)
        axes.set_xticks(range(len(categories)), categories)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axes.tick_params(pad=6, labelsize=_FONT)
        axes.set_xlim(-0.55, len(categories) - 0.45)
        label_below(axes, x_label, -0.14)

    drawing = picture(f"{title}: share against {x_label}", _WIDTH, 342, paint, _FONT)
    return figure(title, drawing)


# Legends


def part_box(part: str) -> Html:
    """The mark of one of the PARTS."""
    return box(PARTS[part], _HATCHES.get(part, ""))


def bar() -> Html:
    """The mark of a sum."""
    return swatch(tag("line", x1=14, y1=0, x2=14, y2=12, stroke="var(--ink)"), colour="var(--ink)")


def dot(*, is_pitfall: bool) -> Html:
    """The mark of a recipe or a pitfall."""
    colour = f"var(--series-{_SLOTS[is_pitfall]})"
    if not is_pitfall:
        return swatch(tag("circle", cx=14, cy=6, r=5, fill=colour), colour=colour)
    cross = {"x1": 10, "x2": 18, "stroke_width": 4, "stroke": colour}
    strokes = [tag("line", y1=start, y2=end, **cross) for start, end in ((2, 10), (10, 2))]
    return swatch(*strokes, colour=colour)


def ring() -> Html:
    """The mark of the direction that an estimator claims."""
    ink = "var(--ink)"
    style = {"fill": "none", "stroke": ink, "stroke_width": 1.4}
    return swatch(tag("circle", cx=14, cy=6, r=5.2, **style), colour=ink)
