"""Charts of the time of learner and generator: one lane each, one bar per span."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opdjax.report.charts import (
    COLOURS,
    REST,
    bare_axes,
    box,
    colour_of,
    figure,
    label_below,
    picture,
    swatches,
    tick,
)
from opdjax.report.markup import Html, tag
from opdjax.report.measures import covered
from opdjax.runs.results import Span

Lanes = dict[str, Sequence[Span]]  # spans by process, on a clock that starts at 0

# The colour of each kind of span: grey for waiting, and one colour for all work of the teacher.
KINDS = {
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
_OTHER = 5  # the colour of other kinds
_MANY_SPANS = 600  # more spans are drawn as shares of time
_BINS = 240  # at most, for shares of time
_WIDTH, _LANE, _LANE_GAP, _AXIS = 1120, 46, 16, 44
_NAMES, _MARGIN = 84, 10  # pixels left and right of the lanes


def slot_of(kind: str) -> int:
    """The colour of a kind of span."""
    return KINDS.get(kind, _OTHER)


def in_order(kinds: set[str]) -> list[str]:
    """The kinds in the order of `KINDS`, then other kinds by name."""
    return [name for name in KINDS if name in kinds] + sorted(kinds - KINDS.keys())


def time_key(lanes: Lanes, words: dict[str, str]) -> Html:
    """The legend of `gantt` and `whole_run`; kinds of one colour share an entry."""
    by_slot: dict[int, list[str]] = {}
    for kind in in_order({span.what for spans in lanes.values() for span in spans}):
        by_slot.setdefault(slot_of(kind), []).append(words.get(kind, kind))
    return swatches([(" / ".join(names), box(slot)) for slot, names in by_slot.items()])


def gantt(
    title: str,
    lanes: Lanes,
    window: tuple[float, float],
    cuts: Sequence[float] = (),
    *,
    is_numbered: bool = True,
) -> Html:
    """Every span inside a window; wide spans show the number of their step."""
    start, end = window

    def fill(axes: Any, y: float, spans: Sequence[Span]) -> None:
        for span in spans:
            left, right = max(span.start, start) - start, min(span.end, end) - start
            if right <= left:
                continue
            slot = slot_of(span.what)
            bar = {"height": 0.4 if slot == REST else 1.0, "color": colour_of(slot), "linewidth": 0}
            axes.barh(y, right - left, left=left, **bar)
            pixels = (right - left) / (end - start) * (_WIDTH - _NAMES - _MARGIN)
            is_wide = pixels > 6 * len(str(span.step)) + 2
            if is_numbered and is_wide and span.what in ("generate", "update"):
                at = {"ha": "center", "va": "center", "color": COLOURS["page"], "fontsize": 9.5}
                axes.text((left + right) / 2, y, str(span.step), **at)

    return _lanes(title, lanes, end - start, fill, cuts)


def whole_run(title: str, lanes: Lanes, length: float, cuts: Sequence[float]) -> Html:
    """All spans; for very many, the share of time of each kind. Dotted lines mark `cuts`."""
    if sum(map(len, lanes.values())) <= _MANY_SPANS:
        return gantt(title, lanes, (0.0, length), cuts, is_numbered=False)
    # Bins of few steps would show where their edges fall, not how time was spent.
    num_steps = max(len({span.step for span in spans}) for spans in lanes.values())
    edges = np.linspace(0.0, length, min(_BINS, max(12, num_steps // 5)) + 1)

    def fill(axes: Any, y: float, spans: Sequence[Span]) -> None:
        floor = np.full(len(edges) - 1, y - 0.5)
        kinds = in_order({span.what for span in spans})
        for kind in sorted(kinds, key=lambda kind: slot_of(kind) == REST):
            share = busy_shares([span for span in spans if span.what == kind], edges)
            top = np.minimum(floor + share, y + 0.5)
            sides = (np.append(side, side[-1]) for side in (floor, top))
            style = {"step": "post", "color": colour_of(slot_of(kind)), "linewidth": 0}
            axes.fill_between(edges, *sides, **style)
            floor = top

    return _lanes(title, lanes, length, fill, cuts)


def busy_shares(spans: Sequence[Span], edges: np.ndarray) -> np.ndarray:
    """The share of each interval between two edges that the spans cover."""
    knots = np.array(covered(spans))
    spent = np.concatenate(([0.0], np.cumsum(knots[:, 1] - knots[:, 0])))
    at = np.interp(edges, knots.ravel(), np.repeat(spent, 2)[1:-1])
    return np.diff(at) / np.diff(edges)


def _lanes(
    title: str, lanes: Lanes, length: float, fill: Callable[..., None], cuts: Sequence[float]
) -> Html:
    rows = len(lanes)
    height = rows * (_LANE + _LANE_GAP) + _AXIS
    inner = height - _AXIS

    def paint(canvas: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        width = (_WIDTH - _NAMES - _MARGIN) / _WIDTH
        axes = bare_axes(canvas, (_NAMES / _WIDTH, _AXIS / height, width, inner / height), None)
        gap = _LANE_GAP / _LANE
        name = {"ha": "right", "va": "center", "color": COLOURS["ink"]}
        for number, (who, spans) in enumerate(lanes.items()):
            y = (1 + gap) * (rows - 1 - number)
            axes.text(-0.008, y, who, transform=axes.get_yaxis_transform(), **name)
            fill(axes, y, spans)
        for cut in cuts:
            axes.axvline(cut, color=COLOURS["ink"], linewidth=1.2, dashes=(1.5, 1.5), zorder=5)
        axes.set_ylim(-0.5 - gap / 2, (1 + gap) * (rows - 1) + 0.5 + gap / 2)
        axes.set_yticks([])
        axes.set_xlim(0.0, length)
        axes.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(tick)
        label_below(axes, "seconds", -25 / inner)

    described = f"{title}: spans of time of {' and '.join(lanes)}"
    drawing = picture(described, _WIDTH, height, paint, 13)
    scrolling = {"class_": "scroll", "tabindex": 0, "role": "group", "aria_label": title}
    return figure(title, tag("div", drawing, **scrolling), class_="wide")
