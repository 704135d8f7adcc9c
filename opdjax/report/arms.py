"""Parts of a sweep's page that are about some of its arms: those whose answers are judged, and
those that draw ahead of their updates.
"""

from __future__ import annotations

import dataclasses
import math
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from opdjax.report.charts import Chart, ChartLine, draw, grid
from opdjax.report.markup import (
    Html,
    amount,
    definitions,
    plus_minus,
    section,
    table,
    table_row,
    tag,
)
from opdjax.report.near_policy import ALARM
from opdjax.report.ranking import Ranked, coloured, label
from opdjax.report.sweep_charts import SEED_BAND, key_to, metric_line
from opdjax.runs.results import Run, mean


def judged_arms_section(entries: Sequence[Ranked]) -> Html | None:
    """Rewards, AUC, groups that teach nothing and the judge's cost over arms; None where no arm is
    judged.
    """
    judged = coloured([entry for entry in entries if any(_is_judged(run) for run in entry.runs)])
    if not judged:
        return None
    charts = {
        "rubric/reward_mean": Chart(
            "Reward",
            "step",
            "mean, 0 to 1",
            "What judges give the student's answers. Arms with other rubrics or judges have "
            "other scales: compare their slopes, and their accuracy for which is better.",
            bounds=(0, 1),
        ),
        "rubric/auc": Chart(
            "AUC",
            "step",
            "chance",
            "That a right answer scores above a wrong one of the same step; 0.5 (dashed) is chance, 1 perfect.",
            reference=0.5,
            bounds=(0, 1),
        ),
        "rubric/tied_groups": Chart(
            "Groups masked for ties",
            "step",
            "share of the groups",
            "Answers to one prompt that all have the same score: no gradient comes of them.",
            bounds=(0, 1),
        ),
        "rubric/no_signal_share": Chart(
            "Criteria without signal",
            "step",
            "share of the criteria",
            "Criteria that all answers to a prompt meet alike.",
            bounds=(0, 1),
        ),
    }
    head = [
        "arm",
        "reward, last 10 steps",
        "AUC, all steps",
        "tied groups",
        "failed groups",
        "judge calls a step",
        "tokens a step",
        "dollars a run",
        _text("one run in full"),
    ]
    words = {
        "tied groups": "share of the groups (answers to one prompt) with one score for all, mean over all steps: they are masked",
        "failed groups": "share of the groups without any score, because a reply could not be had or read",
        "judge calls": "questions to rubricator and verifier together, replies from the cache not counted (tokens: read and written)",
        "one run in full": "rubrics, verdicts, reward against right answers and examples stand on the page of a single run",
    }
    note = f"Arms whose answers are judged. The colours are of this section. {SEED_BAND}"
    caption = "Mean ± half a 95 % interval over seeds."
    return section(
        "judged-arms",
        "Judged arms",
        tag("p", note, class_="quiet"),
        key_to(judged),
        _grid(charts, judged),
        table(head, [_judged_row(entry) for entry in judged], caption=caption, class_="dense"),
        definitions(words),
    )


def _is_judged(run: Run) -> bool:
    return any(value is not None for value in run.column("rubric/reward_mean"))


def _judged_row(entry: Ranked) -> Html:
    shares: list[Callable[[Run], float | None]] = [
        lambda run: run.last_mean("rubric/reward_mean"),
        lambda run: mean(run.column("rubric/auc")),
        lambda run: mean(run.column("rubric/tied_groups")),
        lambda run: mean(run.column("rubric/failed_share")),
    ]
    amounts: list[Callable[[Run], float | None]] = [
        lambda run: _a_step(run, "calls"),
        lambda run: _a_step(run, "input_tokens", "output_tokens"),
        lambda run: _sum(run, "dollars"),
    ]
    cells = [*_cells(entry, shares, plus_minus), *_cells(entry, amounts, amount)]
    return table_row([label(entry), *cells, tag("td", _page_of(entry), class_="wrap text")])


def _cells(
    entry: Ranked, reads: Sequence[Callable[[Run], float | None]], told: Callable[..., str]
) -> list[str]:
    return ["–" if (values := entry.over_seeds(read)) is None else told(*values) for read in reads]


def _sum(run: Run, *names: str) -> float | None:
    """Over all steps and all roles of judges; None where nobody was asked."""
    columns = {
        name
        for row in run.metrics
        for name in row
        if name.startswith("api/") and name.rpartition("/")[2] in names
    }
    return (
        math.fsum(value for name in columns for value in run.column(name) if value is not None)
        if columns
        else None
    )


