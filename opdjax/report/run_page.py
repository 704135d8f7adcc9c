"""The page of one run: what was distilled, what came of it, and how training went."""

from __future__ import annotations

from typing import Any

import numpy as np

from opdjax.config import Config
from opdjax.config.validation import to_dict
from opdjax.report import measures
from opdjax.report.charts import Chart, ChartLine, curve, draw, grid, legend, smooth
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
    section,
    shown,
    table,
    table_row,
    tabs,
    tag,
)
from opdjax.report.near_policy import filter_section, staleness_section
from opdjax.report.rollouts import rollouts_section
from opdjax.report.rubrics import is_rewarded, judge_name, judged_sections
from opdjax.report.side_by_side import Marker, progress_section, unmarked
from opdjax.report.timeline import cost_section, timeline_of, timeline_section
from opdjax.runs.results import AXES, Run, is_number

_RECIPES = {
    "opd": "Each sampled token is rewarded with log p_teacher − log p_student and its probability moved by policy gradient.",
    "vopd": "Each sampled token is rewarded with log p_teacher − log p_student, less a baseline (its expectation at that position), which "
    "lowers the variance of the policy gradient and not its mean.",
    "full_kl": "The divergence between the two whole next-token distributions is minimised at every position of the completion.",
    "topk_kl": "The divergence is minimised at every position on a few of the most likely tokens instead of the whole vocabulary.",
    "npd": "Cross-entropy on the student's own kept tokens, mixed with the divergence from the teacher on its most likely tokens.",
    "sft": "Cross-entropy on the given tokens.",
    "ropd": "The reward of an answer is the share of its rubric's weights that it earns (ROPD, arXiv 2605.07396); its advantage over the "
    "other answers to the prompt multiplies a clipped policy gradient.",
    "ropd_stages": "Each stage of an answer is scored by its own criteria and credited with later stages' scores too (RubricEM, arXiv "
    "2605.10899); advantages over the other answers to the prompt multiply a clipped policy gradient.",
    "tjudge": "The reward of an answer is one number from a judge, without a rubric: the control for what rubrics add.",
}
_WRITERS = {
    "student": "On-policy distillation: the student sampled completions of prompts, the teacher gave its probability of every token in "
    "them, and the student was trained towards the teacher on those very tokens.",
    "teacher": "The teacher wrote completions of prompts, and the student was trained on them.",
    "references": "The student was trained on the reference answers of the data.",
}
_AHEAD = {
    "refresh": "Near-policy distillation: the student answered all prompts at once, the teacher gave its probabilities of them, and "
    "the student was trained on what was kept of them for whole epochs, until rollouts were drawn anew.",
    "continuous": "Near-policy distillation: the student sampled completions ahead of the updates that they were for, the teacher gave its "
    "probability of every token in them, and the student, some updates older by then, was trained towards the teacher on those tokens.",
}
_JUDGED = (
    "The student sampled several answers to each prompt, a judge that reads text alone said what each is worth, and the student was "
    "trained towards its better answers. No probabilities of a teacher were used."
)
_SPARSE = (
    "entropy/student",
    "entropy/teacher",
    "overlap/ratio",
)  # told every log.diagnostics_every steps
_AXIS_NOTES = {
    "steps": "optimizer updates",
    "generated tokens": "tokens that the student sampled in training",
    "trained tokens": "tokens that carried a gradient",
    "teacher tokens": "tokens that the teacher read or wrote",
    "seconds": "seconds of training, evaluations not counted",
}


def run_page(
    run: Run, failure: dict[str, Any] | None, mark: Marker = unmarked
) -> tuple[str, list[Html | None]]:
    """(title, parts of the page)."""
    student, teacher = (
        measures.model_name(run.config[role]["path"]) for role in ("student", "teacher")
    )
    is_taught = (
        run.config["estimator"]["recipe"] != "sft"
        or run.config["sampling"].get("source") == "teacher"
    )
    title = f"{student} ← {teacher if is_taught else 'reference answers'}"
    if is_rewarded(run):
        title = f"{student}, judged by {measures.model_name(judge_name(run))}"
    timeline = timeline_of(run)
    ahead = [
        staleness_section(run),
        filter_section(run),
        timeline_section(run, timeline),
        cost_section(run, timeline),
    ]
    parts = [
        _result(run),
        _scores(run),
        *judged_sections(run),
        _training(run),
        *ahead,
        _positions(run),
        progress_section(run, mark),
        rollouts_section(run),
        _settings(run),
    ]
    return f"{title}, {run.config['estimator']['recipe']}", [_header(run, failure, title), *parts]


