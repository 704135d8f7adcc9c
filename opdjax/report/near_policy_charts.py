"""Charts of rollouts that are drawn ahead of their update: what a filter keeps, and who was busy
when.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from opdjax.report.charts import COLOURS, REST, box, picture, swatches, tick
from opdjax.report.markup import Html, tag
from opdjax.report.measures import covered
from opdjax.runs.results import Span

Bounds = tuple[float | None, float | None]

ZONES = {"kept": 2, "degenerate": 1, "disconnected": 3}  # with their colours
# What a span of time was spent on, with its colour: who waits is grey, and the teacher's work has
# one colour wherever it is done.
WHATS = {
    "wait": REST,
    "admit": REST,
    "generate": 1,
    "annotate": 3,
    "teacher": 3,
    "store": 4,
    "filter": 2,
    "pack": 2,
    "update": 0,
    "publish": 5,
}
_OTHER = 5  # the colour of what is not named above
_MANY_SPANS, _BINS = (
    600,
    240,
)  # drawn one by one at most; stretches that a longer run is cut into at most
_WIDE, _LANE, _LANE_GAP, _AXIS = 1120, 46, 16, 44
_NAMES = 84  # pixels left of the lanes


# What a filter keeps


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Samples by a number of theirs: one edge more than counts."""

    edges: np.ndarray
    counts: np.ndarray

    def pieces(self, bounds: Bounds) -> Iterator[tuple[str, float, float, float]]:
        """(zone, left, right, height) of every bar, which a bound cuts in two."""
        low, high = (
            end if value is None else value for value, end in zip(bounds, (-np.inf, np.inf))
        )
        for left, right, height in zip(self.edges, self.edges[1:], self.counts):
            for zone, start, end in (
                ("degenerate", left, low),
                ("kept", max(left, low), min(right, high)),
                ("disconnected", high, right),
            ):
                start, end = max(left, start), min(right, end)
                if start < end and height > 0:
                    yield zone, float(start), float(end), float(height)


def pooled(histograms: Sequence[Histogram]) -> Histogram | None:
    """All of them as one; where their edges differ, the samples of a bar are spread evenly over its
    width.
    """
    found = [one for one in histograms if len(one.counts)]
    if not found:
        return None
    first = found[0].edges
    if all(np.array_equal(one.edges, first) for one in found):
        return Histogram(first, sum(one.counts for one in found))
    low, high = min(one.edges[0] for one in found), max(one.edges[-1] for one in found)
    edges = np.linspace(low, high, max(len(one.counts) for one in found) + 1)
    spread = [
        np.diff(np.interp(edges, one.edges, np.concatenate(([0], np.cumsum(one.counts)))))
        for one in found
    ]
    return Histogram(edges, sum(spread))


def deltas(title: str, histogram: Histogram, bounds: Bounds, x_range: tuple[float, float]) -> Html:
    """Samples by their Delta, coloured by zone, with the bounds as lines; those outside of
    `x_range` are named at its edges.
    """
    width, height = 380, 236

    def paint(figure: Any) -> None:
        axes = figure.add_axes((0.135, 0.19, 0.84, 0.7))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", linewidth=0.8)
        for zone, left, right, count in histogram.pieces(bounds):
            inset = 0.04 * (right - left)
            axes.bar(
                left + inset,
                count,
                width=right - left - 2 * inset,
                align="edge",
                color=COLOURS[f"series-{ZONES[zone]}"],
                linewidth=0,
            )
        axes.set_xlim(*x_range)
        for value, side in zip(bounds, ("right", "left")):
            if value is None:
                continue
            if x_range[0] <= value <= x_range[1]:
                axes.axvline(value, color=COLOURS["ink"], linewidth=1.2, dashes=(4, 3), zorder=4)
                put = {"ha": side, "va": "bottom", "color": COLOURS["ink"]}
                axes.text(
                    value, 1.0, f" {tick(value)} ", transform=axes.get_xaxis_transform(), **put
                )
            else:
                far, place = (0.0, "left") if value < x_range[0] else (1.0, "right")
                arrow = f"← bound {tick(value)}" if far == 0 else f"bound {tick(value)} →"
                axes.text(
                    far,
                    1.0,
                    arrow,
                    transform=axes.transAxes,
                    ha=place,
                    va="bottom",
                    color=COLOURS["ink"],
                )
        _finish(axes, "Δ = IFD of the teacher − IFD of the student", num_ticks=5)
        axes.yaxis.set_major_formatter(lambda value, _: tick(value))
        axes.text(-0.13, 1.055, "samples", transform=axes.transAxes, color=COLOURS["muted"])

    return tag(
        "figure",
        tag("h3", title),
        picture(f"{title}: samples by their Delta", width, height, paint),
    )


def zone_key(names: dict[str, str]) -> Html:
    """The legend of `deltas`."""
    return swatches([(f"{zone}: {meaning}", box(ZONES[zone])) for zone, meaning in names.items()])


# Who was busy when


Lanes = dict[str, Sequence[Span]]  # of whom, on a clock that starts at 0


def slot_of(what: str) -> int:
    """The colour of a kind of span."""
    return WHATS.get(what, _OTHER)


