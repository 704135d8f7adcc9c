"""Charts of the audit: a row a subject, its name beside what was measured, so that nothing has to
be looked up in a legend.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from opdjax.report.charts import COLOURS, box, picture, swatch, tick
from opdjax.report.markup import Html, tag
from opdjax.runs.results import is_number

_WIDTH, _ROW, _FONT = 560, 27, 14
_TOP, _BOTTOM = 4, 54
_GLYPH, _GAP = 7.2, 14  # width of a letter of a label, and what is left free beside it
# Recipes and pitfalls differ in colour, in marker and in the words of their group.
_SLOTS, _MARKERS = {False: 0, True: 1}, {False: "o", True: "X"}
PARTS = {"prompt": 3, "trajectory": 4, "action": 0}  # of the noise, with their colours
_HATCHES = {"prompt": "", "trajectory": "////", "action": ""}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A subject in a chart. `value` is an angle or a ratio; `note` is written in its place where
    there is none.
    """

    label: str
    is_pitfall: bool = False
    value: float | None = None
    low: float | None = None
    high: float | None = None
    parts: tuple[
        float, ...
    ] = ()  # sizes of the PARTS; `value` is then their sum, to which one below 0 counts too
    is_target: bool = False  # it says that it points here
    text: str = ""  # the number, written at the right edge
    note: str = ""


Groups = Sequence[tuple[str, Sequence[Entry]]]  # a heading ("" for none) and the rows under it


def angles(title: str, x_label: str, groups: Groups, *, widest: float, where: str) -> Html | None:
    """Degrees between an estimator's expected gradient and an exact one; a ring at 0 marks what it
    says that it is.
    """

    def paint(axes: Any) -> None:
        axes.set_xlim(-0.05 * widest, 1.05 * widest)
        axes.set_xticks(
            [
                degrees
                for degrees in range(0, 181, 30 if widest > 60 else 15)
                if degrees <= 1.05 * widest
            ]
        )
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}°")

    def mark(axes: Any, y: float, entry: Entry) -> None:
        colour = _colour(entry)
        if entry.is_target:
            axes.plot(
                [0],
                [y],
                marker="o",
                markersize=17,
                color="none",
                markeredgecolor=COLOURS["ink"],
                markeredgewidth=1.4,
                zorder=4,
            )
        axes.plot([0, entry.value], [y, y], color=colour, linewidth=1.8, zorder=2.5)
        axes.plot([entry.value], [y], **_marker(entry), zorder=5)

    return _figure(title, x_label, groups, paint, mark, where)


def ratios(title: str, x_label: str, groups: Groups) -> Html | None:
    """Ratios on a logarithmic scale, as bars from 1: to the left less, to the right more."""
    entries = [entry for _, rows in groups for entry in rows]
    ends = [
        end
        for entry in entries
        for end in (entry.value, entry.low, entry.high)
        if is_number(end) and end > 0
    ]
    low, high = min([*ends, 0.8]) / 1.1, max([*ends, 1.25]) * 1.1

    def paint(axes: Any) -> None:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_xticks(_log_ticks(low, high))
        axes.xaxis.set_major_formatter(lambda value, _: f"{tick(value)}×")
        axes.axvline(1, color=COLOURS["ink"], linewidth=1.2, zorder=2)

    def mark(axes: Any, y: float, entry: Entry) -> None:
        value = max(entry.value, low)
        axes.barh(
            [y],
            [value - 1],
            left=1,
            height=0.56,
            color=_colour(entry),
            alpha=0.3,
            linewidth=0,
            zorder=2.5,
        )
        if is_number(entry.low) and is_number(entry.high):
            axes.plot(
                [max(entry.low, low), entry.high],
                [y, y],
                color=_colour(entry),
                linewidth=2.2,
                zorder=3,
            )
        axes.plot([value], [y], **_marker(entry), zorder=4)

    return _figure(title, x_label, groups, paint, mark)