# What it was


def _header(run: Run, failure: dict[str, Any] | None, title: str) -> Html:
    estimator, source = run.config["estimator"], run.config["sampling"].get("source", "student")
    options = [
        f"{name} {shown(value)}"
        for name, value in estimator.items()
        if value is not None and name not in ("recipe", "tile")
    ]
    about = _RECIPES.get(estimator["recipe"])
    written = (
        _AHEAD[run.config["near_policy"]["schedule"]]
        if run.is_near_policy
        else _WRITERS.get(source)
    )
    written = _JUDGED if is_rewarded(run) else written
    return tag(
        "header",
        tag("h1", title),
        tag("p", outcome(run), class_="lead"),
        tag(
            "p",
            written,
            " Recipe ",
            tag("code", estimator["recipe"]),
            f" ({', '.join(options)})." if options else ".",
            f" {about}" if about else None,
            class_="quiet",
        ),
        *_warnings(run),
        None if failure is None or run.result else failure_block(failure),
    )


def outcome(run: Run) -> str:
    """The result in one sentence."""
    rows = measures.evaluated(run)
    spent = f"{count(_steps_done(run), 'step')}, {duration(_seconds(run))}"
    if not rows:
        kl = [value for value in run.column("kl/student_teacher") if value is not None]
        end = run.last_mean("kl/student_teacher")
        moved = (
            f"; KL(student || teacher) was {number(kl[0])} nats a token at first and {number(end)} at the end"
            if kl
            else ""
        )
        return f"{spent} of training, without an evaluation{moved}."
    name, first, last = (
        measures.score_label("avg@k", rows[0].get("k")),
        rows[0]["avg@k"],
        rows[-1]["avg@k"],
    )
    if run.result is None or "paired_difference" not in run.result:
        if len(rows) == 1:
            return f"{name} was {fixed(first)} at step {rows[0]['step']}; nothing later has been evaluated ({spent} so far)."
        return f"So far {name} went from {fixed(first)} to {fixed(last)} (step {rows[-1]['step']}); {spent} done."
    change = run.result["paired_difference"]
    gain, interval = change["avg@k"], change["avg@k_interval"]
    first, last = run.result["eval_before"]["avg@k"], run.result["eval_after"]["avg@k"]
    is_clear = is_number(interval) and abs(gain) > interval
    verb = ("rose" if gain > 0 else "fell") if is_clear else "did not change measurably: it went"
    return f"{name} {verb} from {fixed(first)} to {fixed(last)} (paired gain {plus_minus(gain, interval, signed=True)}) in {spent}."


def _warnings(run: Run) -> list[Html]:
    found: list[Html] = []
    if run.result is None:
        done, asked = _steps_done(run), run.config["train"]["num_steps"]
        found.append(
            notice(
                f"Not finished: {done:,} of {asked:,} steps ({done / asked:.0%}) are done.",
                kind="warning",
            )
        )
    skipped = skipped_steps(run)
    if skipped:
        where = [
            row["step"]
            for row in run.metrics
            if "loss/objective" in row and not is_number(row["loss/objective"])
        ]
        listed = (
            f": {', '.join(map(str, where[:10]))}{' …' if len(where) > 10 else ''}" if where else ""
        )
        found.append(
            notice(
                f"{count(skipped, 'step')} skipped because the loss or gradient was not finite{listed}.",
                kind="warning",
            )
        )
    left_out = run.data.get("num_skipped")
    if left_out:
        longest = run.config["data"]["max_prompt_length"]
        found.append(
            notice(
                f"{count(left_out, 'prompt')} left out: longer than data.max_prompt_length = {longest} tokens.",
                kind="warning",
            )
        )
    cut = run.last_mean("rollout/truncated_ratio")
    if cut is not None and cut > 0.05:
        found.append(
            notice(
                f"At the end of training {cut:.0%} of completions were cut off at the length limit.",
                kind="warning",
            )
        )
    return found