def time_key(lanes: Lanes, words: dict[str, str]) -> Html:
    """The legend of `gantt` and `whole_run`: kinds of one colour together."""
    present = {span.what for spans in lanes.values() for span in spans}
    by_slot: dict[int, list[str]] = {}
    for what in [name for name in WHATS if name in present] + sorted(present - WHATS.keys()):
        by_slot.setdefault(slot_of(what), []).append(words.get(what, what))
    return swatches([(" / ".join(names), box(slot)) for slot, names in by_slot.items()])


def gantt(
    title: str,
    lanes: Lanes,
    window: tuple[float, float],
    cuts: Sequence[float] = (),
    *,
    is_numbered: bool = True,
) -> Html:
    """The spans inside of a window, each as it was; the step that it was for may stand in those
    that are wide enough.
    """
    start, end = window

    def fill(axes: Any, y: float, spans: Sequence[Span]) -> None:
        for span in spans:
            left, right = max(span.start, start) - start, min(span.end, end) - start
            if right <= left:
                continue
            is_idle = slot_of(span.what) == REST
            axes.barh(
                y,
                right - left,
                left=left,
                height=0.4 if is_idle else 1.0,
                color=_colour(span.what),
                linewidth=0,
            )
            pixels = (right - left) / (end - start) * (_WIDE - _NAMES - 10)
            if (
                is_numbered
                and span.what in ("generate", "update")
                and pixels > 6 * len(str(span.step)) + 2
            ):
                at = {"ha": "center", "va": "center", "color": COLOURS["page"], "fontsize": 9.5}
                axes.text((left + right) / 2, y, str(span.step), **at)

    return _lanes(title, lanes, end - start, fill, cuts)


def whole_run(title: str, lanes: Lanes, length: float, cuts: Sequence[float]) -> Html:
    """All spans, with dotted lines where a pause was cut out; of very many, the share that each
    kind has of stretches of time.
    """
    if sum(map(len, lanes.values())) <= _MANY_SPANS:
        return gantt(title, lanes, (0.0, length), cuts, is_numbered=False)
    # Stretches of few steps would show where their edges fall, and not how time was spent.
    num_steps = max(len({span.step for span in spans}) for spans in lanes.values())
    edges = np.linspace(0.0, length, min(_BINS, max(12, num_steps // 5)) + 1)

    def fill(axes: Any, y: float, spans: Sequence[Span]) -> None:
        floor = np.full(len(edges) - 1, y - 0.5)
        kinds = {span.what for span in spans}
        for what in sorted(
            kinds, key=lambda name: (slot_of(name) == REST, [*WHATS, name].index(name))
        ):
            top = np.minimum(
                floor + busy_shares([span for span in spans if span.what == what], edges), y + 0.5
            )
            sides = (np.append(side, side[-1]) for side in (floor, top))
            axes.fill_between(edges, *sides, step="post", color=_colour(what), linewidth=0)
            floor = top

    return _lanes(title, lanes, length, fill, cuts)


def busy_shares(spans: Sequence[Span], edges: np.ndarray) -> np.ndarray:
    """Of each stretch between two edges the share that lies in any of the spans."""
    knots = np.array(covered(spans))
    spent = np.concatenate(([0.0], np.cumsum(knots[:, 1] - knots[:, 0])))
    at = np.interp(edges, knots.ravel(), np.repeat(spent, 2)[1:-1])
    return np.diff(at) / np.diff(edges)


def _colour(what: str) -> str:
    slot = slot_of(what)
    return COLOURS["rest" if slot == REST else f"series-{slot}"]


def _lanes(
    title: str, lanes: Lanes, length: float, fill: Callable[..., None], cuts: Sequence[float]
) -> Html:
    rows = len(lanes)
    height = rows * (_LANE + _LANE_GAP) + _AXIS

    def paint(figure: Any) -> None:
        axes = figure.add_axes(
            (_NAMES / _WIDE, _AXIS / height, (_WIDE - _NAMES - 10) / _WIDE, 1 - _AXIS / height)
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        scale = 1 + _LANE_GAP / _LANE
        for number, (who, spans) in enumerate(lanes.items()):
            y = scale * (rows - 1 - number)
            axes.text(
                -0.008,
                y,
                who,
                transform=axes.get_yaxis_transform(),
                ha="right",
                va="center",
                color=COLOURS["ink"],
                fontsize=13,
            )
            fill(axes, y, spans)
        for cut in cuts:
            axes.axvline(cut, color=COLOURS["ink"], linewidth=1.2, dashes=(1.5, 1.5), zorder=5)
        axes.set_ylim(
            -0.5 - 0.5 * _LANE_GAP / _LANE, scale * (rows - 1) + 0.5 + 0.5 * _LANE_GAP / _LANE
        )
        axes.set_yticks([])
        axes.set_xlim(0.0, length)
        _finish(axes, "seconds", num_ticks=10)

    drawn = tag(
        "div",
        picture(f"{title}: spans of time of {' and '.join(lanes)}", _WIDE, height, paint),
        class_="scroll",
        tabindex=0,
        role="group",
        aria_label=title,
    )
    return tag("figure", tag("h3", title), drawn, class_="wide")


def _finish(axes: Any, x_label: str, *, num_ticks: int) -> None:
    """The horizontal axis as other charts of the page have it."""
    from matplotlib.ticker import MaxNLocator

    axes.tick_params(length=0, pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(num_ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: tick(value))
    height = axes.figure.get_figheight() * 72 * axes.get_position().height
    axes.text(
        0.5,
        -25 / height,
        x_label,
        transform=axes.transAxes,
        color=COLOURS["muted"],
        ha="center",
        va="top",
    )
