"""What it took to have judged rewards: replies that failed, and what was asked, paid and waited
for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opdjax.report import judgements, measures
from opdjax.report.charts import Chart, grid, legend
from opdjax.report.judgements import Steps
from opdjax.report.markup import Html, count, duration, fixed, join, section, table, table_row, tag
from opdjax.report.rollouts import percent
from opdjax.report.rubrics_charts import from_columns, over_steps, smoothed
from opdjax.runs.results import Run, is_number

_PROBLEMS = {
    "unavailable": "no reply: every retry failed, or the server was taken for down",
    "refused": "the server refused this one request, such as one longer than its context",
    "truncated": "the reply reached its length limit before its JSON ended: a larger max_tokens helps",
    "empty": "the reply held nothing",
    "parse_error": "the reply held no JSON object",
    "schema_error": "the JSON was of another form than asked for",
    "validation_error": "the form was right and the content not, such as too few criteria or verdicts",
    "missing_answer": "the verifier left an answer out, which was then asked for alone",
}
_REPAIRS = {
    "fence": "a code fence around the JSON was taken off",
    "prose": "prose around the JSON was taken off",
    "unknown_keys": "keys that nobody asked for were dropped",
    "id_case": "ids were put in lower case",
    "unknown_answers": "verdicts about answers that do not exist were dropped",
}


# Failures


def failures_section(run: Run, steps: Steps) -> Html:
    """Groups without a reward, and why."""
    groups = judgements.all_groups(steps)
    failed, problems, repairs = (
        sum(g.is_failed for g in groups),
        *(judgements.counted(groups, kind) for kind in ("problems", "repairs")),
    )
    unscored = sum(int((~np.isfinite(group.scores)).sum()) for group in groups)
    rollouts = sum(group.scores.size for group in groups)
    about = (
        "A judge's reply that cannot be had or used is asked for again, with what was wrong; where that fails too, its rollouts have no "
        "reward. They are left out of the update, from its numerators and denominators alike, and not taken for bad answers. A group "
        "fails where fewer than two of its rollouts have a score. Good: near 0."
    )
    told = f"{failed:,} of {count(len(groups), 'group')} failed ({percent(failed / len(groups))}); "
    told += f"{unscored:,} of {rollouts:,} rollouts have no score."
    key, figures = _failure_charts(run, steps, problems)
    return section(
        "failures",
        "Replies that failed",
        tag("p", told, class_="finding"),
        tag("p", about, smoothed(len(steps)), class_="quiet"),
        key,
        grid(figure for figure in figures if figure is not None),
        _counts_table(
            "Replies that could not be used", "problem", problems, _PROBLEMS, len(groups)
        ),
        _counts_table("Replies that were put right", "repair", repairs, _REPAIRS, len(groups)),
    )


def _failure_charts(
    run: Run, steps: Steps, problems: Counter
) -> tuple[Html | None, list[Html | None]]:
    limit = (run.config.get("rubrics") or {}).get("max_failed_share")
    has_failed = any(group.is_failed for groups in steps.values() for group in groups)
    stops = (
        f" A step above {percent(limit)} stops the run (rubrics.max_failed_share)."
        if is_number(limit)
        else ""
    )
    chart = Chart(
        "Failed groups",
        "step",
        "share of the groups",
        f"Groups that taught nothing for want of scores.{stops}",
        bounds=(0, 1),
    )
    figures = [over_steps(chart, steps, [(0, judgements.failed_share)])] if has_failed else []
    kinds = [name for name, amount in problems.most_common(6) if amount]
    if kinds:
        about = "Replies that could not be used, by what was wrong with them; most are mended by asking again."
        parts = [
            (place, lambda groups, kind=kind: judgements.counted(groups, "problems")[kind])
            for place, kind in enumerate(kinds)
        ]
        figures.append(
            over_steps(
                Chart("Problems a step", "step", "replies", about, bounds=(0, None)), steps, parts
            )
        )
    return legend([(name, place) for place, name in enumerate(kinds)]) if kinds else None, figures


def _counts_table(
    title: str, noun: str, counts: Counter, meanings: Mapping[str, str], groups: int
) -> Html | None:
    if not sum(counts.values()):
        return tag("p", f"{title}: none.", class_="quiet")
    rows = [
        [
            name,
            f"{amount:,}",
            fixed(100 * amount / groups, 1),
            tag("td", meanings.get(name, ""), class_="wrap text"),
        ]
        for name, amount in counts.most_common()
        if amount
    ]
    head = [
        noun,
        "in all",
        "per 100 groups",
        tag("th", "what it means", class_="text", scope="col"),
    ]
    return join((tag("h3", title), table(head, rows)))


# Cost


def cost_section(run: Run) -> Html | None:
    """What judges were asked, what it cost, and how long the learner waited; None where nobody was
    asked.
    """
    roles = _roles(run)
    waits = run.column("time/judge_wait")
    if not roles and all(value is None for value in waits):
        return None
    about = (
        "Every question to a judge by the role it was asked in: the rubricator writes rubrics, the verifier checks answers against them. "
        "Replies from the cache cost nothing. Waiting is the time in which the learner stood still for judges after all rollouts were "
        "drawn; good is a small share of the step."
    )
    key = (
        legend([(role, place) for place, role in enumerate(roles[:6])]) if len(roles) > 1 else None
    )
    return section(
        "judge-cost",
        "What judging cost",
        *(tag("p", text, class_="finding") for text in [_cost_sentence(run, roles)] if text),
        tag("p", about, smoothed(len(run.metrics)), class_="quiet"),
        key,
        grid(figure for figure in _cost_charts(run, roles) if figure is not None),
        _cost_table(run, roles),
    )


def _roles(run: Run) -> list[str]:
    found = {
        match[1]
        for row in run.metrics
        for name in row
        if (match := re.fullmatch(r"api/([^/]+)/calls", name))
    }
    return sorted(found | {row["role"] for row in judgements.read_spending(run.workdir)})


def _totals(run: Run, roles: Sequence[str]) -> tuple[dict[str, Counter], bool]:
    """(by role what was used, whether that is of the whole run): spending.jsonl also knows of steps
    that were done again or never ended.
    """
    spending = judgements.read_spending(run.workdir)
    rows = spending or [
        {"role": role}
        | {
            name.rpartition("/")[2]: value
            for name, value in row.items()
            if name.startswith(f"api/{role}/")
        }
        for row in run.metrics
        for role in roles
    ]
    found: dict[str, Counter] = {role: Counter() for role in roles}
    for row in rows:
        found[row["role"]].update(
            {
                name: value
                for name, value in row.items()
                if name not in ("step", "role") and is_number(value)
            }
        )
    return found, bool(spending)


def _cost_sentence(run: Run, roles: Sequence[str]) -> str:
    total, parts = Counter(), []
    for used in _totals(run, roles)[0].values():
        total.update(used)
    if roles:
        tokens = _tokens(total["input_tokens"] + total["output_tokens"])
        asked = f"{count(int(total['calls']), 'call')}{_from_cache(total)} with {tokens} tokens"
        parts.append(
            f"{asked}, {_dollars(total['dollars'])} ({_dollars(total['dollars'] / max(len(run.metrics), 1))} a step)"
        )
    waited, spent = (
        sum(value for value in run.column(name) if value is not None)
        for name in ("time/judge_wait", "time/step")
    )
    if waited and spent:
        parts.append(
            f"the learner waited for judges {percent(waited / spent)} of its time ({duration(waited)})"
        )
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _from_cache(used: Mapping[str, float]) -> str:
    asked = used["calls"] + used["cached"]
    return (
        f" (and {used['cached']:,.0f} replies from the cache, {percent(used['cached'] / asked)} of all)"
        if used["cached"]
        else ""
    )


def _dollars(value: float) -> str:
    if not value:
        return "$0"
    return f"${value:,.2f}" if value >= 0.1 else f"${float(f'{value:.2g}'):g}"


def _tokens(value: float) -> str:
    """Such as 1.2 M or 34 k."""
    for size, unit in ((1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{float(f'{value / size:.3g}'):g}{unit}"
    return f"{value:,.0f}"


def _cost_charts(run: Run, roles: Sequence[str]) -> list[Html | None]:
    order = measures.steps_of(run)

    def by_role(*names: str) -> list[tuple[int, list[float | None]]]:
        columns = [[run.column(f"api/{role}/{name}") for name in names] for role in roles[:6]]
        return [
            (place, [_sum(values) for values in zip(*parts)]) for place, parts in enumerate(columns)
        ]

    charts = [
        (
            Chart(
                "Calls a step",
                "step",
                "calls",
                "Answered by a server; retries and replies from the cache apart.",
                bounds=(0, None),
            ),
            by_role("calls"),
        ),
        (
            Chart(
                "Tokens a step",
                "step",
                "tokens read and written",
                "Grows with the length of the answers.",
                bounds=(0, None),
            ),
            by_role("input_tokens", "output_tokens"),
        ),
    ]
    priced = by_role("dollars")
    if any(value for _, values in priced for value in values):
        charts.append(
            (
                Chart(
                    "Dollars a step",
                    "step",
                    "dollars",
                    "By the prices of the config.",
                    bounds=(0, None),
                ),
                priced,
            )
        )
    charts.append(
        (
            Chart(
                "Waited for judges",
                "step",
                "seconds",
                "After the last rollout of the step was drawn.",
                bounds=(0, None),
            ),
            [(0, run.column("time/judge_wait"))],
        )
    )
    return [from_columns(chart, order, columns) for chart, columns in charts]


def _sum(values: Sequence[float | None]) -> float | None:
    return (
        None
        if all(value is None for value in values)
        else sum(value for value in values if value is not None)
    )


def _cost_table(run: Run, roles: Sequence[str]) -> Html | None:
    if not roles:
        return None
    found, is_whole = _totals(run, roles)
    whole = Counter()
    for used in found.values():
        whole.update(used)
    rows: list[Any] = [_cost_row(role, used, len(run.metrics)) for role, used in found.items()]
    if len(rows) > 1:
        rows.append(table_row(_cost_row("all", whole, len(run.metrics)), class_="main"))
    head = [
        "role",
        "calls",
        "from the cache",
        "retries",
        "tokens read",
        "tokens written",
        "seconds a call",
        "dollars",
        "dollars a step",
    ]
    caption = (
        "Of the whole run, steps that were done again included."
        if is_whole
        else "Of the steps in metrics.jsonl."
    )
    return table(head, rows, caption=caption)


def _cost_row(name: str, used: Mapping[str, float], steps: int) -> list[str]:
    asked = used["calls"] + used["cached"]
    cached = f"{used['cached']:,.0f} ({percent(used['cached'] / asked)})" if asked else "–"
    plain = [f"{used[field]:,.0f}" for field in ("retries", "input_tokens", "output_tokens")]
    waited = fixed(used["seconds"] / used["calls"], 2) if used["calls"] and used["seconds"] else "–"
    return [
        name,
        f"{used['calls']:,.0f}",
        cached,
        *plain,
        waited,
        _dollars(used["dollars"]),
        _dollars(used["dollars"] / max(steps, 1)),
    ]
