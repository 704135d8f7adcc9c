"""The charts of a sweep: one line a group, averaged over its seeds; with many groups the best in
colour, the rest in grey.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from opdjax.report import measures
from opdjax.report.charts import REST, SERIES, Chart, ChartLine, draw, grid, legend, smooth, y_range
from opdjax.report.markup import Html, count, join, section, tabs, tag
from opdjax.report.ranking import Interval, Ranked, final, interval, label, mean_steps
from opdjax.runs.results import AXES, Run

_PANELS = 12  # small multiples at most
_POINTS = 150  # of a drawn line
SEED_BAND = (
    "Bands and bars are 95 % intervals over seeds (Student's t; none for one seed), not over prompts; those much wider than the "
    "differences between lines are cut at the edge."
)


def key_to(entries: list[Ranked]) -> Html:
    """The legend of every chart with a line a group."""
    drawn = [entry for entry in entries if entry.runs]
    named = [(label(entry), entry.slot) for entry in drawn if entry.slot != REST]
    grey = len(drawn) - len(named)
    return legend(
        [*named, (f"{count(grey, 'other group')}, lower in the table, without bands", REST)]
        if grey
        else named
    )


def learning_rate_section(entries: list[Ranked], k: int | None) -> Html | None:
    """The final score against the learning rate, one line for each combination of the other
    settings.
    """
    families = _families(
        [entry for entry in entries if entry.runs and entry.over_seeds(final("avg@k"))]
    )
    families = {name: family for name, family in families.items() if len(family) > 1}
    if not families:
        return None
    has_room = len(families) <= SERIES
    lines = {
        score: {name: _rate_line(family, score) for name, family in families.items()}
        for score in measures.SCORES
    }
    if has_room:
        key = legend([(name, slot) for slot, name in enumerate(families)])
        figures = [_all_rates(of_score, score, k) for score, of_score in lines.items()]
        pictures = join((key, grid(figures)))
    else:
        panels = {
            measures.score_label(score, k): grid(_one_panel_each(of_score, score, k))
            for score, of_score in lines.items()
        }
        pictures = tabs("rate", panels, "Score")
    hidden = (
        ""
        if has_room or len(families) <= _PANELS
        else f" The best {_PANELS} of {len(families)} combinations."
    )
    own = " The colours are of these charts only." if has_room else " Grey: the other combinations."
    note = (
        f"One line for each combination of the other settings.{own}{hidden} A peak inside the range means that the range was wide enough. "
        f"{SEED_BAND}"
    )
    return section("rates", "Score against learning rate", tag("p", note, class_="quiet"), pictures)


def _families(entries: list[Ranked]) -> dict[str, list[Ranked]]:
    """Groups that differ in nothing but the learning rate, under the name of the rest; in the order
    of their best.
    """
    found: dict[str, list[Ranked]] = {}
    for entry in entries:
        config = measures.leaves(entry.group.points[0].config)
        rest = {
            name: value
            for name, value in config.items()
            if name not in ("seed", "optimizer.learning_rate")
        }
        found.setdefault(json.dumps(rest, sort_keys=True), []).append(entry)
    names = [label(family[0], "learning_rate") for family in found.values()]
    # Two families may carry one name where overrides do not say all that differs; they still are
    # two lines.
    return {
        f"{name} ({number})" if names.count(name) > 1 else name: family
        for number, (name, family) in enumerate(zip(names, found.values()), 1)
    }


def _rate_line(family: list[Ranked], score: str) -> list[tuple[float, Interval]]:
    found = [
        (entry.group.points[0].config["optimizer"]["learning_rate"], entry.over_seeds(final(score)))
        for entry in family
    ]
    return sorted((rate, values) for rate, values in found if values is not None)


def _rates_chart(title: str, score: str, k: int | None) -> Chart:
    return Chart(
        title,
        "learning rate",
        f"{measures.score_label(score, k)} after training",
        is_x_log=True,
        bounds=(0, 1),
    )


def _as_line(points: list[tuple[float, Interval]], slot: int) -> ChartLine:
    x, y, half = (
        [rate for rate, _ in points],
        [value for _, (value, _) in points],
        [width for _, (_, width) in points],
    )
    return band(x, y, half, slot=slot, has_markers=True, bars=True)


def _all_rates(lines: dict[str, list], score: str, k: int | None) -> Html:
    return draw(
        _rates_chart(measures.score_label(score, k), score, k),
        [_as_line(points, slot) for slot, points in enumerate(lines.values())],
    )


def _one_panel_each(lines: dict[str, list], score: str, k: int | None) -> list[Html]:
    """Each combination before the others in grey, on the same axes."""
    shown = list(lines)[:_PANELS]
    own, grey = (
        {name: _as_line(points, slot) for name, points in lines.items()} for slot in (0, REST)
    )
    common = y_range(_rates_chart("", score, k), [*own.values()])
    return [
        draw(
            dataclasses.replace(_rates_chart(name, score, k), y_range=common),
            [*(grey[other] for other in grey if other != name), own[name]],
        )
        for name in shown
    ]


def curves_section(entries: list[Ranked], k: int | None) -> Html | None:
    """Scores during training against steps, tokens and seconds."""
    views = {}
    for axis in AXES:
        figures = []
        for score in measures.SCORES:
            lines = [
                line
                for entry in reversed(entries)
                if (line := _score_line(entry, axis, score)) is not None
            ]
            if lines and max(len(line.x) for line in lines) > 1:
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
    """At the steps that every run of the group was evaluated at."""
    found = [
        {row["step"]: row[score] for row in measures.evaluated(run) if score in row}
        for run in entry.runs
    ]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    spent = [measures.totals(run, axis, steps) for run in entry.runs]
    if not steps or any(at is None for at in spent):
        return None
    values = [interval(run[step] for run in found) for step in steps]
    return band(
        mean_steps(spent),
        [mean for mean, _ in values],
        [half for _, half in values],
        slot=entry.slot,
        has_markers=True,
    )


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
            "Of two estimators of one objective, that of lower variance has the smaller norm at the same KL.",
        ),
    }
    figures = []
    for name, (title, unit, about) in charts.items():
        lines = [
            line for entry in reversed(entries) if (line := metric_line(entry, name)) is not None
        ]
        if lines:
            drawn = [value for line in lines for value in line.y if math.isfinite(value)]
            is_wide = min(drawn) > 0 and max(drawn) > 20 * min(drawn)
            scale = " Logarithmic scale." if is_wide else ""
            figures.append(
                draw(
                    Chart(title, "step", unit, about + scale, is_y_log=is_wide, bounds=(0, None)),
                    lines,
                )
            )
    if not figures:
        return None
    note = f"Each run is smoothed (mean over a twelfth of its steps), then averaged over the seeds of its group. {SEED_BAND}"
    return section(
        "training",
        "Training curves",
        tag("p", note, class_="quiet"),
        key_to(entries),
        grid(figures),
    )


def metric_line(entry: Ranked, name: str) -> ChartLine | None:
    """A metric over steps, smoothed, then averaged over seeds; None where no run has it."""
    if not entry.runs or all(value is None for run in entry.runs for value in run.column(name)):
        return None
    length = min(len(run.metrics) for run in entry.runs)
    stride = max(1, math.ceil(length / _POINTS))
    smoothed = [
        smooth(run.column(name), measures.smoothing_window(len(run.metrics)))[:length:stride]
        for run in entry.runs
    ]
    values = [interval(map(float, at)) or (math.nan, math.nan) for at in zip(*smoothed)]
    return band(
        measures.steps_of(entry.runs[0])[:length:stride],
        [mean for mean, _ in values],
        [half for _, half in values],
        slot=entry.slot,
    )


def positions_section(entries: list[Ranked]) -> Html | None:
    """KL by position at the end of training."""
    coloured = [
        entry for entry in entries if entry.slot != REST
    ]  # lines of runs that diverged would press these flat
    found = {id(entry): [_late(run) for run in entry.runs] for entry in coloured}
    buckets = sorted({bucket for runs in found.values() for run in runs for bucket in run})
    if not buckets:
        return None
    lines = []
    for entry in reversed(coloured):
        at = [
            interval(run.get(bucket) for run in found[id(entry)]) or (math.nan, math.nan)
            for bucket in buckets
        ]
        if any(math.isfinite(mean) for mean, _ in at):
            x = list(range(len(buckets)))
            lines.append(
                band(
                    x,
                    [mean for mean, _ in at],
                    [half for _, half in at],
                    slot=entry.slot,
                    has_markers=True,
                    bars=True,
                )
            )
    chart = Chart(
        "KL(student || teacher) by position",
        "position in the completion, tokens",
        "nats a token",
        categories=[*map(measures.bucket_label, buckets)],
    )
    best = (
        "The best groups only. "
        if len(coloured) < sum(bool(entry.runs) for entry in entries)
        else ""
    )
    note = (
        f"{best}Mean over the last tenth of training (at least ten steps). A line that rises means that late tokens follow contexts "
        f"which the teacher would not have written. {SEED_BAND}"
    )
    return section(
        "positions",
        "KL by position",
        tag("p", note, class_="quiet"),
        key_to(coloured),
        grid([draw(chart, lines)]),
    )


def _late(run: Run) -> dict[Any, float]:
    return measures.kl_by_position(run.metrics[-measures.end_length(len(run.metrics)) :])


def band(x: list[float], y: list[float], half: list[float], **style: Any) -> ChartLine:
    """A line with its interval, which an infinite half width does not have."""
    width = [value if math.isfinite(value) else math.nan for value in half]
    return ChartLine(
        x,
        y,
        [value - w for value, w in zip(y, width)],
        [value + w for value, w in zip(y, width)],
        **style,
    )


def whisker(values: Interval, low: float, high: float, slot: int) -> Html:
    """A mean with its interval on the scale from `low` to `high`, small enough for a table."""

    def at(value: float) -> str:
        return f"{4 + 124 * (min(max(value, low), high) - low) / ((high - low) or 1):.1f}"

    mean, half = values
    dot = tag("circle", cx=at(mean), cy=9, r=3.5, fill="currentColor")
    bar = (
        tag("line", x1=at(mean - half), x2=at(mean + half), y1=9, y2=9, stroke_width=1.6)
        if math.isfinite(half)
        else None
    )
    colour = f"color: var(--{'muted' if slot == REST else f'series-{slot}'})"
    return tag(
        "svg", bar, dot, viewBox="0 0 132 18", class_="whisker", style=colour, aria_hidden="true"
    )


def joined_links(links: list[Html]) -> Html:
    """Links with commas between."""
    return join(
        part for number, link in enumerate(links) for part in ((", ", link) if number else (link,))
    )
