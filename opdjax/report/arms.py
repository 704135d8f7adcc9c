"""Sections of a sweep's page about some arms only: those with judges, and the near-policy ones."""

from __future__ import annotations

import dataclasses
import math
import urllib.parse
from collections.abc import Callable, Sequence

from opdjax.report.charts import Chart, draw, grid
from opdjax.report.markup import (
    Html,
    amount,
    definitions,
    plus_minus,
    section,
    table,
    tag,
    text_head,
)
from opdjax.report.near_policy import ALARM
from opdjax.report.ranking import Ranked, coloured, label
from opdjax.report.sweep_charts import SEED_BAND, finite_values, key_to, metric_lines
from opdjax.runs.results import Run, mean

# Reads a number of a run, and formats its mean and half width over seeds.
_Column = tuple[Callable[[Run], float | None], Callable[[float, float], str]]


def judged_arms_section(entries: Sequence[Ranked]) -> Html | None:
    """Rewards, AUC, groups without signal and judge costs by arm; None if no arm has a judge."""
    judged = coloured([entry for entry in entries if _has(entry, "rubric/reward_mean")])
    if not judged:
        return None
    share = (0.0, 1.0)
    charts = {
        "rubric/reward_mean": Chart(
            "Reward",
            "step",
            "mean, 0 to 1",
            "The judge's reward for the student's answers. Arms with different rubrics or judges "
            "have different scales: compare their slopes, and compare arms by accuracy.",
            bounds=share,
        ),
        "rubric/auc": Chart(
            "AUC",
            "step",
            "probability",
            "Probability that a right answer scores above a wrong one of the same step; 0.5 "
            "(dashed) is chance, 1 perfect.",
            reference=0.5,
            bounds=share,
        ),
        "rubric/tied_groups": Chart(
            "Groups masked for ties",
            "step",
            "share of the groups",
            "Groups whose answers to one prompt all have the same score: they give no gradient.",
            bounds=share,
        ),
        "rubric/no_signal_share": Chart(
            "Criteria without signal",
            "step",
            "share of the criteria",
            "Criteria with the same verdict for all answers to a prompt.",
            bounds=share,
        ),
    }
    columns: dict[str, _Column] = {
        "reward, last 10 steps": (lambda run: run.last_mean("rubric/reward_mean"), plus_minus),
        "AUC, all steps": (lambda run: mean(run.column("rubric/auc")), plus_minus),
        "tied groups": (lambda run: mean(run.column("rubric/tied_groups")), plus_minus),
        "failed groups": (lambda run: mean(run.column("rubric/failed_share")), plus_minus),
        "judge calls a step": (lambda run: _api_per_step(run, "calls"), amount),
        "tokens a step": (lambda run: _api_per_step(run, "input_tokens", "output_tokens"), amount),
        "dollars a run": (lambda run: _api_total(run, "dollars"), amount),
    }
    words = {
        "tied groups": "share of the groups (answers to one prompt) whose scores are all equal, "
        "mean over all steps; they are masked",
        "failed groups": "share of the groups without any score, because a judge did not reply or "
        "its reply could not be parsed",
        "judge calls": "requests to rubricator and verifier together, without replies from the "
        "cache (tokens: prompts and replies)",
        "one run in full": "the page of a single run has rubrics, verdicts, rewards of right "
        "answers and examples",
    }
    head = [*columns, text_head("one run in full")]
    rows = [
        [*_numbers(entry, columns), tag("td", _page_of(entry), class_="wrap text")]
        for entry in judged
    ]
    caption = "Mean ± half a 95 % interval over seeds."
    note = f"Arms with judges. The colours are of this section. {SEED_BAND}"
    return section(
        "judged-arms",
        "Judged arms",
        tag("p", note, class_="quiet"),
        key_to(judged),
        _grid(charts, judged),
        table(["arm", *head], rows, caption=caption, class_="dense"),
        definitions(words),
    )


def _has(entry: Ranked, metric: str) -> bool:
    return any(value is not None for run in entry.runs for value in run.column(metric))


def _api_total(run: Run, *names: str) -> float | None:
    """Sum over all steps and all judges' roles; None if the run made no requests."""
    columns = {
        name
        for row in run.metrics
        for name in row
        if name.startswith("api/") and name.rpartition("/")[2] in names
    }
    values = (value for name in columns for value in run.column(name) if value is not None)
    return math.fsum(values) if columns else None


