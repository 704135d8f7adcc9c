"""The charts of a sweep: a line per group, averaged over its seeds. If there are too many groups,
the best are in colour and the rest in grey.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from opdjax.report import measures
from opdjax.report.charts import REST, SERIES, Chart, ChartLine, draw, grid, legend, smooth, y_range
from opdjax.report.markup import Html, count, join, section, tabs, tag
from opdjax.report.ranking import Interval, Ranked, distinct, final, interval, label
from opdjax.runs.results import AXES, Run

_PANELS = 12  # most small multiples
_POINTS = 150  # per drawn line
_UNKNOWN = (math.nan, math.nan)
SEED_BAND = (
    "Bands and bars are 95 % intervals over seeds (Student's t; none for one seed), not over "
    "prompts; those much wider than the differences between lines are clipped."
)


def key_to(entries: list[Ranked]) -> Html:
    """The legend of the charts with a line per group."""
    finished = [entry for entry in entries if entry.runs]
    named = [(label(entry), entry.slot) for entry in finished if entry.slot != REST]
    if grey := len(finished) - len(named):
        others = f"{count(grey, 'other group')}, lower in the table, without bands"
        named.append((others, REST))
    return legend(named)


def learning_rate_section(entries: list[Ranked], k: int | None) -> Html | None:
    """The final score against the learning rate, a line for each combination of the other settings;
    None if no combination has two rates.
    """
    families = {name: each for name, each in _families(entries).items() if len(each) > 1}
    if not families:
        return None
    lines = {
        score: {name: _rate_line(family, score) for name, family in families.items()}
        for score in measures.SCORES
    }
    if len(families) <= SERIES:
        extent = " The colours are of these charts only."
        key = legend([(name, slot) for slot, name in enumerate(families)])
        figures = [_all_rates(of_score, score, k) for score, of_score in lines.items()]
        pictures = join((key, grid(figures)))
    else:
        extent = " Grey: the other combinations."
        if len(families) > _PANELS:
            extent += f" The best {_PANELS} of {len(families)} combinations."
        panels = {
            measures.score_label(score, k): grid(_one_panel_each(of_score, score, k))
            for score, of_score in lines.items()
        }
        pictures = tabs("rate", panels, "Score")
    note = (
        f"A line for each combination of the other settings.{extent} A peak inside the range means "
        f"that the range was wide enough. {SEED_BAND}"
    )
    return section("rates", "Score against learning rate", tag("p", note, class_="quiet"), pictures)


def _families(entries: list[Ranked]) -> dict[str, list[Ranked]]:
    """Scored groups that differ only in the learning rate, named by their other settings, the best
    family first.
    """
    found: dict[str, list[Ranked]] = {}
    for entry in entries:
        if entry.over_seeds(final("avg@k")) is not None:
            config = measures.leaves(entry.group.points[0].config)
            rest = {n: v for n, v in config.items() if n not in ("seed", "optimizer.learning_rate")}
            found.setdefault(json.dumps(rest, sort_keys=True), []).append(entry)
    names = distinct([label(family[0], "learning_rate") for family in found.values()])
    return dict(zip(names, found.values()))


def _rate_line(family: list[Ranked], score: str) -> list[tuple[float, Interval]]:
    rate_of = lambda entry: entry.group.points[0].config["optimizer"]["learning_rate"]
    found = [(rate_of(entry), entry.over_seeds(final(score))) for entry in family]
    return sorted((rate, values) for rate, values in found if values is not None)


def _rates_chart(title: str, score: str, k: int | None) -> Chart:
    y_label = f"{measures.score_label(score, k)} after training"
    return Chart(title, "learning rate", y_label, is_x_log=True, bounds=(0, 1))


def _as_line(points: list[tuple[float, Interval]], slot: int) -> ChartLine:
    rates, values = [rate for rate, _ in points], [values for _, values in points]
    return band(rates, values, slot=slot, has_markers=True, bars=True)


def _all_rates(lines: dict[str, list], score: str, k: int | None) -> Html:
    chart = _rates_chart(measures.score_label(score, k), score, k)
    return draw(chart, [_as_line(points, slot) for slot, points in enumerate(lines.values())])


def _one_panel_each(lines: dict[str, list], score: str, k: int | None) -> list[Html]:
    """A panel for each combination, with the others in grey, on the same axes."""
    own, grey = (
        {name: _as_line(points, slot) for name, points in lines.items()} for slot in (0, REST)
    )
    common = y_range(_rates_chart("", score, k), [*own.values()])
    return [
        draw(
            dataclasses.replace(_rates_chart(name, score, k), y_range=common),
            [*(grey[other] for other in grey if other != name), own[name]],
        )
        for name in list(lines)[:_PANELS]
    ]


def curves_section(entries: list[Ranked], k: int | None) -> Html | None:
    """Scores during training against steps, tokens and seconds; None if no group was evaluated
    twice.
    """
    views = {}
    for axis in AXES:
        figures = []
        for score in measures.SCORES:
            lines = [_score_line(entry, axis, score) for entry in reversed(entries)]
            lines = [line for line in lines if line is not None]
            if max((len(line.x) for line in lines), default=0) > 1:
                title = measures.score_label(score, k)
                figures.append(draw(Chart(title, axis, "share right", bounds=(0, 1)), lines))
        if figures:
            views[axis] = grid(figures)
    if not views:
        return None
    note = f"Mean over the seeds of a group, finished points only. {SEED_BAND}"
    return section(
        "curves",
        "Scores during training",
        tag("p", note, class_="quiet"),
        key_to(entries),
        tabs("axis", views, "Against"),
    )


def _score_line(entry: Ranked, axis: str, score: str) -> ChartLine | None:
    """A score at the steps where every run of the group was evaluated."""
    found = [
        {row["step"]: row[score] for row in measures.evaluated(run) if score in row}
        for run in entry.runs
    ]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    spent = [measures.totals(run, axis, steps) for run in entry.runs]
    if not steps or any(at is None for at in spent):
        return None
    values = [interval(run[step] for run in found) for step in steps]
    return band([*map(statistics.fmean, zip(*spent))], values, slot=entry.slot, has_markers=True)


def training_section(entries: list[Ranked]) -> Html | None:
    """KL and gradient norm during training."""
    charts = {
        "kl/student_teacher": (
            "KL(student || teacher)",
            "nats a token",
            "Distance from the teacher on the student's own completions.",
        ),
        "grad/norm": (
            "Gradient norm",
            "global norm, before clipping",
            "Of two estimators of one objective, the one with the lower variance has the smaller "
            "norm at the same KL.",
        ),
    }
    figures = []
    for name, (title, unit, about) in charts.items():
        lines = metric_lines(entries, name)
        if lines:
            drawn = finite_values(lines)
            is_wide = min(drawn) > 0 and max(drawn) > 20 * min(drawn)
            about += " Logarithmic scale." if is_wide else ""
            chart = Chart(title, "step", unit, about, is_y_log=is_wide, bounds=(0, None))
            figures.append(draw(chart, lines))
    if not figures:
        return None
    note = (
        "Each run is smoothed (mean over a twelfth of its steps), then averaged over the seeds of "
        f"its group. {SEED_BAND}"
    )
    return section(
        "training",
        "Training curves",
        tag("p", note, class_="quiet"),
        key_to(entries),
        grid(figures),
    )


def metric_lines(entries: Sequence[Ranked], name: str) -> list[ChartLine]:
    """A line per group that has the metric: smoothed, then averaged over seeds. The best group is
    last, so it is drawn on top.
    """
    return [
        _metric_line(entry, name)
        for entry in reversed(entries)
        if any(value is not None for run in entry.runs for value in run.column(name))
    ]


def _metric_line(entry: Ranked, name: str) -> ChartLine:
    length = min(len(run.metrics) for run in entry.runs)
    stride = max(1, math.ceil(length / _POINTS))
    smoothed = [
        smooth(run.column(name), measures.smoothing_window(len(run.metrics)))[:length:stride]
        for run in entry.runs
    ]
    values = [interval(map(float, at)) or _UNKNOWN for at in zip(*smoothed)]
    return band(measures.steps_of(entry.runs[0])[:length:stride], values, slot=entry.slot)


def finite_values(lines: Sequence[ChartLine]) -> list[float]:
    """The finite y values of all lines."""
    return [value for line in lines for value in line.y if math.isfinite(value)]


def positions_section(entries: list[Ranked]) -> Html | None:
    """KL by position at the end of training."""
    # Groups without a colour are left out: diverged runs would flatten the other lines.
    kept = [entry for entry in entries if entry.slot != REST]
    found = [[_late_kl(run) for run in entry.runs] for entry in kept]
    buckets = sorted({bucket for runs in found for run in runs for bucket in run})
    if not buckets:
        return None
    lines = []
    for entry, runs in reversed(list(zip(kept, found))):
        values = [interval(run.get(bucket) for run in runs) or _UNKNOWN for bucket in buckets]
        if any(math.isfinite(mean) for mean, _ in values):
            style = {"slot": entry.slot, "has_markers": True, "bars": True}
            lines.append(band(list(range(len(buckets))), values, **style))
    chart = Chart(
        "KL(student || teacher) by position",
        "position in the completion, tokens",
        "nats a token",
        categories=[*map(measures.bucket_label, buckets)],
    )
    is_cut = len(kept) < sum(bool(entry.runs) for entry in entries)
    note = (
        f"{'The best groups only. ' if is_cut else ''}Mean over the last tenth of training (at "
        "least ten steps). A rising line means that late tokens follow contexts that the teacher "
        f"would not have written. {SEED_BAND}"
    )
    return section(
        "positions",
        "KL by position",
        tag("p", note, class_="quiet"),
        key_to(kept),
        grid([draw(chart, lines)]),
    )


def _late_kl(run: Run) -> dict[Any, float]:
    return measures.kl_by_position(run.metrics[-measures.end_length(len(run.metrics)) :])


def band(x: Sequence[float], values: Sequence[Interval], **style: Any) -> ChartLine:
    """A line with its intervals; an infinite half width is not drawn."""
    y = [mean for mean, _ in values]
    width = [half if math.isfinite(half) else math.nan for _, half in values]
    low = [mean - half for mean, half in zip(y, width)]
    high = [mean + half for mean, half in zip(y, width)]
    return ChartLine(list(x), y, low, high, **style)


def whisker(values: Interval, low: float, high: float, slot: int) -> Html:
    """A mean with its interval on the scale from `low` to `high`, small enough for a table."""

    def at(value: float) -> str:
        return f"{4 + 124 * (min(max(value, low), high) - low) / ((high - low) or 1):.1f}"

    mean, half = values
    dot = tag("circle", cx=at(mean), cy=9, r=3.5, fill="currentColor")
    bar = None
    if math.isfinite(half):
        bar = tag("line", x1=at(mean - half), x2=at(mean + half), y1=9, y2=9, stroke_width=1.6)
    colour = f"color: var(--{'muted' if slot == REST else f'series-{slot}'})"
    return tag(
        "svg", bar, dot, viewBox="0 0 132 18", class_="whisker", style=colour, aria_hidden="true"
    )


def joined_links(links: list[Html]) -> Html:
    """The links, separated by commas."""
    return join(
        part for number, link in enumerate(links) for part in ((", ", link) if number else (link,))
    )
