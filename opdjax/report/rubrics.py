"""The part of a run's page that is about rewards that judges gave: what they praise, whether it is true, what it took to have them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opdjax.report import judgements, measures
from opdjax.report.charts import Chart, grid, legend
from opdjax.report.judgements import Group, Rate, Steps
from opdjax.report.markup import (
    Html,
    count,
    definitions,
    details,
    duration,
    fixed,
    join,
    notice,
    number,
    section,
    table,
    table_row,
    tabs,
    tag,
)
from opdjax.report.rollouts import percent, prompt_text
from opdjax.report.rubrics_charts import (
    answer_texts,
    auc_chart,
    from_columns,
    over_steps,
    pass_matrix,
    shortened,
    truth_histogram,
    truth_key,
    truth_table,
)
from opdjax.results import Run, is_number, mean

RECIPES = ("ropd", "ropd_stages", "tjudge")  # that learn from what a judge says
_STUDENT, _REFERENCES = 0, 1  # colours
_EXAMPLE_STEPS = 3
_QUESTION = 3000  # letters
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


def is_judged(run: Run) -> bool:
    """Whether the run learns from what a judge says of whole answers."""
    return run.config["estimator"]["recipe"] in RECIPES


def judge_name(run: Run) -> str:
    """The model that gives the verdicts; "a judge" where the config does not tell."""
    return (run.config.get("verifier") or {}).get("model") or "a judge"


def judged_sections(run: Run) -> list[Html | None]:
    """Everything about rewards that judges gave; empty where the run has none."""
    steps = judgements.read_judgements(run.workdir, _stage_names(run))
    if not steps:
        return [_of_metrics(run), cost_section(run)]
    return [
        rubrics_section(steps), signal_section(steps), truth_section(steps), stages_section(run, steps), failures_section(run, steps),
        cost_section(run), examples_section(steps),
    ]  # fmt: skip


def _stage_names(run: Run) -> list[str]:
    return list((run.config.get("rubrics") or {}).get("stage_names") or ())


def end_length(steps: Steps) -> int:
    """Steps at the start, and as many at the end, that are compared; they never overlap where there are two."""
    return max(1, min(measures.end_length(len(steps)), len(steps) // 2))


def _smoothed(num_steps: int) -> str:
    window = measures.smoothing_window(num_steps)
    return f" Pale: every step; strong: mean over {window} steps." if window > 1 else ""


# What is rewarded


def rubrics_section(steps: Steps) -> Html:
    """How many criteria rollouts and references meet, by kind, and the scores that come of it."""
    groups = judgements.all_groups(steps)
    has_rubrics = any(row.criteria for group in groups for row in group.rows)
    about = (
        "A judge reads the rollouts of a prompt beside reference answers of a stronger model, writes a rubric (weighted criteria) that "
        "tells better answers from worse, and checks every answer against it. The score, the met criteria's share of the weights, is the "
        "reward. References are checked too, and never trained on: they show what the same rubric gives a strong answer. Good: the "
        "student's line climbs towards that of the references."
        if has_rubrics
        else "A judge reads the rollouts of a prompt, beside reference answers where there are any, and gives each a score from 0 to 1, "
        "which is its reward. Good: the student's line climbs towards that of the references."
    )
    changing = (
        " Rubrics are usually written anew at every visit and aim at what the rollouts still lack, so a flat line need not mean that "
        "nothing was learned: look at the gap to the references as well."
        if has_rubrics
        else ""
    )
    return section(
        "rubrics", "What the judge rewards",
        tag("p", progress_sentence(steps), class_="told"),
        tag("p", about, changing, _smoothed(len(steps)), class_="quiet"),
        legend([("rollouts of the student", _STUDENT), ("references", _REFERENCES)]),
        grid(figure for figure in _pass_charts(steps, groups, has_rubrics) if figure is not None),
        _pass_table(steps, groups, has_rubrics),
    )  # fmt: skip


def progress_sentence(steps: Steps) -> str:
    """How the student's pass rate (without rubrics: its score) and its gap to the references went from start to end."""
    groups, length = judgements.all_groups(steps), end_length(steps)
    has_rubrics = judgements.pass_rate(groups) is not None
    measure = judgements.pass_rate if has_rubrics else judgements.mean_score
    what = "Rollouts met {} of the criteria" if has_rubrics else "Rollouts scored {} on average"
    shown = percent if has_rubrics else fixed
    if len(steps) < 2:
        rate = measure(groups)
        return f"{what.format(shown(rate.value))} in the one step so far." if rate else "No rollout has a score yet."
    early, late = (measure(part) for part in judgements.ends(steps, length))
    if early is None or late is None:
        rate = measure(groups)
        return f"{what.format(shown(rate.value))}." if rate else "No rollout has a score."
    change = late.less(early)
    is_clear = abs(change.value) > change.half_width
    verdict = ("a clear rise" if change.value > 0 else "a clear fall") if is_clear else "no clear change"
    over = f"in the first {count(length, 'step')} and {shown(late.value)} in the last {length:,}: {verdict}"
    return f"{what.format(shown(early.value))} {over}.{_gap_words(steps, length, measure, has_rubrics)}"


