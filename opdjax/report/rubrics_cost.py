"""The sections of a run's page on failed replies of judges, and on the cost of judging."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opdjax.config.rubrics import MAX_FAILED_SHARE
from opdjax.report import judgements, measures
from opdjax.report.charts import by_step, draw_columns, grid, legend
from opdjax.report.judgements import Steps
from opdjax.report.markup import (
    Html,
    count,
    duration,
    fixed,
    join,
    percent,
    quiet,
    section,
    significant,
    table,
    table_row,
    tag,
    text_cell,
    text_head,
)
from opdjax.report.rubrics_charts import over_steps
from opdjax.runs.results import Run, is_number

_PROBLEMS = {
    "unavailable": "no reply: every retry failed, or the server was considered down",
    "refused": "the server refused this request, for example because of its length",
    "truncated": "the reply reached its length limit before its JSON ended: raise max_tokens",
    "empty": "the reply was empty",
    "parse_error": "the reply contained no JSON object",
    "schema_error": "the JSON did not match the schema",
    "validation_error": "the JSON matched the schema but not the request, for example too few"
    " criteria or verdicts",
    "missing_answer": "the verifier left out an answer, which was then sent alone",
}
_REPAIRS = {
    "fence": "a code fence around the JSON was removed",
    "prose": "prose around the JSON was removed",
    "unknown_keys": "keys outside of the schema were dropped",
    "id_case": "ids were converted to lower case",
    "unknown_answers": "verdicts on answers that do not exist were dropped",
}
_MOST = 6  # lines of a chart: as many as there are colours


# Failures


def failures_section(run: Run, steps: Steps) -> Html:
    """Groups without a reward, and the causes."""
    groups = judgements.all_groups(steps)
    failed = sum(group.is_failed for group in groups)
    problems, repairs = (judgements.counted(groups, kind) for kind in ("problems", "repairs"))
    unscored = sum(int((~np.isfinite(group.scores)).sum()) for group in groups)
    rollouts = sum(group.scores.size for group in groups)
    about = (
        "An unusable reply of a judge is requested again, with the error. Where that fails too, the"
        " rollouts have no reward: the update leaves them out of numerators and denominators. A"
        " group fails if fewer than two of its rollouts have a score. Good: near 0."
        + measures.smoothing_note(len(steps))
    )
    share = percent(failed / len(groups))
    lead = (
        f"{failed:,} of {count(len(groups), 'group')} failed ({share}); {unscored:,} of"
        f" {rollouts:,} rollouts have no score."
    )
    kinds = [name for name, amount in problems.most_common(_MOST) if amount]
    return section(
        "failures",
        "Replies that failed",
        legend([(name, slot) for slot, name in enumerate(kinds)]) if kinds else None,
        grid([_failed_chart(run, steps) if failed else None, _problems_chart(steps, kinds)]),
        _counts_table("Unusable replies", "problem", problems, _PROBLEMS, len(groups)),
        _counts_table("Repaired replies", "repair", repairs, _REPAIRS, len(groups)),
        lead=lead,
        about=about,
    )


def _failed_chart(run: Run, steps: Steps) -> Html | None:
    limit = (run.config.get("rubrics") or {}).get("max_failed_share", MAX_FAILED_SHARE)
    about = "Groups that taught nothing because scores are missing."
    if is_number(limit):
        about += f" A step above {percent(limit)} stops the run."
    chart = by_step("Failed groups", "share of the groups", about, bounds=(0, 1))
    return over_steps(chart, steps, [(0, judgements.failed_share)])


def _problems_chart(steps: Steps, kinds: Sequence[str]) -> Html | None:
    about = "Unusable replies by kind of problem; most are resolved by a second request."
    chart = by_step("Problems a step", "replies", about, bounds=(0, None))
    number_of = lambda kind: lambda groups: judgements.counted(groups, "problems")[kind]
    return over_steps(chart, steps, [(slot, number_of(kind)) for slot, kind in enumerate(kinds)])


def _counts_table(
    title: str, noun: str, counts: Counter, meanings: Mapping[str, str], groups: int
) -> Html:
    if not sum(counts.values()):
        return quiet(f"{title}: none.")
    rows = [
        [name, f"{found:,}", fixed(100 * found / groups, 1), text_cell(meanings.get(name, ""))]
        for name, found in counts.most_common()
        if found
    ]
    head = [noun, "in total", "per 100 groups", text_head("meaning")]
    return join((tag("h3", title), table(head, rows)))


# Cost


def cost_section(run: Run) -> Html | None:
    """Requests to judges, their cost, and the learner's wait; None where nothing was judged."""
    roles = _roles(run)
    if not roles and all(value is None for value in run.column("time/judge_wait")):
        return None
    about = (
        "Requests to judges by role: the rubricator writes rubrics, the verifier checks answers"
        " against them. Replies from the cache cost nothing. Waiting is the time in which the"
        " learner waited for judges after all rollouts were sampled. Good: a small share of the"
        " step." + measures.smoothing_note(len(run.metrics))
    )
    named = [(role, slot) for slot, role in enumerate(roles[:_MOST])]
    return section(
        "judge-cost",
        "Cost of judging",
        legend(named) if len(roles) > 1 else None,
        grid(_cost_charts(run, roles)),
        _cost_table(run, roles) if roles else None,
        lead=_cost_sentence(run, roles),
        about=about,
    )


