"""The facts of a run's page: what was trained, the result, and how training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opdjax.config import Config
from opdjax.config.recipes import Recipe
from opdjax.config.validation import to_dict
from opdjax.report import measures
from opdjax.report.answers import first_and_last
from opdjax.report.drawing import finite, smooth, smoothing_window
from opdjax.report.judged import cost_facts, judged_facts
from opdjax.report.near_policy import filter_facts, staleness_facts
from opdjax.report.text import fixed, percent, shown, spread
from opdjax.report.timeline import timeline_facts
from opdjax.runs.results import AXES, Run, is_number
from opdjax.runs.statistics import has_right_answer

# Limits that keep a page small: steps, rollouts per step, tokens per rollout.
_STEPS, _ROLLOUTS, MAX_TOKENS = 5, 4, 256


def run_facts(run: Run, failure: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The facts of the run in a work directory; `failure` is the content of failure.json."""
    recipe, rows = measures.recipe_of(run), measures.evaluated(run)
    steps, length = measures.steps_of(run), measures.end_length(len(run.metrics))
    keys = dict.fromkeys(key for row in run.metrics for key in row if key != "step")
    losses = zip(run.metrics, run.column("loss/objective"))
    return {
        "name": run.workdir.resolve().name,
        "student": measures.model_name(run.config["student"]["path"]),
        "teacher": measures.model_name(run.config["teacher"]["path"]),
        "judge": measures.model_name((run.config.get("verifier") or {}).get("model") or "a judge")
        if recipe and recipe.is_judged
        else None,
        "recipe": run.config["estimator"]["recipe"],
        "description": recipe.description if recipe else "",
        "options": {key: shown(v) for key, v in measures.estimator_options(run).items()},
        "completions_from": run.config["sampling"].get("completions_from", "student"),
        "student_fraction": run.config["sampling"].get("student_fraction", 0),
        "teacher_need": recipe.teacher_need(measures.estimator_options(run)) if recipe else None,
        "is_rewarded": recipe is not None and recipe.is_rewarded,
        # Of near-policy rollouts, or none.
        "schedule": run.config["near_policy"]["schedule"] if run.is_near_policy else "none",
        "is_finished": run.result is not None,
        "failure": None if failure is None or run.result else measures.failure_texts(failure),
        "num_steps": steps[-1] if steps else 0,
        "planned_steps": run.planned_steps,
        "seconds": measures.spent(run, "seconds"),
        "skipped_steps": measures.skipped_steps(run),
        "skipped_at": [
            row["step"] for row, loss in losses if loss is None and "loss/objective" in row
        ],
        "num_left_out": run.data.get("num_skipped") or 0,  # prompts longer than the limit
        # The share of completions at the end of training.
        "cut_off": measures.end_mean(run, "rollout/truncated_ratio"),
        "config": run.config,
        "steps": steps,
        "metrics": {key: run.column(key) for key in keys},
        # At the first step, and the mean over the last `length` steps.
        "kl": {
            "first": next(iter(finite(run.column("kl/student_teacher"))), None),
            "last": measures.end_mean(run, "kl/student_teacher"),
            "length": length,
        },
        "is_kl_sampled": _is_kl_sampled(run, recipe),
        "signal_to_noise": _signal_to_noise(run),  # of the gradient, by step
        "is_all_wrong": bool(rows) and not has_right_answer(run.evaluations),
        "k": measures.samples_per_prompt(run),
        "temperature": rows[0].get("temperature") if rows else None,
        "evaluations": [{key: v for key, v in row.items() if key not in _LONG} for row in rows],
        "divergences": _divergences(run),
        "result": run.result or {},
        "spent": _spent(run, [row["step"] for row in rows]),  # up to each evaluation, by axis
        "positions": _positions(run, length),  # (early, late) KL by position
        "rollouts": _rollouts(run),
        "answers": first_and_last(run),
        "staleness": staleness_facts(run),
        "filtering": filter_facts(run),
        "timeline": timeline_facts(run),
        "judged": judged_facts(run),
        "judge_cost": cost_facts(run),
        "settings": _settings(run),
        "environment": run.environment,
        "data": run.data,
    }