def _gap_words(steps: Steps, length: int, measure: Any, has_rubrics: bool) -> str:
    ends = judgements.ends(steps, length)
    gaps = [(other.value - own.value) for part in ends if (own := measure(part)) and (other := measure(part, of_references=True))]
    if len(gaps) < 2:
        return ""
    first, last = (f"{100 * gap:.1f}".replace("-", "−") if has_rubrics else fixed(gap) for gap in gaps)
    return f" The references' lead went from {first} to {last}{' points' if has_rubrics else ''}."


def _pass_charts(steps: Steps, groups: Sequence[Group], has_rubrics: bool) -> list[Html | None]:
    def both(measure: Any) -> list[tuple[int, Any]]:
        return [(_STUDENT, measure), (_REFERENCES, lambda part: measure(part, of_references=True))]

    score = Chart("Score", "step", "mean score", "The reward itself, weights included, from 0 to 1.", bounds=(0, 1))
    found = [over_steps(score, steps, both(judgements.mean_score))]
    if not has_rubrics:
        return found
    about = "Share of the criteria that are met, each counted once whatever its weight."
    found.append(over_steps(_share_chart("Pass rate, all criteria", about), steps, both(judgements.pass_rate)))
    named = judgements.categories(groups)
    for name in named if len(named) > 1 else ():
        chart = _share_chart(f"Pass rate, {name}", None)
        found.append(
            over_steps(chart, steps, both(lambda part, name=name, **kw: judgements.pass_rate(part, name, named, **kw)))
        )  # fmt: skip
    return found


def _share_chart(title: str, about: str | None) -> Chart:
    return Chart(title, "step", "share met", about, y_range=(-0.02, 1.02))


def _pass_table(steps: Steps, groups: Sequence[Group], has_rubrics: bool) -> Html | None:
    """Start against end, by kind of criterion (as Table 5 of the ROPD paper has it)."""
    if not has_rubrics or len(steps) < 2:
        return None
    length, named = end_length(steps), judgements.categories(groups)
    rows = [_pass_row(name, steps, length, name, named) for name in (named if len(named) > 1 else ())]
    rows.append(_pass_row("all criteria", steps, length, None, named, class_="main"))
    head = ["criteria", f"rollouts: first {length:,}", f"last {length:,}", "change", f"references: first {length:,}", f"last {length:,}"]
    caption = (
        f"Percent of criteria met in the first and in the last {count(length, 'step')} of {len(steps):,}. ± is half a 95 % interval that "
        "takes groups (the rollouts of one prompt) as independent. For scale: ROPD (arXiv 2605.07396, Table 5) reports 52.5 → 65.6 for a "
        "student of 4 B parameters."
    )
    return table([*head, "share of the criteria"], [*rows], caption=caption)


def _pass_row(label: str, steps: Steps, length: int, category: str | None, named: Sequence[str], **attributes: Any) -> Html:
    parts = judgements.ends(steps, length)
    own, other = ([judgements.pass_rate(part, category, named, of_references=kind) for part in parts] for kind in (False, True))
    change = own[1].less(own[0]) if all(own) else None
    part, whole = (judgements.pass_rate(judgements.all_groups(steps), name, named) for name in (category, None))
    share = percent(part.count / whole.count) if part and whole else "–"
    return table_row([label, *map(_points, own), _points(change, signed=True), *map(_points, other), share], **attributes)


