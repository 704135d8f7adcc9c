"""The facts of a run's page: what was trained, the result, and how training went; and of two runs
side by side: settings, data, machine, scores and cost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from opdjax.config import Config
from opdjax.config.recipes import RECIPES, Recipe
from opdjax.config.saved import upgrade
from opdjax.config.validation import to_dict
from opdjax.report import measures
from opdjax.report.drawing import finite
from opdjax.report.judgements import cost_facts, judged_facts
from opdjax.report.near_policy import filter_facts, staleness_facts, timeline_facts
from opdjax.report.text import fixed, percent, prompt_text, shown, spread
from opdjax.runs.results import AXES, Run, is_number
from opdjax.runs.statistics import has_right_answer, paired_ratios, seed_interval

# Limits that keep a page small: steps, rollouts per step, tokens per rollout.
_STEPS, _ROLLOUTS, MAX_TOKENS = 5, 4, 256
_PROMPTS = 6  # whose answers are shown


def run_facts(run: Run, failure: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The facts of the run in a work directory; `failure` is the content of failure.json."""
    estimator, rows = run.config["estimator"], run.evaluated
    recipe = RECIPES.get(estimator["recipe"])  # None for one that this version does not have
    options = {name: v for name, v in estimator.items() if v is not None and name != "recipe"}
    steps, length = run.column("step"), measures.end_length(len(run.metrics))
    keys = dict.fromkeys(key for row in run.metrics for key in row if key != "step")
    losses = zip(run.metrics, run.column("loss/objective"))
    return {
        "name": run.workdir.resolve().name,
        "student": measures.model_name(run.config["student"]["path"]),
        "teacher": measures.model_name(run.config["teacher"]["path"]),
        "judge": measures.model_name((run.config.get("verifier") or {}).get("model") or "a judge")
        if recipe and recipe.is_judged
        else None,
        "recipe": estimator["recipe"],
        "description": recipe.description if recipe else "",
        "options": {name: shown(v) for name, v in options.items()},
        "completions_from": run.config["sampling"].get("completions_from", "student"),
        "student_fraction": run.config["sampling"].get("student_fraction", 0),
        "teacher_need": recipe.teacher_need(options) if recipe else None,
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
        "is_all_wrong": bool(rows) and not has_right_answer(run.evaluations),
        "k": rows[0].get("k") if rows else None,
        "temperature": rows[0].get("temperature") if rows else None,
        "evaluations": [{key: v for key, v in row.items() if key not in _LONG} for row in rows],
        "divergences": _divergences(run),
        "result": run.result or {},
        "spent": _spent(run, [row["step"] for row in rows]),  # up to each evaluation, by axis
        "positions": _positions(run, length),  # (early, late) KL by position
        "rollouts": _rollouts(run),
        "answers": side_by_side({f"step {row['step']:,}": row for row in rows[:1] + rows[1:][-1:]}),
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
    without = lambda row: {name: v for name, v in row.items() if name not in _LONG}
    both = ("student", "teacher")
    return [row | {who: without(row[who]) for who in both} for row in run.divergences]


def _is_kl_sampled(run: Run, recipe: Recipe | None) -> bool:
    """Whether kl/student_teacher is kl/k1, the mean log-ratio of the sampled tokens."""
    estimate = run.column("kl/k1")
    if finite(estimate):
        return run.column("kl/student_teacher") == estimate
    return recipe is not None and recipe.teacher == "token"


def _spent(run: Run, steps: Sequence[int]) -> dict[str, list[float]]:
    found = {axis: measures.totals(run, axis, steps) for axis in AXES} if len(steps) > 1 else {}
    return {axis: spent for axis, spent in found.items() if spent is not None and any(spent)}


def _positions(run: Run, length: int) -> dict[str, tuple[float | None, float | None]]:
    if len(run.metrics) < 2:
        return {}
    early, late = map(measures.kl_by_position, (run.metrics[:length], run.metrics[-length:]))
    buckets = sorted(early.keys() | late.keys())
    return {measures.bucket_label(each): (early.get(each), late.get(each)) for each in buckets}


def side_by_side(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The answers of some evaluations, by their names, to the prompts on which they differ most:
    first those with mixed grades. `answers` are (text, whether it is right, who gave it).
    """
    found: dict[str, dict[tuple[str, bool], list[str]]] = {}
    references = {}
    for name, row in rows.items():
        for each in row.get("answers") or ():
            prompt, answer = prompt_text(each["prompt"]), (each["completion"], each["is_right"])
            references[prompt] = each["answer"]
            found.setdefault(prompt, {}).setdefault(answer, []).append(name)
    variety = lambda prompt: (len({is_right for _, is_right in found[prompt]}), len(found[prompt]))
    shared = [prompt for prompt, given in found.items() if sum(map(len, given.values())) > 1]
    return [
        {
            "prompt": prompt,
            "reference": references[prompt],
            "answers": [(*answer, ", ".join(names)) for answer, names in found[prompt].items()],
        }
        for prompt in sorted(shared, key=variety, reverse=True)[:_PROMPTS]
    ]


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


# Two runs side by side

_HITS = {"avg@k": "per_prompt", "greedy": "per_prompt_greedy"}


def against_facts(run: Run, other: Run, names: tuple[str, str]) -> dict[str, Any]:
    """The facts of a run and of the one it is compared with; every pair is in this order."""
    runs = run, other
    digests = [each.data.get("evaluation") for each in runs]
    is_paired = digests[0] == digests[1]
    unfinished = [each.workdir.name for each in runs if each.result is None]
    notices = [f"{name} is not finished: it has no final scores." for name in unfinished]
    was_evaluated = lambda each: each.data.get("evaluation") is not None or each.divergences
    if without := [each.workdir.name for each in runs if not was_evaluated(each)]:
        names_ = " and ".join(without)
        notices.append(f"{names_} had no evaluation: there are no scores to compare.")
    elif not is_paired:
        notices.append("They were evaluated on different prompts: their scores do not compare.")
    spent = {axis: [measures.spent(each, axis) for each in runs] for axis in AXES}
    parts = {
        "settings": [settings_of(each.config) for each in runs],
        "data": [each.data for each in runs],
        "environment": [each.environment for each in runs],
    }
    return {
        "names": names,
        "seeds": [each.config["seed"] for each in runs],
        "notices": notices,
        "scores": _scores(runs, is_paired=is_paired),
        "costs": {axis: each for axis, each in spent.items() if all(map(is_number, each))},
        "differences": {part: differing(each) for part, each in parts.items()},  # by field
    }


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by dotted field under today's names, without the seed."""
    settings = measures.leaves(upgrade(dict(config)))
    settings.pop("seed")
    return settings


def differing(each: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The fields in which the settings of runs or arms differ, with the value of each."""
    names = dict.fromkeys(name for settings in each for name in settings)
    found = {name: tuple(settings.get(name) for settings in each) for name in names}
    return {name: values for name, values in found.items() if len({*map(json.dumps, values)}) > 1}


def _scores(runs: Sequence[Run], *, is_paired: bool) -> dict[str, list[tuple[Any, ...]]]:
    """By score: that of both runs, each with half its 95 % interval over prompts, and the first
    minus the second, paired by prompt, if they can be.
    """
    found = {}
    both = lambda rows, name: [(row.get(name), row.get(f"{name}_interval")) for row in rows]
    same = lambda rows, *names: all(rows[0].get(name) == rows[1].get(name) for name in names)
    is_one_source = same([each.config["evaluation"] for each in runs], "source")
    for moment in ("before", "after"):
        rows = [(each.result or {}).get(f"eval_{moment}", {}) for each in runs]
        for name in measures.SCORES:
            values = both(rows, name)
            one, two = (row.get(_HITS.get(name)) or [] for row in rows)
            if is_paired and same(rows, "n") and len(one) == len(two) > 0:
                trials = rows[0]["n"] if name == "avg@k" else 1
                values.append(seed_interval([(a - b) / trials for a, b in zip(one, two)]))
            if any(is_number(value) for value, _ in values):
                found[f"{name} {moment} training"] = values
        rows = [(each.result or {}).get(f"divergence_{moment}", {}) for each in runs]
        is_same = is_paired and is_one_source and same(rows, "temperature", "num_prompts", "n")
        for writer in ("student", "teacher") if any(rows) else ():
            own = [row.get(writer, {}) for row in rows]
            values = both(own, "reverse_kl")
            if is_same:
                values.append(paired_ratios(*(row["per_prompt"] for row in own)))
            found[f"KL(S || T) {moment} training, {writer}'s answers"] = values
    return found