_LONG = ("answers", "per_prompt", "per_prompt_greedy", "per_prompt_pass")  # not on the page


def _divergences(run: Run) -> list[dict[str, Any]]:
    """The held-out divergences by step, without their sums by prompt."""
    by_step = {row["step"]: row for row in run.divergences}
    without = lambda row: {name: v for name, v in row.items() if name not in _LONG}
    return [
        by_step[step] | {who: without(by_step[step][who]) for who in ("student", "teacher")}
        for step in sorted(by_step)
    ]


def _is_kl_sampled(run: Run, recipe: Recipe | None) -> bool:
    """Whether kl/student_teacher is kl/k1, the mean log-ratio of the sampled tokens."""
    estimate = run.column("kl/k1")
    if finite(estimate):
        return run.column("kl/student_teacher") == estimate
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


def _rollouts(run: Run) -> dict[str, Any] | None:
    """Recorded rollouts of a few steps. Tokens are coloured by `field`: None if there are no
    numbers per token. The full colour is at `limit`, the 95th percentile: outliers do not pale the
    rest.
    """
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
        sizes = sorted(map(abs, finite(v for row in rows for v in row.get(name) or ())))
        if sizes and sizes[-1] > 0:
            field, limit = name, sizes[int(0.95 * len(sizes))] or sizes[-1]
    num_left_out = len(every) - len(steps)  # steps
    return {"steps": steps, "num_left_out": num_left_out, "field": field, "limit": limit}


def look(rollouts: Mapping[str, Any], value: float | None) -> tuple[str, float | None]:
    """(class, share of the full colour) of a token; the underline shows the sign without colour."""
    if not is_number(value) or value == 0:
        return "t", None
    share = min(1.0, abs(value) / rollouts["limit"])
    side = "for" if value > 0 and rollouts["field"] == "advantages" else "against"
    return f"t {side}{' strong' if share >= 0.35 else ''}", share


def visible(piece: str) -> str:
    """A piece of text with its white space made visible."""
    return piece.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def token_table(row: Mapping[str, Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """(headings, rows) of the numbers of each token; a field without any value is left out."""
    probability = lambda value: percent(value, is_log=True)
    top = lambda pieces: ", ".join(
        f"‘{visible(piece)}’\u00a0{percent(share)}" for piece, share in pieces or ()
    )
    fields = {"advantage": ("advantages", fixed), "student p": ("student_logprobs", probability)}
    fields |= {"teacher p": ("teacher_logprobs", probability)}
    fields |= {"teacher's top 5": ("teacher_top", top)}
    fields |= {"KL, nats": ("kl", fixed), "reward": ("rewards", fixed)}
    pieces = (row.get("tokens") or ())[:MAX_TOKENS]
    size, found = len(pieces), {"token": [*map(visible, pieces)]}
    for heading, (field, write) in fields.items():
        values = [*(row.get(field) or ()), *[None] * size][:size]
        texts = [write(value) for value in values]
        if any(text not in ("–", "") for text in texts):
            found[heading] = texts
    if len(found) == 1:
        return [], []
    found["position"] = range(size)
    return list(found), list(zip(*found.values()))


def _settings(run: Run) -> list[dict[str, str | None]]:
    """Every setting with its value; `default` is set where the value differs from it."""
    defaults = {name: shown(v) for name, v in measures.leaves(to_dict(Config())).items()}
    found = {name: shown(v) for name, v in measures.leaves(run.config).items()}
    default = {name: defaults.get(name, "no such setting now") for name in found}
    return [
        {"name": name, "value": value, "default": None if default[name] == value else default[name]}
        for name, value in found.items()
    ]