def _points(rate: Rate | None, *, signed: bool = False) -> str:
    """Percent with half an interval, such as 54.0 ± 3.1."""
    if rate is None:
        return "–"
    sign = "+" if signed and rate.value > 0 else ""
    half = fixed(100 * rate.half_width, 1) if is_number(rate.half_width) else "∞"
    return f"{sign}{fixed(100 * rate.value, 1)} ± {half}"


# How much they tell apart


def signal_section(steps: Steps) -> Html | None:
    """What part of the judging says nothing that training could use."""
    groups = judgements.all_groups(steps)
    found, tied = judgements.signal(groups), judgements.tied_share(groups)
    if found.share is None and tied is None:
        return None
    told = []
    if found.share is not None:
        all_, none = percent(found.met_by_all / found.num_criteria), percent(found.met_by_none / found.num_criteria)
        told.append(
            f"{percent(found.share)} of the criteria told no rollout from another ({all_} were met by all of a group, {none} by none)"
        )
    if tied is not None:
        told.append(f"{percent(tied)} of the groups had one score for all rollouts and taught nothing")
    about = (
        "Training compares the rollouts of one prompt. A criterion that all of them meet, or none, shifts every score alike and drops out; "
        "a group whose scores are all the same has no gradient at all. Good: low and steady. A growing share met by all means that prompts "
        "or rubrics have become too easy, one met by none that they are too hard."
    )
    key = legend([("all alike", 0), ("met by all rollouts", 2), ("met by none", 1)]) if found.share is not None else None
    return section(
        "signal", "How much the judge tells apart",
        tag("p", "; ".join(told) + ".", class_="told"), tag("p", about, _smoothed(len(steps)), class_="quiet"), key,
        grid(figure for figure in _signal_charts(steps) if figure is not None),
    )  # fmt: skip


def _signal_charts(steps: Steps) -> list[Html | None]:
    def share(field: str) -> Any:
        return lambda part: (lambda s: getattr(s, field) / s.num_criteria if s.num_criteria else None)(judgements.signal(part))

    alike = Chart(
        "Criteria without signal", "step", "share of the criteria", "Criteria on which all rollouts of their group got the same verdict.",
        bounds=(0, 1),
    )  # fmt: skip
    tied = Chart("Tied groups", "step", "share of the groups", "Groups whose rollouts all have the same score.", bounds=(0, 1))
    size = Chart("Criteria in a rubric", "step", "criteria, mean", "More cost more tokens, and only those that tell apart help.")
    return [
        over_steps(alike, steps, [(0, share("alike")), (2, share("met_by_all")), (1, share("met_by_none"))]),
        over_steps(tied, steps, [(0, judgements.tied_share)]),
        over_steps(size, steps, [(0, judgements.num_criteria)]),
    ]


# Reward against truth


def truth_section(steps: Steps) -> Html | None:
    """Whether the reward prefers right answers; None where nobody knows which are."""
    groups = judgements.all_groups(steps)
    right, wrong = judgements.scores_by_truth(groups)
    if not right.size + wrong.size:
        return None
    about = (
        "The right answers of this run's prompts are known. They play no part in training, so they can tell whether the judge's reward is "
        "earned: whether a right final answer scores above a wrong one. Only differences inside of a group (rollouts of the same prompt) "
        "move the student, so the pairs of a group count most. A pair whose wrong answer scores higher is a bad update: it pushes the "
        "student towards what is wrong. Good: AUC near 1, few bad updates, and the share of right answers rising along with the reward. A "
        "reward that rises alone is being exploited."
    )
    figures = [_reward_and_truth(steps), auc_chart(steps), _pairs_chart(steps), truth_histogram(right, wrong)]
    key = legend([("mean reward", 0), ("share of right answers", 2)])
    return section(
        "truth", "Reward against right answers",
        tag("p", truth_sentence(groups), class_="told"), tag("p", about, _smoothed(len(steps)), class_="quiet"),
        key, truth_key(), grid(figure for figure in figures if figure is not None),
        _truth_rows(steps), details("Answers by score", truth_table(right, wrong)),
    )  # fmt: skip