def _roles(run: Run) -> list[str]:
    names = (re.fullmatch(r"api/([^/]+)/calls", name) for row in run.metrics for name in row)
    found = {match[1] for match in names if match}
    return sorted(found | {row["role"] for row in judgements.read_spending(run.workdir)})


def _totals(run: Run, roles: Sequence[str]) -> tuple[dict[str, Counter], bool]:
    """(usage by role, whether of the whole run).

    spending.jsonl also has steps that were repeated or that never ended; metrics.jsonl does not.
    """
    spending = judgements.read_spending(run.workdir)
    rows = [(row["role"], row) for row in spending]
    for role in () if spending else roles:
        prefix = f"api/{role}/"
        for row in run.metrics:
            items = ((name, value) for name, value in row.items() if name.startswith(prefix))
            rows.append((role, {name.removeprefix(prefix): value for name, value in items}))
    found: dict[str, Counter] = {role: Counter() for role in roles}
    for role, row in rows:
        used = {name: v for name, v in row.items() if name not in ("step", "role") and is_number(v)}
        found[role].update(used)
    return found, bool(spending)


def _sum(found: Mapping[str, Counter]) -> Counter:
    total: Counter = Counter()
    for used in found.values():
        total.update(used)
    return total


def _cost_sentence(run: Run, roles: Sequence[str]) -> str:
    total, parts = _sum(_totals(run, roles)[0]), []
    if roles:
        calls = count(int(total["calls"]), "call")
        if total["cached"]:
            share = percent(total["cached"] / (total["calls"] + total["cached"]))
            calls += f" (and {total['cached']:,.0f} replies from the cache, {share} of all)"
        tokens = _tokens(total["input_tokens"] + total["output_tokens"])
        step = _dollars(total["dollars"] / max(len(run.metrics), 1))
        parts.append(f"{calls} with {tokens} tokens, {_dollars(total['dollars'])} ({step} a step)")
    waited, spent = (
        sum(value for value in run.column(name) if value is not None)
        for name in ("time/judge_wait", "time/step")
    )
    if waited and spent:
        share = percent(waited / spent)
        parts.append(f"the learner waited for judges {share} of its time ({duration(waited)})")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _dollars(value: float) -> str:
    if not value:
        return "$0"
    return f"${value:,.2f}" if value >= 0.1 else f"${float(f'{value:.2g}'):g}"


def _tokens(value: float) -> str:
    """Such as 1.2 M or 34 k."""
    for size, unit in ((1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{significant(value / size)}{unit}"
    return f"{value:,.0f}"


def _cost_charts(run: Run, roles: Sequence[str]) -> list[Html | None]:
    def by_role(*names: str) -> list[tuple[int, list[float | None]]]:
        columns = ([run.column(f"api/{role}/{name}") for name in names] for role in roles[:_MOST])
        return [(slot, [*map(_total, *parts)]) for slot, parts in enumerate(columns)]

    calls = "Answered by a server, without retries and replies from the cache."
    tokens = "Grows with the length of the answers."
    waited = "After the last rollout of the step was sampled."
    dollars = by_role("dollars")
    has_prices = any(value for _, values in dollars for value in values)
    charts = [
        ("Calls a step", "calls", calls, by_role("calls")),
        (
            "Tokens a step",
            "tokens read and written",
            tokens,
            by_role("input_tokens", "output_tokens"),
        ),
        (
            "Dollars a step",
            "dollars",
            "At the prices of the config.",
            dollars if has_prices else [],
        ),
        ("Waited for judges", "seconds", waited, [(0, run.column("time/judge_wait"))]),
    ]
    steps = measures.steps_of(run)
    return [
        draw_columns(by_step(title, label, about, bounds=(0, None)), steps, columns)
        for title, label, about, columns in charts
    ]


def _total(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _cost_table(run: Run, roles: Sequence[str]) -> Html:
    found, is_whole = _totals(run, roles)
    steps = len(run.metrics)
    rows: list[Any] = [_cost_row(role, used, steps) for role, used in found.items()]
    if len(rows) > 1:
        rows.append(table_row(_cost_row("all", _sum(found), steps), class_="main"))
    head = ["role", "calls", "from the cache", "retries", "tokens read", "tokens written"]
    head += ["seconds a call", "dollars", "dollars a step"]
    whole, recorded = "The whole run, with repeated steps.", "The steps in metrics.jsonl."
    return table(head, rows, caption=whole if is_whole else recorded)


def _cost_row(name: str, used: Mapping[str, float], steps: int) -> list[str]:
    calls, seconds, dollars = used["calls"], used["seconds"], used["dollars"]
    total = calls + used["cached"]
    cached = f"{used['cached']:,.0f} ({percent(used['cached'] / total)})" if total else "–"
    amounts = [f"{used[field]:,.0f}" for field in ("retries", "input_tokens", "output_tokens")]
    waited = fixed(seconds / calls, 2) if calls and seconds else "–"
    costs = (_dollars(dollars), _dollars(dollars / max(steps, 1)))
    return [name, f"{calls:,.0f}", cached, *amounts, waited, *costs]