def skipped_steps(run: Run) -> int:
    """Updates that were left out because something was not finite."""
    counted = [value for value in run.column("grad/skipped_steps") if value is not None]
    return int((run.result or {}).get("skipped_steps") or (counted[-1] if counted else 0))


def failure_block(failure: dict[str, Any]) -> Html:
    """Why a run failed: short facts in a line, texts of many lines as they are."""
    texts = {
        name: "\n".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in failure.items()
    }
    short = [f"{name}: {text.strip()}" for name, text in texts.items() if "\n" not in text.strip()]
    long = [
        join((tag("p", name), tag("pre", text)))
        for name, text in texts.items()
        if "\n" in text.strip()
    ]
    return tag(
        "div", tag("p", tag("strong", "Failed. "), "; ".join(short)), *long, class_="notice warning"
    )


def _steps_done(run: Run) -> int:
    return run.metrics[-1]["step"] if run.metrics else 0


def _seconds(run: Run) -> float | None:
    return measures.total(run, "seconds") if run.seconds is None else run.seconds


# What came of it


def _result(run: Run) -> Html | None:
    result, rows = run.result or {}, measures.evaluated(run)
    if not rows:
        return None
    k, temperature = rows[0].get("k"), rows[0].get("temperature")
    last = result.get("eval_after", rows[-1])
    lines = [_score_row("before training", result.get("eval_before", rows[0]))]
    for row in result.get("eval_before_sharpened", ()):
        lines.append(
            _score_row(
                f"before, sampled {'more' if row['temperature'] < temperature else 'less'} sharply",
                row,
            )
        )
    if last["step"] != rows[0]["step"]:
        lines.append(
            _score_row(
                "after training" if run.result else f"at step {last['step']}", last, class_="main"
            )
        )
    change = result.get("paired_difference")
    if change:
        cells = [
            plus_minus(change.get(name), change.get(f"{name}_interval"), signed=True)
            for name in measures.SCORES
        ]
        lines.append(table_row(["gain, paired by prompt", "", *cells]))
    head = ["student", "T", *(measures.score_label(name, k) for name in measures.SCORES)]
    caption = f"{count(last['num_prompts'], 'held-out prompt')} ({run.config['evaluation']['source']}); ± is half a 95 % interval over prompts."
    words = {
        measures.score_label(
            "avg@k", k
        ): f"share of right answers among {k} sampled ones a prompt, averaged over prompts",
        "greedy": "share of prompts whose most likely answer (T = 0) is right",
        measures.score_label(
            "pass@k", k
        ): f"share of prompts where at least one of {k} sampled answers is right",
        "T": f"temperature the answers were sampled at; training is judged at {number(temperature)}",
    }
    if result.get("eval_before_sharpened"):
        words["more sharply"] = (
            "the untrained student at a lower temperature: a gain that is no larger than this is sharpening, not learning"
        )
    if change:
        words["paired"] = (
            "both students answered the same prompts, so the interval is of the difference, prompt by prompt"
        )
    return section("result", "Result", table(head, lines, caption=caption), definitions(words))


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
        if spent is not None:
            views[axis] = grid(_score_chart(rows, spent, axis, name) for name in measures.SCORES)
    often = (
        " Only the start and the end were evaluated; set evaluation.every for a curve."
        if len(rows) == 2
        else ""
    )
    note = f"The band is a 95 % interval over prompts. Every evaluation asks the same prompts, so neighbouring points err alike.{often}"
    notes = definitions({axis: _AXIS_NOTES[axis] for axis in views})
    return section(
        "scores",
        "Scores during training",
        tag("p", note, class_="quiet"),
        tabs("axis", views, "Against"),
        details("What the axes count", notes),
    )


def _score_chart(rows: list[dict[str, Any]], spent: list[float], axis: str, name: str) -> Html:
    y = [row.get(name) for row in rows]
    half = [row.get(f"{name}_interval") for row in rows]
    label = measures.score_label(name, rows[0].get("k"))
    return draw(
        Chart(label, axis, "share right", bounds=(0, 1)),
        [interval_line(spent, y, half, slot=0, has_markers=True)],
    )


def interval_line(x: list[float], y: list[Any], half: list[Any], **style: Any) -> ChartLine:
    """A line with its interval; where either is unknown the interval is left out."""
    known = [
        (value, width) if is_number(value) and is_number(width) else (float("nan"),) * 2
        for value, width in zip(y, half)
    ]
    values = [value if is_number(value) else float("nan") for value in y]
    return ChartLine(
        x,
        values,
        [value - width for value, width in known],
        [value + width for value, width in known],
        **style,
    )