def _a_step(run: Run, *names: str) -> float | None:
    total = _sum(run, *names)
    return None if total is None else total / len(run.metrics)


def _page_of(entry: Ranked) -> Html:
    """A link to the page of the arm's first run where there is one; else how it is made."""
    workdir = entry.runs[0].workdir
    if (workdir / "report.html").exists():
        return tag("a", workdir.name, href=f"{urllib.parse.quote(workdir.name)}/report.html")
    return tag("code", f"opdjax report {workdir.parent.name}/{workdir.name}")


def ahead_section(entries: Sequence[Ranked]) -> Html | None:
    """How stale the rollouts were, and how many were kept; None where every arm is on-policy."""
    ahead = coloured([entry for entry in entries if any(run.is_near_policy for run in entry.runs)])
    if not ahead:
        return None
    charts = {
        "staleness/kl": Chart(
            "Distance from the policy that drew",
            "step",
            "KL, nats a token",
            f"KL(student || behaviour) of the tokens trained on; near-policy is below {ALARM:.2f} (NPD, arXiv 2605.05940).",
            bounds=(0, None),
        ),
        "staleness/mean": Chart(
            "Age",
            "step",
            "updates",
            "Updates between drawing a rollout and training on it.",
            bounds=(0, None),
        ),
        "staleness/effective_sample_size": Chart(
            "Effective sample size",
            "step",
            "share of the rollouts",
            "How many fresh rollouts a stale one is worth, by the ratios of whole rollouts.",
            bounds=(0, 1),
        ),
        "filter/keep_rate": Chart(
            "Kept by the filter",
            "step",
            "share of the samples",
            "Where an arm has a filter.",
            bounds=(0, 1),
        ),
    }
    head = [
        "arm",
        "age, updates",
        "KL, all steps",
        "KL, last 10 steps",
        "highest KL",
        "effective sample size",
        "keep rate",
    ]
    rows = [_ahead_row(entry) for entry in ahead]
    note = f"Arms that draw rollouts ahead of the updates they are for. The colours are of this section. {SEED_BAND}"
    caption = f"Mean ± half a 95 % interval over seeds. KL in nats a token; highest: of single steps; above {ALARM:.2f} is no longer near-policy."
    return section(
        "ahead",
        "Staleness and filtering",
        tag("p", note, class_="quiet"),
        key_to(ahead),
        _grid(charts, ahead),
        table(head, rows, caption=caption, class_="dense"),
    )


def _ahead_row(entry: Ranked) -> Html:
    amounts: list[Callable[[Run], float | None]] = [
        lambda run: mean(run.column("staleness/mean")),
        lambda run: mean(run.column("staleness/kl")),
        lambda run: run.last_mean("staleness/kl"),
        lambda run: max(
            (value for value in run.column("staleness/kl") if value is not None), default=None
        ),
    ]
    shares: list[Callable[[Run], float | None]] = [
        lambda run: mean(run.column("staleness/effective_sample_size")),
        lambda run: run.keep_rate,
    ]
    return table_row(
        [label(entry), *_cells(entry, amounts, amount), *_cells(entry, shares, plus_minus)]
    )


def _grid(charts: dict[str, Chart], entries: Sequence[Ranked]) -> Html:
    found: list[tuple[Chart, list[ChartLine]]] = []
    for name, chart in charts.items():
        lines = [
            line for entry in reversed(entries) if (line := metric_line(entry, name)) is not None
        ]
        drawn = [value for line in lines for value in line.y if math.isfinite(value)]
        if drawn:
            found.append(
                (
                    _log(chart, max(drawn))
                    if name == "staleness/kl" and max(drawn) > 10 * ALARM
                    else chart,
                    lines,
                )
            )
    return grid(draw(chart, lines) for chart, lines in found)


def _log(chart: Chart, most: float) -> Chart:
    """One arm that went far away would press the others flat; below a thousandth of the alarm
    nothing is told apart.
    """
    about = f"{chart.about} Logarithmic scale, from {ALARM / 1000:g} nats."
    return dataclasses.replace(
        chart, about=about, is_y_log=True, y_range=(ALARM / 1000, 1.5 * most), reference=ALARM
    )


def _text(name: str) -> Any:
    return tag("th", name, class_="text", scope="col")
