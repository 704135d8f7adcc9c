"""The facts of a run's page: what was trained, the result, and how training went."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opdjax.config import Config
from opdjax.config.validation import to_dict
from opdjax.report import measures
from opdjax.report.answers import ComparedAnswers, Marker, first_and_last, unmarked
from opdjax.report.drawing import smooth, smoothing_window
from opdjax.report.judged import Cost, JudgedFacts, cost_facts, judged_facts
from opdjax.report.near_policy import FilterFacts, StalenessFacts, filter_facts, staleness_facts
from opdjax.report.text import fixed, percent, shown, spread
from opdjax.report.timeline import TimelineFacts, timeline_facts
from opdjax.runs.results import AXES, Run, is_number

# Limits that keep a page small: steps, rollouts per step, tokens per rollout.
_STEPS, _ROLLOUTS, MAX_TOKENS = 5, 4, 256
_MODELS = ("student.path", "teacher.path")


@dataclasses.dataclass(frozen=True)
class Ends:
    """A metric over the first and the last steps."""

    first: float | None  # of the first step
    last: float | None  # mean over the last `length` steps
    length: int


@dataclasses.dataclass(frozen=True)
class RolloutExamples:
    """Recorded rollouts of a few steps; tokens are coloured by `field` up to the size `limit`."""

    steps: dict[int, list[dict[str, Any]]]  # rows of samples.jsonl
    num_left_out: int  # steps
    field: str | None  # advantages or kl; None: no numbers per token
    limit: float  # the 95th percentile, so that outliers do not pale the rest


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting with its value as text; `default` is set where the value differs from it."""

    name: str
    value: str
    default: str | None


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What a work directory says of its run. `metrics` are the columns of metrics.jsonl."""

    name: str
    student: str
    teacher: str
    judge: str | None
    recipe: str
    description: str
    options: dict[str, str]
    completions_from: str  # student, teacher or references
    teacher_need: str | None  # as `Recipe.teacher_need`
    is_rewarded: bool
    schedule: str  # of near-policy rollouts, or none
    is_finished: bool
    failure: dict[str, str] | None
    num_steps: int
    planned_steps: int
    seconds: float | None
    skipped_steps: int
    skipped_at: tuple[int, ...]
    num_left_out: int  # prompts longer than the limit
    cut_off: float | None  # share of completions at the end of training
    config: dict[str, Any]
    steps: list[int]
    metrics: dict[str, list[float | None]]
    kl: Ends
    is_kl_sampled: bool  # estimated from the sampled tokens instead of exact
    signal_to_noise: list[float | None]  # of the gradient, by step
    k: int | None
    temperature: float | None
    evaluations: list[dict[str, Any]]
    result: dict[str, Any]
    spent: dict[str, list[float]]  # up to each evaluation, by axis
    positions: dict[str, tuple[float | None, float | None]]  # KL by position: early, late
    rollouts: RolloutExamples | None
    answers: ComparedAnswers | None
    staleness: StalenessFacts | None
    filtering: FilterFacts | None
    timeline: TimelineFacts | None
    judged: JudgedFacts | None
    judge_cost: Cost | None
    settings: list[Setting]
    environment: dict[str, Any]
    data: dict[str, Any]


def run_facts(
    run: Run, failure: Mapping[str, Any] | None = None, mark: Marker = unmarked
) -> RunFacts:
    """The facts of the run in a work directory; `failure` is the content of failure.json."""
    recipe, rows = measures.recipe_of(run), measures.evaluated(run)
    name, length = run.config["estimator"]["recipe"], measures.end_length(len(run.metrics))
    steps = measures.steps_of(run)
    keys = dict.fromkeys(key for row in run.metrics for key in row)
    skipped_at = [
        row["step"]
        for row in run.metrics
        if "loss/objective" in row and not is_number(row["loss/objective"])
    ]
    return RunFacts(
        name=run.workdir.resolve().name,
        student=measures.model_name(run.config["student"]["path"]),
        teacher=measures.model_name(run.config["teacher"]["path"]),
        judge=measures.judge_name(run) if recipe and recipe.is_judged else None,
        recipe=name,
        description=recipe.description if recipe else "",
        options={key: shown(value) for key, value in measures.estimator_options(run).items()},
        completions_from=measures.completions_from(run),
        teacher_need=measures.teacher_need(run),
        is_rewarded=recipe is not None and recipe.is_rewarded,
        schedule=run.config["near_policy"]["schedule"] if run.is_near_policy else "none",
        is_finished=run.result is not None,
        failure=None if failure is None or run.result else measures.failure_texts(failure),
        num_steps=steps[-1] if steps else 0,
        planned_steps=run.config["train"]["num_steps"],
        seconds=measures.total(run, "seconds") if run.seconds is None else run.seconds,
        skipped_steps=measures.skipped_steps(run),
        skipped_at=tuple(skipped_at),
        num_left_out=run.data.get("num_skipped") or 0,
        cut_off=measures.end_mean(run, "rollout/truncated_ratio"),
        config=run.config,
        steps=steps,
        metrics={key: run.column(key) for key in keys if key != "step"},
        kl=_ends(run, "kl/student_teacher", length),
        is_kl_sampled=_is_kl_sampled(run),
        signal_to_noise=_signal_to_noise(run),
        k=rows[0].get("k") if rows else None,
        temperature=rows[0].get("temperature") if rows else None,
        evaluations=[{key: v for key, v in row.items() if key not in _LONG} for row in rows],
        result=run.result or {},
        spent=_spent(run, [row["step"] for row in rows]),
        positions=_positions(run, length),
        rollouts=_rollouts(run),
        answers=first_and_last(run, mark),
        staleness=staleness_facts(run),
        filtering=filter_facts(run),
        timeline=timeline_facts(run),
        judged=judged_facts(run),
        judge_cost=cost_facts(run),
        settings=_settings(run),
        environment=run.environment,
        data=run.data,
    )


_LONG = ("answers", "per_prompt", "per_prompt_greedy", "per_prompt_pass")  # not on the page


def _ends(run: Run, key: str, length: int) -> Ends:
    known = (value for value in run.column(key) if value is not None)
    return Ends(next(known, None), measures.end_mean(run, key), length)


def _is_kl_sampled(run: Run) -> bool:
    """Whether kl/student_teacher is kl/k1, the mean log-ratio of the sampled tokens."""
    estimate = run.column("kl/k1")
    if any(value is not None for value in estimate):
        return run.column("kl/student_teacher") == estimate
    recipe = measures.recipe_of(run)
    return recipe is not None and recipe.teacher == "token"


def _signal_to_noise(run: Run) -> list[float | None]:
    """Smoothed signal over smoothed noise: the signal of one step has either sign."""
    window = smoothing_window(len(run.metrics))
    signal, noise = (
        smooth(run.column(f"grad/{name}_squared"), window) for name in ("signal", "noise")
    )
    ratio = np.divide(signal, noise, out=np.full(len(noise), np.nan), where=noise > 0)
    return [float(value) if np.isfinite(value) else None for value in ratio]


def _spent(run: Run, steps: Sequence[int]) -> dict[str, list[float]]:
    found = {axis: measures.totals(run, axis, steps) for axis in AXES} if len(steps) > 1 else {}
    return {axis: spent for axis, spent in found.items() if spent is not None and any(spent)}


def _positions(run: Run, length: int) -> dict[str, tuple[float | None, float | None]]:
    if len(run.metrics) < 2:
        return {}
    early, late = map(measures.kl_by_position, (run.metrics[:length], run.metrics[-length:]))
    buckets = sorted(early.keys() | late.keys())
    return {measures.bucket_label(each): (early.get(each), late.get(each)) for each in buckets}


# Rollouts


def _rollouts(run: Run) -> RolloutExamples | None:
    if not run.samples:
        return None
    every = sorted({row["step"] for row in run.samples})
    steps = {
        step: [row for row in run.samples if row["step"] == step][:_ROLLOUTS]
        for step in spread(every, _STEPS)
    }
    rows = [row for found in steps.values() for row in found if row.get("tokens")]
    field, limit = None, 1.0
    for name in ("kl", "advantages"):  # advantages are preferred
        values = (value for row in rows for value in row.get(name) or ())
        sizes = sorted(abs(value) for value in values if is_number(value))
        if sizes and sizes[-1] > 0:
            field, limit = name, sizes[int(0.95 * len(sizes))] or sizes[-1]
    return RolloutExamples(steps, len(every) - len(steps), field, limit)


def look(rollouts: RolloutExamples, value: float | None) -> tuple[str, float | None]:
    """(class, share of the full colour) of a token; the underline shows the sign without colour."""
    if not is_number(value) or value == 0:
        return "t", None
    share = min(1.0, abs(value) / rollouts.limit)
    side = "for" if value > 0 and rollouts.field == "advantages" else "against"
    return f"t {side}{' strong' if share >= 0.35 else ''}", share


def visible(piece: str) -> str:
    """A piece of text with its white space made visible."""
    return piece.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def token_columns(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """The numbers of each token under their headings; a field without any value is left out."""
    probability = lambda value: percent(value, is_log=True)
    top = lambda pieces: ", ".join(
        f"‘{visible(piece)}’\u00a0{percent(share)}" for piece, share in pieces or ()
    )
    fields = {
        "advantage": ("advantages", fixed),
        "student p": ("student_logprobs", probability),
        "teacher p": ("teacher_logprobs", probability),
        "teacher's top 5": ("teacher_top", top),
        "KL, nats": ("kl", fixed),
        "reward": ("rewards", fixed),
    }
    size, found = len(row["tokens"][:MAX_TOKENS]), {}
    for heading, (field, write) in fields.items():
        values = (list(row.get(field) or ()) + [None] * size)[:size]
        texts = [write(value) for value in values]
        if any(text not in ("–", "") for text in texts):
            found[heading] = texts
    return found


# Settings


def _settings(run: Run) -> list[Setting]:
    defaults = measures.leaves(to_dict(Config()))
    found = []
    for name, value in measures.leaves(run.config).items():
        # Earlier versions saved the directory of a built-in model, which is the default too.
        role = name.removesuffix(".path")
        is_built_in = name in _MODELS and str(value).endswith(f"/assets/mini_pair/{role}")
        default = None
        if not is_built_in and (name not in defaults or defaults[name] != value):
            default = f"the built-in {role}" if name in _MODELS else "no such setting now"
            if name in defaults and name not in _MODELS:
                default = shown(defaults[name])
        found.append(Setting(name, shown(value), default))
    return found