# How training went


def _training(run: Run) -> Html | None:
    if not run.metrics:
        return None
    steps, window = measures.steps_of(run), measures.smoothing_window(len(run.metrics))
    figures = []
    for key, chart in _training_charts(run).items():
        values = run.column(key)
        known = [(step, value) for step, value in zip(steps, values) if value is not None]
        if key in _SPARSE and known:
            figures.append(draw(chart, [ChartLine(*zip(*known), has_markers=len(known) < 30)]))
        elif known:
            is_noisy = key != "optimizer/learning_rate"
            figures.append(draw(chart, curve(steps, values, window if is_noisy else 1)))
    signal, noise = (
        smooth(run.column(f"grad/{name}_squared"), window) for name in ("signal", "noise")
    )
    if np.isfinite(noise).any():
        # The ratio of two means, not the mean of ratios: a single step's signal is of either sign.
        figures.append(
            draw(
                _signal_chart(window),
                [
                    ChartLine(
                        steps, np.where(noise > 0, signal / np.where(noise > 0, noise, 1), np.nan)
                    )
                ],
            )
        )
    smoothed = f" Pale: every step; strong: mean over {window} steps." if window > 1 else ""
    return section(
        "training",
        "Training curves",
        tag("p", f"One value a step, over that step's rollouts.{smoothed}", class_="quiet"),
        grid(figures),
    )


def _signal_chart(window: int) -> Chart:
    return Chart(
        "Signal to noise of the gradient",
        "step",
        "squared norms",
        f"Squared norm of the expected gradient over the variance of a step's, each a mean over {count(window, 'step')}. Far below 1 a "
        "step is mostly chance: a larger batch or a quieter estimator helps. Told where a step has several micro-batches.",
    )


def _is_sampled(run: Run) -> bool:
    """Whether the KL that was told is the mean log-ratio of the sampled tokens, kl/k1 by another
    name.
    """
    told, estimate = run.column("kl/student_teacher"), run.column("kl/k1")
    if all(value is None for value in estimate):
        return run.config["estimator"]["recipe"] == "opd"
    return told == estimate


def _training_charts(run: Run) -> dict[str, Chart]:
    config = run.config
    clip = config["optimizer"].get("max_grad_norm")
    limit = config["sampling"]["max_completion_length"]
    kind = (
        "estimated from the sampled tokens alone" if _is_sampled(run) else "exact at every position"
    )
    clipped = (
        f"Before clipping; the dashed line is where it is clipped (max_grad_norm = {number(clip)})."
        if clip
        else "Gradients are not clipped."
    )
    return {
        "kl/student_teacher": Chart(
            "KL(student || teacher)",
            "step",
            "nats a token",
            f"Distance from the teacher on the student's own completions, {kind}. It should fall, then level off.",
        ),
        "loss/objective": Chart(
            "Loss",
            "step",
            "nats",
            "The recipe's objective. Under a policy gradient it has no target: judge by KL and scores; look here for jumps.",
        ),
        "grad/norm": Chart(
            "Gradient norm",
            "step",
            "global norm",
            f"{clipped} Spikes or growth mean that the learning rate is too high.",
            reference=clip or None,
            bounds=(0, None),
        ),
        "advantage/std": Chart(
            "Spread of the advantage",
            "step",
            "standard deviation" if is_rewarded(run) else "standard deviation, nats",
            "Of the advantage over tokens: how much the scores of a prompt's answers differ. At 0 there is nothing left to learn from."
            if is_rewarded(run)
            else "Of the advantage over tokens: the noise that multiplies the gradient. It should shrink as the student nears the teacher.",
            bounds=(0, None),
        ),
        "entropy/student": Chart(
            "Entropy of the student",
            "step",
            "nats a token",
            "Of its next-token distributions on its own completions. A fall to 0 means that it has stopped exploring.",
            bounds=(0, None),
        ),
        "entropy/teacher": Chart(
            "Entropy of the teacher",
            "step",
            "nats a token",
            "On the same contexts. Growth means that the student leads it where it is not at home.",
            bounds=(0, None),
        ),
        "overlap/ratio": Chart(
            "Overlap of the most likely tokens",
            "step",
            "share",
            "How many of the student's 16 most likely tokens are among the teacher's 16.",
            bounds=(0, 1),
        ),
        "rollout/length_mean": Chart(
            "Completion length",
            "step",
            "tokens, mean",
            f"At most {limit:,}. A collapse, or a growth to the limit, is a failure to look into.",
        ),
        "rollout/truncated_ratio": Chart(
            "Cut-off completions",
            "step",
            "share",
            f"Completions that reached {limit:,} tokens without ending. It should stay near 0.",
            bounds=(0, 1),
        ),
        "optimizer/learning_rate": Chart(
            "Learning rate",
            "step",
            "step size",
            "The schedule as it was applied; skipped steps do not advance it.",
            bounds=(0, None),
        ),
    }


