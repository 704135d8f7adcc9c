"""The page of one run: what was trained, the result, and how training went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdjax.report import measures
from opdjax.report.answers import Marker, first_and_last, unmarked
from opdjax.report.charts import Chart, ChartLine, draw, grid
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
    plus_minus,
    quiet,
    section,
    shown,
    table,
    table_row,
    tabs,
    tag,
)
from opdjax.report.near_policy import filter_section, staleness_section
from opdjax.report.render import part
from opdjax.report.rollouts import rollouts_section
from opdjax.report.rubrics import judge_name, judged_sections
from opdjax.report.settings import settings_section
from opdjax.report.timeline import cost_section, timeline_of, timeline_section
from opdjax.report.training_curves import positions_section, training_section
from opdjax.runs.results import AXES, Run, is_number

_COMPLETIONS = {
    "student": "On-policy: the student sampled completions and was trained on those very tokens.",
    "teacher": "Off-policy: the teacher wrote the completions that the student was trained on.",
    "references": "Off-policy: the student was trained on the reference answers of the data.",
}
_SCHEDULES = {
    "refresh": "Near-policy: the student answered all prompts at once and was trained on the kept"
    " answers for whole epochs, until new rollouts were sampled.",
    "continuous": "Near-policy: rollouts were sampled ahead of their update, so the student was a"
    " few updates newer than the policy that sampled them.",
}
_TEACHER_NEEDS = {
    "none": "The loss used no probabilities of a teacher.",
    "token": "The teacher gave its probability of every trained token.",
    "top_k": "The teacher gave its most likely tokens and their probabilities at every position.",
    "vocabulary": "The teacher gave its next-token distribution at every position.",
}
_AXIS_NOTES = {
    "steps": "optimizer updates",
    "generated tokens": "tokens that the student sampled in training",
    "trained tokens": "tokens that carried a gradient",
    "teacher tokens": "tokens that the teacher read or wrote",
    "seconds": "seconds of training, without evaluations",
}


def run_page(
    run: Run, failure: dict[str, Any] | None, mark: Marker = unmarked
) -> tuple[str, list[Html | None]]:
    """(title, parts of the page)."""
    title, timeline = _title(run), timeline_of(run)
    parts = [
        _header(run, failure, title),
        _result(run),
        _scores(run),
        *judged_sections(run),
        training_section(run),
        staleness_section(run),
        filter_section(run),
        timeline_section(run, timeline),
        cost_section(run, timeline),
        positions_section(run),
        _answers(run, mark),
        rollouts_section(run),
        settings_section(run),
    ]
    return f"{title}, {run.config['estimator']['recipe']}", parts


def _answers(run: Run, mark: Marker) -> Html | None:
    found = first_and_last(run, mark)
    return Html(part("answers.html", "first_and_last", found).strip()) if found else None


# What was trained


def _title(run: Run) -> str:
    """The student, and what it was trained towards."""
    names = (measures.model_name(run.config[role]["path"]) for role in ("student", "teacher"))
    (student, teacher), recipe = names, measures.recipe_of(run)
    writer = measures.completions_from(run)
    if recipe is not None and recipe.is_judged:
        return f"{student}, judged by {measures.model_name(judge_name(run))}"
    if recipe is not None and recipe.is_rewarded:
        return f"{student} ← graded answers"
    if measures.teacher_need(run) != "none" or writer == "teacher":
        return f"{student} ← {teacher}"
    return f"{student} ← {'reference answers' if writer == 'references' else 'its own samples'}"


def _header(run: Run, failure: dict[str, Any] | None, title: str) -> Html:
    recipe = measures.recipe_of(run)
    schedule = run.config["near_policy"]["schedule"] if run.is_near_policy else None
    sentences = (
        _SCHEDULES[schedule] if schedule else _COMPLETIONS.get(measures.completions_from(run)),
        _TEACHER_NEEDS.get(measures.teacher_need(run)),
        recipe.description if recipe else None,
    )
    options = ", ".join(
        f"{name} {shown(value)}" for name, value in measures.estimator_options(run).items()
    )
    return tag(
        "header",
        tag("h1", title),
        tag("p", outcome(run), class_="lead"),
        quiet(
            *(f"{sentence} " for sentence in sentences if sentence),
            "Recipe ",
            tag("code", run.config["estimator"]["recipe"]),
            f" ({options})." if options else ".",
        ),
        *(notice(text, kind="warning") for text in _warnings(run)),
        None if failure is None or run.result else failure_block(failure),
    )


def outcome(run: Run) -> str:
    """The result in one sentence."""
    rows = measures.evaluated(run)
    spent = f"{count(_steps_done(run), 'step')}, {duration(_seconds(run))}"
    if not rows:
        kl = [value for value in run.column("kl/student_teacher") if value is not None]
        if not kl:
            return f"{spent} of training, without an evaluation."
        text = f"{spent} of training, without an evaluation; KL(student || teacher) was"
        if len(run.metrics) < 2:
            return f"{text} {number(kl[0])} nats a token."
        end = number(measures.end_mean(run, "kl/student_teacher"))
        last = count(measures.end_length(len(run.metrics)), "step")
        return f"{text} {number(kl[0])} nats a token at first and {end} over the last {last}."
    name = measures.score_label("avg@k", rows[0].get("k"))
    if run.result is None or "paired_difference" not in run.result:
        first, last = (f"{fixed(row['avg@k'])}" for row in (rows[0], rows[-1]))
        if len(rows) == 1:
            only = f"at step {rows[0]['step']}, the only evaluation"
            return f"{name} is {first} {only} ({spent} so far)."
        return f"So far {name} went from {first} to {last} (step {rows[-1]['step']}); {spent} done."
    change = run.result["paired_difference"]
    gain, interval = change["avg@k"], change["avg@k_interval"]
    is_clear = is_number(interval) and abs(gain) > interval
    verb = ("rose" if gain > 0 else "fell") if is_clear else "did not change measurably: it went"
    ends = (fixed(run.result[f"eval_{when}"]["avg@k"]) for when in ("before", "after"))
    paired = f"paired gain {plus_minus(gain, interval, signed=True)}"
    return f"{name} {verb} from {' to '.join(ends)} ({paired}) in {spent}."


def _warnings(run: Run) -> list[str]:
    found = []
    if run.result is None:
        done, planned = _steps_done(run), run.config["train"]["num_steps"]
        share = f"{done / planned:.0%}"
        found.append(f"Not finished: {done:,} of {planned:,} steps ({share}) are done.")
    skipped = skipped_steps(run)
    if skipped:
        rows = [row for row in run.metrics if "loss/objective" in row]
        where = [str(row["step"]) for row in rows if not is_number(row["loss/objective"])]
        steps = f": {', '.join(where[:10])}{' …' if len(where) > 10 else ''}" if where else ""
        cause = "skipped because the loss or gradient was not finite"
        found.append(f"{count(skipped, 'step')} {cause}{steps}.")
    left_out = run.data.get("num_skipped")
    if left_out:
        limit = f"data.max_prompt_length = {run.config['data']['max_prompt_length']} tokens"
        found.append(f"{count(left_out, 'prompt')} left out: longer than {limit}.")
    cut = measures.end_mean(run, "rollout/truncated_ratio")
    if cut is not None and cut > 0.05:
        what = f"{cut:.0%} of completions were cut off at the length limit"
        found.append(f"At the end of training {what}.")
    return found


def skipped_steps(run: Run) -> int:
    """Updates that were skipped because the loss or gradient was not finite."""
    counted = [value for value in run.column("grad/skipped_steps") if value is not None]
    return int((run.result or {}).get("skipped_steps") or (counted[-1] if counted else 0))


def failure_block(failure: dict[str, Any]) -> Html:
    """Why a run failed: short facts on one line, longer texts unchanged."""
    lines = {
        name: "\n".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in failure.items()
    }
    texts = {name: text for name, text in lines.items() if "\n" in text.strip()}
    facts = "; ".join(f"{name}: {lines[name].strip()}" for name in lines if name not in texts)
    long = [join((tag("p", name), tag("pre", text))) for name, text in texts.items()]
    cause = tag("p", tag("strong", "Failed. "), facts)
    return tag("div", cause, *long, class_="notice warning")


def _steps_done(run: Run) -> int:
    return run.metrics[-1]["step"] if run.metrics else 0


def _seconds(run: Run) -> float | None:
    return measures.total(run, "seconds") if run.seconds is None else run.seconds


# The result


def _result(run: Run) -> Html | None:
    result, rows = run.result or {}, measures.evaluated(run)
    if not rows:
        return None
    k, temperature = rows[0].get("k"), rows[0].get("temperature")
    last = result.get("eval_after", rows[-1])
    lines = [_score_row("before training", result.get("eval_before", rows[0]))]
    sharpened = result.get("eval_before_sharpened", ())
    for row in sharpened:
        degree = "more" if row["temperature"] < temperature else "less"
        lines.append(_score_row(f"before, sampled {degree} sharply", row))
    if last["step"] != rows[0]["step"]:
        name = "after training" if run.result else f"at step {last['step']}"
        lines.append(_score_row(name, last, class_="main"))
    change = result.get("paired_difference")
    if change:
        pairs = ((change.get(name), change.get(f"{name}_interval")) for name in measures.SCORES)
        cells = (plus_minus(*pair, signed=True) for pair in pairs)
        lines.append(table_row(["gain, paired by prompt", "", *cells]))
    avg, greedy, best = (measures.score_label(name, k) for name in measures.SCORES)
    caption = (
        f"{count(last['num_prompts'], 'held-out prompt')} ({run.config['evaluation']['source']});"
        " ± is half a 95 % interval over prompts."
    )
    words = {
        avg: f"share of right answers among {k} samples per prompt, averaged over prompts",
        greedy: "share of prompts whose most likely answer (T = 0) is right",
        best: f"share of prompts with at least one right answer among {k} samples",
        "T": f"sampling temperature; results are compared at {number(temperature)}",
    }
    if sharpened:
        words["more sharply"] = (
            "the untrained student at a lower temperature: a gain no larger than this is"
            " sharpening, not learning"
        )
    if change:
        words["paired"] = (
            "both students answered the same prompts; the interval is of the difference per prompt"
        )
    box = table(["student", "T", avg, greedy, best], lines, caption=caption)
    return section("result", "Result", box, definitions(words))


def _score_row(name: str, row: dict[str, Any], **attributes: Any) -> Html:
    cells = [plus_minus(row.get(score), row.get(f"{score}_interval")) for score in measures.SCORES]
    return table_row([name, number(row.get("temperature")), *cells], **attributes)


def _scores(run: Run) -> Html | None:
    rows = measures.evaluated(run)
    if len(rows) < 2:
        return None
    views = {}
    for axis in AXES:
        spent = measures.totals(run, axis, [row["step"] for row in rows])
        if spent is not None and any(spent):
            views[axis] = grid(_score_chart(rows, spent, axis, name) for name in measures.SCORES)
    note = (
        "The band is a 95 % interval over prompts. All evaluations use the same prompts, so the"
        " errors of neighbouring points are correlated."
    )
    if len(rows) == 2:
        note += " Only the start and the end were evaluated; set evaluation.every for a curve."
    notes = details("Meaning of the axes", definitions({axis: _AXIS_NOTES[axis] for axis in views}))
    choice = tabs("axis", views, "Against")
    return section("scores", "Scores during training", choice, notes, about=note)


def _score_chart(rows: list[dict[str, Any]], spent: list[float], axis: str, name: str) -> Html:
    label = measures.score_label(name, rows[0].get("k"))
    line = _interval_line(
        spent, [row.get(name) for row in rows], [row.get(f"{name}_interval") for row in rows]
    )
    return draw(Chart(label, axis, "share right", bounds=(0, 1)), [line])


def _interval_line(x: Sequence[float], y: list[Any], half: list[Any]) -> ChartLine:
    """A line with its interval; an unknown value leaves a gap."""
    gap = float("nan")
    pairs = [(v, w) if is_number(v) and is_number(w) else (gap, gap) for v, w in zip(y, half)]
    low, high = ([value + sign * width for value, width in pairs] for sign in (-1, 1))
    values = [value if is_number(value) else gap for value in y]
    return ChartLine(x, values, low, high, has_markers=True)