def truth_sentence(groups: Sequence[Group]) -> str:
    """AUC and bad updates in words."""
    rate, pairs = judgements.auc(groups), judgements.pairs(groups)
    if rate is None:
        only = "right" if judgements.scores_by_truth(groups)[0].size else "wrong"
        return f"All scored answers are {only}, so that there is nothing to compare."
    first = f"A right answer scored above a wrong one with probability {_with_half(rate)} (AUC; 0.5 is chance)."
    if not pairs.total:
        return f"{first} No group held right and wrong answers together."
    return (
        f"{first} Of {count(pairs.total, 'pair')} of a right and a wrong answer to the same prompt, the right one scored higher in "
        f"{percent(pairs.right / pairs.total)}, the wrong one in {percent(pairs.wrong / pairs.total)} (bad updates), and "
        f"{percent(pairs.tied / pairs.total)} were tied."
    )


def _with_half(rate: Rate) -> str:
    return f"{fixed(rate.value)} ± {fixed(rate.half_width) if is_number(rate.half_width) else '∞'}"


def _reward_and_truth(steps: Steps) -> Html | None:
    about = "They should rise together; a reward that leaves the right answers behind is being exploited."
    chart = Chart("Reward and right answers", "step", "mean reward, share right", about, bounds=(0, 1))
    return over_steps(chart, steps, [(0, judgements.mean_score), (2, judgements.share_right)])


def _pairs_chart(steps: Steps) -> Html | None:
    def bad(part: list[Group]) -> float | None:
        found = judgements.pairs(part)
        return found.wrong / found.total if found.total else None

    about = "Of all pairs of a right and a wrong answer to one prompt, those whose wrong answer scored higher. Good: near 0."
    return over_steps(Chart("Bad updates", "step", "share of the pairs", about, bounds=(0, 1)), steps, [(0, bad)])


def _truth_rows(steps: Steps) -> Html:
    length, whole = end_length(steps), judgements.all_groups(steps)
    parts = {"all steps": whole}
    if len(steps) > 1:
        early, late = judgements.ends(steps, length)
        parts = {f"first {count(length, 'step')}": early, f"last {count(length, 'step')}": late} | parts
    head = [
        "",
        "scored answers",
        "share right",
        "mean score: right",
        "wrong",
        "AUC",
        "pairs in groups",
        "right higher",
        "tied",
        "bad updates",
    ]
    rows = [
        table_row(_truth_row(name, part), class_="main" if name == "all steps" and len(parts) > 1 else None) for name, part in parts.items()
    ]
    caption = (
        "AUC: over all pairs of a right and a wrong answer, of whatever prompt; ± is half a 95 % interval that takes groups as independent. "
        "For scale: ROPD (arXiv 2605.07396, Table A4) reports an AUC of 0.90 and 15 % of bad updates over its own checkpoints."
    )
    return table(head, rows, caption=caption, class_="dense")


def _truth_row(name: str, groups: Sequence[Group]) -> list[Any]:
    right, wrong = judgements.scores_by_truth(groups)
    rate, pairs = judgements.auc(groups), judgements.pairs(groups)
    shares = [percent(part / pairs.total) if pairs.total else "–" for part in (pairs.right, pairs.tied, pairs.wrong)]
    means = [fixed(mean(map(float, scores))) for scores in (right, wrong)]
    amount = right.size + wrong.size
    share = percent(right.size / amount) if amount else "–"
    return [name, f"{amount:,}", share, *means, "–" if rate is None else _with_half(rate), f"{pairs.total:,}", *shares]


# Stages


def stages_section(run: Run, steps: Steps) -> Html | None:
    """The scores of an answer's stages; None where answers are not divided."""
    means = judgements.stage_means(judgements.all_groups(steps))
    if not means.size:
        return None
    names = _stage_names(run)
    names = names if len(names) == means.size else [f"stage {place + 1}" for place in range(means.size)]
    parts = [(place, lambda groups, place=place: _at(judgements.stage_means(groups), place)) for place in range(min(len(names), 6))]
    about = (
        "Answers are divided into stages, and each stage is scored by the criteria that look at it, so that credit goes to the tokens that "
        "earned it (RubricEM, arXiv 2605.10899). A stage that stays low while the others rise is where the student is stuck."
    )
    chart = Chart("Score of each stage", "step", "mean score", "Over rollouts whose rubric looks at the stage.", y_range=(-0.02, 1.02))
    ends = [judgements.stage_means(part) for part in judgements.ends(steps, end_length(steps))]
    rows = [[name, *(fixed(_at(one, place)) for one in ends), fixed(_at(means, place))] for place, name in enumerate(names)]
    length = end_length(steps)
    head = ["stage", f"first {count(length, 'step')}", f"last {count(length, 'step')}", "all"]
    figure = over_steps(chart, steps, parts)
    return section(
        "stages", "Stages of an answer", tag("p", about, _smoothed(len(steps)), class_="quiet"),
        legend([(name, place) for place, name in enumerate(names[:6])]), grid([figure] if figure is not None else []), table(head, rows),
    )  # fmt: skip