def _api_per_step(run: Run, *names: str) -> float | None:
    total = _api_total(run, *names)
    return None if total is None else total / len(run.metrics)


def _page_of(entry: Ranked) -> Html:
    """A link to the page of the arm's first run, or the command that writes it."""
    workdir = entry.runs[0].workdir
    if (workdir / "report.html").exists():
        return tag("a", workdir.name, href=f"{urllib.parse.quote(workdir.name)}/report.html")
    return tag("code", f"opdjax report {workdir.parent.name}/{workdir.name}")


def ahead_section(entries: Sequence[Ranked]) -> Html | None:
    """Staleness of the rollouts and the share that was kept, by arm; None if all arms are
    on-policy.
    """
    ahead = coloured([e for e in entries if any(run.is_near_policy for run in e.runs)])
    if not ahead:
        return None
    charts = {
        "staleness/kl": Chart(
            "Distance from the behaviour policy",
            "step",
            "KL, nats a token",
            "KL(student || behaviour) of the tokens trained on; near-policy is below "
            f"{ALARM:.2f} (NPD, arXiv 2605.05940).",
            bounds=(0, None),
        ),
        "staleness/mean": Chart(
            "Age",
            "step",
            "updates",
            "Updates between sampling a rollout and training on it.",
            bounds=(0, None),
        ),
        "staleness/effective_sample_size": Chart(
            "Effective sample size",
            "step",
            "share of the rollouts",
            "How many fresh rollouts a stale one is worth, from the ratios of whole rollouts.",
            bounds=(0, 1),
        ),
        "filter/keep_rate": Chart(
            "Kept by the filter",
            "step",
            "share of the samples",
            "Only arms with a filter.",
            bounds=(0, 1),
        ),
    }
    columns: dict[str, _Column] = {
        "age, updates": (lambda run: mean(run.column("staleness/mean")), amount),
        "KL, all steps": (lambda run: mean(run.column("staleness/kl")), amount),
        "KL, last 10 steps": (lambda run: run.last_mean("staleness/kl"), amount),
        "highest KL": (lambda run: _largest(run.column("staleness/kl")), amount),
        "effective sample size": (
            lambda run: mean(run.column("staleness/effective_sample_size")),
            plus_minus,
        ),
        "keep rate": (lambda run: run.keep_rate, plus_minus),
    }
    rows = [_numbers(entry, columns) for entry in ahead]
    note = (
        "Arms that sample rollouts ahead of their update. The colours are of this section. "
        f"{SEED_BAND}"
    )
    caption = (
        "Mean ± half a 95 % interval over seeds. KL in nats a token; highest: of single steps; "
        f"above {ALARM:.2f} is no longer near-policy."
    )
    return section(
        "ahead",
        "Staleness and filtering",
        tag("p", note, class_="quiet"),
        key_to(ahead),
        _grid(charts, ahead),
        table(["arm", *columns], rows, caption=caption, class_="dense"),
    )


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _numbers(entry: Ranked, columns: dict[str, _Column]) -> list[str]:
    """The arm's name and its numbers; a dash where no run has the number."""
    found = [(entry.over_seeds(read), show) for read, show in columns.values()]
    return [label(entry), *("–" if values is None else show(*values) for values, show in found)]


def _grid(charts: dict[str, Chart], entries: Sequence[Ranked]) -> Html:
    figures = []
    for name, chart in charts.items():
        lines = metric_lines(entries, name)
        largest = _largest(finite_values(lines))
        if largest is not None:
            is_far = name == "staleness/kl" and largest > 10 * ALARM
            figures.append(draw(_log(chart, largest) if is_far else chart, lines))
    return grid(figures)


def _log(chart: Chart, largest: float) -> Chart:
    """The chart on a logarithmic scale, so that a diverged arm does not flatten the others."""
    about = f"{chart.about} Logarithmic scale, from {ALARM / 1000:g} nats."
    bounds = (ALARM / 1000, 1.5 * largest)
    return dataclasses.replace(chart, about=about, is_y_log=True, y_range=bounds, reference=ALARM)
