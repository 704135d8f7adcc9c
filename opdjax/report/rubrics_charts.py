"""Charts and tables of judged rollouts: curves by step, scores of right and of wrong answers, which
answer meets which criterion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opdjax.report import measures
from opdjax.report.charts import (
    COLOURS,
    Chart,
    ChartLine,
    box,
    curve,
    draw,
    picture,
    swatches,
    tick,
)
from opdjax.report.judgements import JudgedGroup, Steps, auc
from opdjax.report.markup import Html, table, tag
from opdjax.report.rollouts import percent
from opdjax.runs.results import is_number

RIGHT, WRONG = 2, 1  # colours
BINS = 10  # of a score from 0 to 1
_AUC_BINS, _AUC_GROUPS = 12, 24  # stretches of steps at most; groups that each should have at least
_TEXT = 4000  # letters of an answer that are shown
_MARKS = {1.0: ("✓", "met"), 0.0: ("✗", "unmet")}


# By step


def smoothed(num_steps: int) -> str:
    """What the lines of a chart over so many steps are."""
    window = measures.smoothing_window(num_steps)
    return f" Pale: every step; strong: mean over {window} steps." if window > 1 else ""


def over_steps(
    chart: Chart, steps: Steps, parts: Sequence[tuple[int, Callable[[list[JudgedGroup]], Any]]]
) -> Html | None:
    """The chart of what each part, (colour, measure of a step's groups), says of every step; None
    where none says anything.
    """
    order, window = list(steps), measures.smoothing_window(len(steps))
    found = [
        (slot, [_plain(measure(groups)) for groups in steps.values()]) for slot, measure in parts
    ]
    lines = [
        line
        for slot, values in found
        if any(map(is_number, values))
        for line in curve(order, values, window, slot=slot)
    ]
    return draw(chart, lines) if lines else None


def _plain(value: Any) -> float | None:
    """A number, a rate's number, or None."""
    value = getattr(value, "value", value)
    return float(value) if is_number(value) else None


def from_columns(
    chart: Chart, order: Sequence[int], columns: Sequence[tuple[int, Sequence[float | None]]]
) -> Html | None:
    """The chart of metrics, (colour, one value a step); None where all are empty."""
    window = measures.smoothing_window(len(order))
    lines = [
        line
        for slot, values in columns
        if any(map(is_number, values))
        for line in curve(order, values, window, slot=slot)
    ]
    return draw(chart, lines) if lines else None


def auc_chart(steps: Steps) -> Html | None:
    """The AUC of stretches of steps with its interval; None where no stretch has right and wrong
    answers.
    """
    order, groups = list(steps), sum(map(len, steps.values()))
    size = max(1, min(_AUC_BINS, len(order), groups // _AUC_GROUPS))
    stretches = [part.tolist() for part in np.array_split(np.array(order), size)]
    found = [(part, auc(group for step in part for group in steps[step])) for part in stretches]
    known = [(sum(part) / len(part), rate) for part, rate in found if rate is not None]
    if not known:
        return None
    x, rates = zip(*known)
    ends = [(max(0.0, r.value - r.half_width), min(1.0, r.value + r.half_width)) for r in rates]
    low, high = zip(
        *(
            (a, b) if is_number(r.half_width) else (math.nan, math.nan)
            for r, (a, b) in zip(rates, ends)
        )
    )
    line = ChartLine(x, [r.value for r in rates], low, high, slot=0, has_markers=True, bars=True)
    width = max(map(len, stretches))
    about = (
        f"The chance that a right answer scores above a wrong one (a tie counts half), over all rollouts of {width:,} steps at a time. 1: "
        "the judge always prefers what is right; dashed, 0.5: no better than a coin. Bars: 95 % intervals."
    )
    floor = min([0.4, *(end - 0.02 for end in low if is_number(end))])
    chart = Chart(
        "Telling right from wrong (AUC)", "step", "AUC", about, reference=0.5, y_range=(floor, 1.02)
    )
    return draw(chart, [line])


# Scores by truth


def shares_by_score(scores: np.ndarray) -> np.ndarray:
    """`[BINS]`: share of the scores in each tenth of 0 to 1; 1 itself belongs to the last."""
    counts = np.bincount(bins_of(scores), minlength=BINS)
    return counts / max(scores.size, 1)


def bins_of(scores: np.ndarray) -> np.ndarray:
    """The tenth that each score lies in; a score that is 0.3 but for rounding is in that which
    begins there.
    """
    return np.clip(np.floor(scores * BINS + 1e-6), 0, BINS - 1).astype(int)


def truth_histogram(right: np.ndarray, wrong: np.ndarray) -> Html:
    """Scores of right and of wrong answers side by side, each as shares of its own kind."""
    title = "Scores of right and wrong answers"

    def paint(figure: Any) -> None:
        axes = figure.add_axes((0.135, 0.19, 0.84, 0.7))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", linewidth=0.8)
        at = np.arange(BINS) / BINS
        for scores, slot, left in ((right, RIGHT, 0.008), (wrong, WRONG, 0.051)):
            style = {"color": COLOURS[f"series-{slot}"], "linewidth": 0}
            axes.bar(at + left, shares_by_score(scores), width=0.041, align="edge", **style)
        axes.tick_params(length=0, pad=5)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: tick(value))
        axes.text(
            -0.13, 1.055, "share of its kind", transform=axes.transAxes, color=COLOURS["muted"]
        )
        axes.text(
            0.5,
            -0.15,
            "score",
            transform=axes.transAxes,
            color=COLOURS["muted"],
            ha="center",
            va="top",
        )

    about = "Good: the two heaps lie apart, right answers to the right. Where they overlap, the reward cannot tell them from each other."
    drawn = picture(f"{title}: share of each kind against score", 380, 236, paint)
    return tag("figure", tag("h3", title), drawn, tag("figcaption", about))


def truth_key() -> Html:
    """The legend of `truth_histogram`."""
    return swatches(
        [("scores of right answers", box(RIGHT)), ("scores of wrong answers", box(WRONG))]
    )


def truth_table(right: np.ndarray, wrong: np.ndarray) -> Html:
    """Of each tenth of the scores how many answers have it, and how many of those are right."""
    counts = [np.bincount(bins_of(scores), minlength=BINS) for scores in (right, wrong)]
    rows = []
    for place, (good, bad) in enumerate(zip(*counts)):
        if good + bad:
            name = f"{place / BINS:.1f} to {(place + 1) / BINS:.1f}"
            rows.append([name, f"{good:,}", f"{bad:,}", percent(good / (good + bad))])
    return table(["score", "right", "wrong", "share right"], rows, class_="dense")