def _at(values: np.ndarray, place: int) -> float:
    return float(values[place]) if place < values.size else math.nan


# Failures


def failures_section(run: Run, steps: Steps) -> Html:
    """Groups without a reward, and why."""
    groups = judgements.all_groups(steps)
    failed, problems, repairs = (sum(g.is_failed for g in groups), *(judgements.counted(groups, kind) for kind in ("problems", "repairs")))
    unscored = sum(int((~np.isfinite(group.scores)).sum()) for group in groups)
    rollouts = sum(group.scores.size for group in groups)
    about = (
        "A judge's reply that cannot be had or used is asked for again, with what was wrong; where that fails too, its rollouts have no "
        "reward. They are left out of the update, from its numerators and denominators alike, and not taken for bad answers. A group "
        "fails where fewer than two of its rollouts have a score. Good: near 0."
    )
    told = f"{failed:,} of {count(len(groups), 'group')} failed ({percent(failed / len(groups))}); {unscored:,} of {rollouts:,} rollouts have no score."
    key, figures = _failure_charts(run, steps, problems)
    return section(
        "failures", "Replies that failed", tag("p", told, class_="told"), tag("p", about, _smoothed(len(steps)), class_="quiet"), key,
        grid(figure for figure in figures if figure is not None),
        _counts_table("Replies that could not be used", "problem", problems, _PROBLEMS, len(groups)),
        _counts_table("Replies that were put right", "repair", repairs, _REPAIRS, len(groups)),
    )  # fmt: skip


def _failure_charts(run: Run, steps: Steps, problems: Counter) -> tuple[Html | None, list[Html | None]]:
    limit = (run.config.get("rubrics") or {}).get("max_failed_share")
    has_failed = any(group.is_failed for groups in steps.values() for group in groups)
    stops = f" A step above {percent(limit)} stops the run (rubrics.max_failed_share)." if is_number(limit) else ""
    chart = Chart("Failed groups", "step", "share of the groups", f"Groups that taught nothing for want of scores.{stops}", bounds=(0, 1))
    figures = [over_steps(chart, steps, [(0, judgements.failed_share)])] if has_failed else []
    kinds = [name for name, amount in problems.most_common(6) if amount]
    if kinds:
        about = "Replies that could not be used, by what was wrong with them; most are mended by asking again."
        parts = [(place, lambda groups, kind=kind: judgements.counted(groups, "problems")[kind]) for place, kind in enumerate(kinds)]
        figures.append(over_steps(Chart("Problems a step", "step", "replies", about, bounds=(0, None)), steps, parts))
    return legend([(name, place) for place, name in enumerate(kinds)]) if kinds else None, figures


def _counts_table(title: str, noun: str, counts: Counter, meanings: Mapping[str, str], groups: int) -> Html | None:
    if not sum(counts.values()):
        return tag("p", f"{title}: none.", class_="quiet")
    rows = [[name, f"{amount:,}", fixed(100 * amount / groups, 1), tag("td", meanings.get(name, ""), class_="wrap text")]
            for name, amount in counts.most_common() if amount]  # fmt: skip
    head = [noun, "in all", "per 100 groups", tag("th", "what it means", class_="text", scope="col")]
    return join((tag("h3", title), table(head, rows)))


# Cost


