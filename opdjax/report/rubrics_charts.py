"""Charts of judged rollouts: curves by step, and scores of right and of wrong answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opdjax.report.charts import (
    HEIGHT,
    WIDTH,
    Chart,
    ChartLine,
    box,
    by_step,
    colour_of,
    draw,
    draw_columns,
    figure,
    picture,
    small_axes,
    swatches,
    tick,
)
from opdjax.report.judgements import JudgedGroup, Steps, auc
from opdjax.report.markup import Html, percent, table
from opdjax.runs.results import is_number

RIGHT, WRONG = 2, 1  # colours
BINS = 10  # of a score from 0 to 1
_AUC_BINS, _AUC_GROUPS = 12, 24  # stretches of steps at most, groups per stretch at least

Measure = Callable[[list[JudgedGroup]], Any]  # a number, a Rate or None for the groups of a step


def over_steps(chart: Chart, steps: Steps, parts: Sequence[tuple[int, Measure]]) -> Html | None:
    """The chart of (colour, measure) parts over the steps; None where all measures are unknown."""
    columns = [
        (slot, [_number(measure(groups)) for groups in steps.values()]) for slot, measure in parts
    ]
    return draw_columns(chart, list(steps), columns)


def _number(value: Any) -> float | None:
    value = getattr(value, "value", value)  # of a Rate
    return float(value) if is_number(value) else None


def auc_chart(steps: Steps) -> Html | None:
    """The AUC of stretches of steps with its interval; None without right and wrong answers."""
    order, groups = list(steps), sum(map(len, steps.values()))
    size = max(1, min(_AUC_BINS, len(order), groups // _AUC_GROUPS))
    stretches = [part.tolist() for part in np.array_split(np.array(order), size)]
    found = [(part, auc(group for step in part for group in steps[step])) for part in stretches]
    known = [(sum(part) / len(part), rate) for part, rate in found if rate is not None]
    if not known:
        return None
    x, rates = zip(*known)
    halves = [rate.half_width if is_number(rate.half_width) else math.nan for rate in rates]
    low = [np.clip(rate.value - half, 0.0, 1.0) for rate, half in zip(rates, halves)]
    high = [np.clip(rate.value + half, 0.0, 1.0) for rate, half in zip(rates, halves)]
    line = ChartLine(x, [rate.value for rate in rates], low, high, has_markers=True, bars=True)
    about = (
        "Probability that a right answer scores above a wrong one (a tie counts half), over the"
        f" rollouts of {max(map(len, stretches)):,} steps at a time. 1: the judge always prefers"
        " right answers. 0.5 (dashed): no better than chance. Bars: 95 % intervals."
    )
    floor = min([0.4, *(end - 0.02 for end in low if math.isfinite(end))])
    limits = {"reference": 0.5, "y_range": (floor, 1.02)}
    return draw(by_step("Telling right from wrong (AUC)", "AUC", about, **limits), [line])


# Scores by truth


def bins_of(scores: np.ndarray) -> np.ndarray:
    """The tenth of each score; 1 belongs to the last, and rounding does not move 0.3 down."""
    return np.clip(np.floor(scores * BINS + 1e-6), 0, BINS - 1).astype(int)


def _counts(scores: np.ndarray) -> np.ndarray:
    """Number of scores in each tenth, `[BINS]`."""
    return np.bincount(bins_of(scores), minlength=BINS)


def truth_histogram(right: np.ndarray, wrong: np.ndarray) -> Html:
    """Scores of right and of wrong answers side by side, each as shares of its own kind."""
    title = "Scores of right and wrong answers"

    def paint(canvas: Any) -> None:
        axes = small_axes(canvas, "score", "share of its kind")
        at = np.arange(BINS) / BINS
        for scores, slot, left in ((right, RIGHT, 0.008), (wrong, WRONG, 0.051)):
            style = {"width": 0.041, "align": "edge", "color": colour_of(slot), "linewidth": 0}
            axes.bar(at + left, _counts(scores) / max(scores.size, 1), **style)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(tick)

    about = (
        "Good: the two distributions are apart, right answers at the right. Where they overlap, the"
        " reward does not separate right from wrong."
    )
    drawing = picture(f"{title}: share of each kind against score", WIDTH, HEIGHT, paint)
    return figure(title, drawing, about)


def truth_key() -> Html:
    """The legend of `truth_histogram`."""
    marks = {"scores of right answers": RIGHT, "scores of wrong answers": WRONG}
    return swatches([(name, box(slot)) for name, slot in marks.items()])


def truth_table(right: np.ndarray, wrong: np.ndarray) -> Html:
    """Number of right and wrong answers in each tenth of the scores."""
    rows = [
        [f"{at / BINS:.1f} to {(at + 1) / BINS:.1f}", f"{good:,}", f"{bad:,}", percent(good / both)]
        for at, (good, bad) in enumerate(zip(_counts(right), _counts(wrong)))
        if (both := good + bad)
    ]
    return table(["score", "right", "wrong", "share right"], rows, class_="dense")