def stacks(title: str, x_label: str, groups: Groups, *, limit: float, unit: str) -> Html | None:
    """The PARTS of a sum, end to end; what goes beyond `limit` is cut, and an arrow says so."""

    def paint(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.set_xlim(0, limit)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(lambda value, _: f"{tick(value)}{unit}")
        if unit:
            axes.axvline(1, color=COLOURS["ink"], linewidth=1.2, dashes=(4, 3), zorder=2)

    def mark(axes: Any, y: float, entry: Entry) -> None:
        start = 0.0
        for (part, slot), size in zip(PARTS.items(), entry.parts):
            colour = COLOURS[f"series-{slot}"]
            solid = (
                {"facecolor": colour, "linewidth": 0}
                if not _HATCHES[part]
                else {"facecolor": "none", "linewidth": 0.8}
            )
            axes.barh(
                [y],
                [size],
                left=start,
                height=0.62,
                edgecolor=colour,
                hatch=_HATCHES[part],
                **solid,
                zorder=3,
            )
            start += size
        if is_number(entry.value) and 0 <= entry.value <= limit:
            axes.plot(
                [entry.value, entry.value],
                [y - 0.44, y + 0.44],
                color=COLOURS["ink"],
                linewidth=2.6,
                zorder=5,
            )
        if start > limit:
            axes.plot(
                [limit],
                [y],
                marker=">",
                markersize=9,
                color=COLOURS["ink"],
                clip_on=False,
                zorder=5,
            )

    return _figure(title, x_label, groups, paint, mark)


def _figure(
    title: str, x_label: str, groups: Groups, paint: Callable, mark: Callable, where: str = ""
) -> Html | None:
    entries = [entry for _, rows in groups for entry in rows]
    if not entries:
        return None
    lines = len(entries) + sum(1.15 for heading, _ in groups if heading)
    height = _TOP + _ROW * lines + _BOTTOM
    labels = min(
        max([len(entry.label) for entry in entries], default=0) * _GLYPH + _GAP, 0.48 * _WIDTH
    )
    texts = max([len(entry.text) for entry in entries], default=0) * _GLYPH
    right = _WIDTH - (texts + _GAP if texts else _GAP)

    def draw(figure: Any) -> None:
        axes = figure.add_axes(
            (labels / _WIDTH, _BOTTOM / height, (right - labels) / _WIDTH, _ROW * lines / height)
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_ylim(lines, 0)
        axes.set_yticks([])
        axes.set_axisbelow(True)
        axes.grid(axis="x", linewidth=0.8)
        paint(axes)
        axes.minorticks_off()
        axes.tick_params(length=0, pad=6, labelsize=_FONT)
        beside = axes.get_yaxis_transform()  # x in widths of the panel, y in rows
        at = lambda x: (x - labels) / (right - labels)
        axes.text(
            at(labels),
            lines + 1.6,
            x_label,
            color=COLOURS["muted"],
            fontsize=_FONT,
            va="center",
            transform=beside,
            clip_on=False,
        )
        y = 0.0
        for heading, rows in groups:
            if heading:
                style = {
                    "color": COLOURS["muted"],
                    "fontsize": _FONT,
                    "fontweight": "bold",
                    "va": "center",
                }
                axes.text(at(0), y + 0.72, heading, **style, transform=beside, zorder=6)
                y += 1.15
            for entry in rows:
                style = {
                    "fontsize": min(
                        _FONT, _FONT * (labels - _GAP) / (len(entry.label) * _GLYPH or 1)
                    ),
                    "va": "center",
                }
                axes.text(
                    at(0),
                    y + 0.5,
                    entry.label,
                    color=_colour(entry) if entry.is_pitfall else COLOURS["ink"],
                    **style,
                    transform=beside,
                )
                if entry.text:
                    axes.text(
                        at(_WIDTH),
                        y + 0.5,
                        entry.text,
                        ha="right",
                        va="center",
                        fontsize=_FONT,
                        transform=beside,
                    )
                if entry.note:
                    axes.axhspan(y, y + 1, color=COLOURS["grid"], linewidth=0, zorder=1)
                    note = {
                        "color": COLOURS["muted"],
                        "fontsize": _FONT - 0.5,
                        "ha": "center",
                        "va": "center",
                    }
                    axes.text(0.5, y + 0.5, entry.note, **note, transform=beside, zorder=6)
                elif is_number(entry.value) or entry.parts:
                    mark(axes, y + 0.5, entry)
                y += 1

    return tag(
        "figure",
        tag("h3", title),
        picture(", ".join(filter(None, (f"{title}: {x_label}", where))), _WIDTH, height, draw),
    )


def _colour(entry: Entry) -> str:
    return COLOURS[f"series-{_SLOTS[entry.is_pitfall]}"]


def _marker(entry: Entry) -> dict[str, Any]:
    return {
        "marker": _MARKERS[entry.is_pitfall],
        "markersize": 9.5 if entry.is_pitfall else 8.5,
        "color": _colour(entry),
        "markeredgewidth": 0,
    }


def _log_ticks(low: float, high: float) -> list[float]:
    """Few round numbers, 1 among them."""
    for steps in ((1, 1.2, 1.5, 2, 3, 5, 8), (1, 2, 5), (1, 3), (1,)):
        found = [
            round(m * 10.0**e, 12)
            for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for m in steps
        ]
        found = [value for value in found if low <= value <= high]
        if len(found) <= 6:
            break
    return found


# Shares of a whole


@dataclasses.dataclass(frozen=True)
class Share:
    """One kind of share in every bin."""

    name: str
    values: Sequence[float | None]
    slot: int
    hatch: str = ""


def shares(title: str, x_label: str, categories: Sequence[str], kinds: Sequence[Share]) -> Html:
    """Bars side by side in every bin; the shares of one kind add up to 100 %."""
    height = 342

    def draw(figure: Any) -> None:
        axes = figure.add_axes((0.1, 0.2, 0.89, 0.75))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", linewidth=0.8)
        width = 0.84 / len(kinds)
        for number, kind in enumerate(kinds):
            colour = COLOURS[f"series-{kind.slot}"]
            solid = (
                {"facecolor": colour, "linewidth": 0}
                if not kind.hatch
                else {"facecolor": "none", "linewidth": 0.8, "hatch": kind.hatch}
            )
            x = [at + width * (number - (len(kinds) - 1) / 2) for at in range(len(categories))]
            heights = [100 * value if is_number(value) else 0.0 for value in kind.values]
            axes.bar(x, heights, width=0.9 * width, edgecolor=colour, **solid, zorder=3)
        axes.set_xticks(range(len(categories)), categories)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axes.tick_params(length=0, pad=6, labelsize=_FONT + 1)
        axes.set_xlim(-0.55, len(categories) - 0.45)
        axes.text(
            0.5,
            -0.17,
            x_label,
            transform=axes.transAxes,
            color=COLOURS["muted"],
            fontsize=_FONT + 1,
            ha="center",
            va="center",
        )

    return tag(
        "figure",
        tag("h3", title),
        picture(f"{title}: share against {x_label}", _WIDTH, height, draw),
    )


# Legends: HTML, which wraps on a narrow screen


def part_box(part: str) -> Html:
    """The mark of one of the PARTS."""
    return box(PARTS[part], _HATCHES[part])


def bar() -> Html:
    """The mark of a sum."""
    return swatch(tag("line", x1=14, y1=0, x2=14, y2=12, stroke="var(--ink)"), colour="var(--ink)")


def dot(*, is_pitfall: bool) -> Html:
    """The mark of a recipe or a pitfall."""
    colour = f"var(--series-{_SLOTS[is_pitfall]})"
    if not is_pitfall:
        return swatch(tag("circle", cx=14, cy=6, r=5, fill=colour), colour=colour)
    cross = {"stroke_width": 4, "stroke": colour}
    return swatch(
        tag("line", x1=10, y1=2, x2=18, y2=10, **cross),
        tag("line", x1=10, y1=10, x2=18, y2=2, **cross),
        colour=colour,
    )


def ring() -> Html:
    """The mark of what an estimator says that it is."""
    return swatch(
        tag("circle", cx=14, cy=6, r=5.2, fill="none", stroke="var(--ink)", stroke_width=1.4),
        colour="var(--ink)",
    )