def cost_section(run: Run) -> Html | None:
    """What judges were asked, what it cost, and how long the learner waited; None where nobody was asked."""
    roles = _roles(run)
    waits = run.column("time/judge_wait")
    if not roles and all(value is None for value in waits):
        return None
    about = (
        "Every question to a judge by the role it was asked in: the rubricator writes rubrics, the verifier checks answers against them. "
        "Replies from the cache cost nothing. Waiting is the time in which the learner stood still for judges after all rollouts were drawn; "
        "good is a small share of the step."
    )
    key = legend([(role, place) for place, role in enumerate(roles[:6])]) if len(roles) > 1 else None
    return section(
        "judge-cost", "What judging cost", *(tag("p", text, class_="told") for text in [_cost_sentence(run, roles)] if text),
        tag("p", about, _smoothed(len(run.metrics)), class_="quiet"), key,
        grid(figure for figure in _cost_charts(run, roles) if figure is not None), _cost_table(run, roles),
    )  # fmt: skip


def _roles(run: Run) -> list[str]:
    found = {match[1] for row in run.metrics for name in row if (match := re.fullmatch(r"api/([^/]+)/calls", name))}
    return sorted(found | {row["role"] for row in judgements.read_spending(run.workdir)})


def _totals(run: Run, roles: Sequence[str]) -> tuple[dict[str, Counter], bool]:
    """(by role what was used, whether that is of the whole run): spending.jsonl also knows of steps that were done again or never ended."""
    spending = judgements.read_spending(run.workdir)
    rows = spending or [
        {"role": role} | {name.rpartition("/")[2]: value for name, value in row.items() if name.startswith(f"api/{role}/")}
        for row in run.metrics for role in roles
    ]  # fmt: skip
    found: dict[str, Counter] = {role: Counter() for role in roles}
    for row in rows:
        found[row["role"]].update({name: value for name, value in row.items() if name not in ("step", "role") and is_number(value)})
    return found, bool(spending)


def _cost_sentence(run: Run, roles: Sequence[str]) -> str:
    total, parts = Counter(), []
    for used in _totals(run, roles)[0].values():
        total.update(used)
    if roles:
        steps = max(len(run.metrics), 1)
        parts.append(
            f"{count(int(total['calls']), 'call')} with {_tokens(total['input_tokens'] + total['output_tokens'])} tokens, "
            f"{_dollars(total['dollars'])} ({_dollars(total['dollars'] / steps)} a step)"
        )
    waited, spent = (sum(value for value in run.column(name) if value is not None) for name in ("time/judge_wait", "time/step"))
    if waited and spent:
        parts.append(f"the learner waited for judges {percent(waited / spent)} of its time ({duration(waited)})")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _dollars(value: float) -> str:
    if not value:
        return "$0"
    return f"${value:,.2f}" if value >= 1 else f"${float(f'{value:.2g}'):g}"


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
        return [(place, [_sum(values) for values in zip(*parts)]) for place, parts in enumerate(columns)]

    charts = [
        (Chart("Calls a step", "step", "calls", "Asked of each role, retries apart.", bounds=(0, None)), by_role("calls")),
        (
            Chart("Tokens a step", "step", "tokens read and written", "Grows with the length of the answers.", bounds=(0, None)),
            by_role("input_tokens", "output_tokens"),
        ),
    ]
    priced = by_role("dollars")
    if any(value for _, values in priced for value in values):
        charts.append((Chart("Dollars a step", "step", "dollars", "By the prices of the config.", bounds=(0, None)), priced))
    charts.append((
        Chart("Waited for judges", "step", "seconds", "After the last rollout of the step was drawn.", bounds=(0, None)),
        [(0, run.column("time/judge_wait"))],
    ))  # fmt: skip
    return [from_columns(chart, order, columns) for chart, columns in charts]


def _sum(values: Sequence[float | None]) -> float | None:
    return None if all(value is None for value in values) else sum(value for value in values if value is not None)


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
    head = ["role", "calls", "from the cache", "retries", "tokens read", "tokens written", "dollars", "dollars a step"]
    caption = "Of the whole run, steps that were done again included." if is_whole else "Of the steps in metrics.jsonl."
    return table(head, rows, caption=caption)


def _cost_row(name: str, used: Mapping[str, float], steps: int) -> list[str]:
    cached = f"{used['cached']:,.0f} ({percent(used['cached'] / used['calls'])})" if used["calls"] else "–"
    plain = [f"{used[field]:,.0f}" for field in ("retries", "input_tokens", "output_tokens")]
    return [name, f"{used['calls']:,.0f}", cached, *plain, _dollars(used["dollars"]), _dollars(used["dollars"] / max(steps, 1))]