def _positions(run: Run) -> Html | None:
    length = measures.end_length(len(run.metrics))
    early, late = (
        measures.kl_by_position(run.metrics[:length]),
        measures.kl_by_position(run.metrics[-length:]),
    )
    buckets = sorted(early.keys() | late.keys())
    if not buckets or len(run.metrics) < 2:
        return None
    lines = [
        ChartLine(
            range(len(buckets)),
            [part.get(bucket) for bucket in buckets],
            slot=slot,
            has_markers=True,
        )
        for slot, part in ((1, early), (0, late))
    ]
    chart = Chart(
        "KL(student || teacher) by position",
        "position in the completion, tokens",
        "nats a token",
        categories=[*map(measures.bucket_label, buckets)],
    )
    about = (
        "Where in a completion student and teacher disagree. A gap that closes at the start and stays at the end means that the student "
        "drifts into contexts which the teacher would not have written; late positions are seen by long completions only."
    )
    key = legend([(f"first {count(length, 'step')}", 1), (f"last {count(length, 'step')}", 0)])
    return section(
        "positions",
        "KL by position",
        tag("p", about, class_="quiet"),
        key,
        grid([draw(chart, lines)]),
    )


# What it was made with


def _settings(run: Run) -> Html:
    return section("settings", "Settings", config_tables(run.config), facts_table(run))


def config_tables(config: dict[str, Any]) -> Html:
    """The settings that differ from the defaults, then all of them by section."""
    defaults, given = measures.leaves(to_dict(Config())), measures.leaves(config)
    changed = {
        name: value for name, value in given.items() if not _is_default(name, value, defaults)
    }
    rows = [[name, shown(value), _default(name, defaults)] for name, value in changed.items()]
    words = f"{len(changed)} of {count(len(given), 'setting')} differ from the defaults" + (
        ":" if changed else "."
    )
    every, at = [], None
    for name, value in given.items():
        head, _, field = name.rpartition(".")
        if head != at:
            every.append(table_row([head or "run", "", ""], class_="section"))
            at = head
        is_changed = name in changed
        every.append(
            table_row(
                [field, shown(value), "changed" if is_changed else ""],
                class_="changed" if is_changed else None,
            )
        )
    return join(
        (
            tag("p", words),
            table(["setting", "value", "default"], rows, class_="words") if changed else None,
            details("All settings", table(["setting", "value", ""], every, class_="words")),
        )
    )


def _default(name: str, defaults: dict[str, Any]) -> str:
    if name in ("student.path", "teacher.path"):
        return f"the built-in {name.removesuffix('.path')}"
    return shown(defaults[name]) if name in defaults else "no such setting in this version"


def _is_default(name: str, value: Any, defaults: dict[str, Any]) -> bool:
    """The built-in models are the default, also where a config of old names the directory that they
    lay in.
    """
    if name in ("student.path", "teacher.path") and str(value).endswith(
        "/assets/mini_pair/" + name.removesuffix(".path")
    ):
        return True
    return name in defaults and defaults[name] == value


def facts_table(run: Run) -> Html:
    """The environment, and digests that tell whether two runs had the same data and models."""
    environment = [(name, shown(value)) for name, value in run.environment.items()]
    data = [(name, tag("code", shown(value))) for name, value in run.data.items()]
    about = "Digests: runs with the same one used the same prompts or weights."
    return join(
        (
            details("Environment", table(["", "value"], environment, class_="words")),
            details("Data and models", table(["", "value"], data, class_="words", caption=about)),
        )
    )