# Examples


def examples_section(steps: Steps) -> Html | None:
    """A few groups as the judge saw them; None where no texts were written down."""
    logged = [step for step, groups in steps.items() if any(_has_texts(group) for group in groups)]
    if not logged:
        return None
    chosen = sorted({logged[round(at * (len(logged) - 1) / (_EXAMPLE_STEPS - 1))] for at in range(_EXAMPLE_STEPS)})
    views = {f"step {step:,}": _example(_telling(steps[step])) for step in chosen}
    about = (
        f"From {'the one step' if len(logged) == 1 else f'{len(views)} of {len(logged)} steps'} whose texts were written down: the first "
        "prompt whose rollouts do not all score alike. Texts are as the judge saw them, without what was thought aloud."
    )
    return section("judged", "Judged answers", tag("p", about, class_="quiet"), tabs("judged-step", views, "From"))


def _has_texts(group: Group) -> bool:
    return "answers" in group.rows[0].texts or "question" in group.rows[0].texts


def _telling(groups: Sequence[Group]) -> Group:
    """The first group with texts whose scores differ; else the first that has scores, or texts."""
    known = [group for group in groups if _has_texts(group)]
    return min(known, key=lambda group: {False: 0, True: 1, None: 2}[group.is_tied])


def _example(group: Group) -> Html:
    known = group.scores[np.isfinite(group.scores)]
    group_mean = float(known.mean()) if known.size > 1 else None
    # Where each rollout has a rubric of its own, a few tell what such rubrics are like.
    rows = group.rows[:2]
    parts = [tag("h4", "Question"), tag("div", shortened(prompt_text(rows[0].texts.get("question", "")), _QUESTION), class_="prompt")]
    question = tag("div", *parts, class_="rollout") if "question" in rows[0].texts else None
    shown = [join((pass_matrix(row, group_mean), _failure_note(row), answer_texts(row, group_mean))) for row in rows]
    more = tag("p", f"Each rollout has a rubric of its own; {len(group.rows) - 2} more are not shown.", class_="quiet")
    return join((tag("p", f"Prompt {group.rows[0].prompt_id}", class_="quiet"), question, *shown, more if len(group.rows) > 2 else None))


def _failure_note(row: judgements.Judged) -> Html | None:
    if np.isfinite(row.scores).any():
        return None
    causes = ", ".join(f"{name} {amount}" for name, amount in row.problems.items() if amount)
    return notice(f"Nobody could say what these answers are worth{f' ({causes})' if causes else ''}.")


# Without rows


def _of_metrics(run: Run) -> Html | None:
    """What metrics.jsonl alone tells where rubrics.jsonl is missing; None where it tells nothing."""
    order = measures.steps_of(run)
    charts = {
        "Score": ("mean score", ("rubric/reward_mean", "rubric/reference_score_mean"), "The reward, and the score of the references."),
        "Criteria without signal": ("share", ("rubric/no_signal_share",), "Criteria that all rollouts of a group meet alike."),
        "Tied groups": ("share", ("rubric/tied_groups",), "Groups whose rollouts all have the same score."),
        "Criteria in a rubric": ("criteria, mean", ("rubric/num_criteria",), None),
        "AUC": ("AUC", ("rubric/auc",), "The chance that a right answer scores above a wrong one of the same step."),
        "Failed groups": ("share", ("rubric/failed_share",), "Groups that have no reward."),
    }
    figures = [
        from_columns(Chart(title, "step", label, about), order, [(slot, run.column(name)) for slot, name in enumerate(names)])
        for title, (label, names, about) in charts.items()
    ]
    if all(figure is None for figure in figures):
        return None
    missing = notice(f"{judgements.ROWS} is missing or empty, so this is what metrics.jsonl tells by itself.")
    key = legend([("rollouts of the student", _STUDENT), ("references", _REFERENCES)])
    return section(
        "rubrics", "What the judge rewards", missing, tag("p", _smoothed(len(order)).strip() or None, class_="quiet"), key,
        grid(figure for figure in figures if figure is not None),
    )  # fmt: skip
