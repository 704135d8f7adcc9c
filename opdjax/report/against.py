"""The facts of two runs side by side: settings, data, machine, scores and cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from opdjax.config.saved import upgrade
from opdjax.report import measures
from opdjax.runs.results import AXES, Run, is_number
from opdjax.runs.statistics import paired_ratios, seed_interval

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
        "scores": _scores(runs, is_paired=is_paired) | _divergences(runs, is_paired=is_paired),
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
    for moment in ("before", "after"):
        both = [(each.result or {}).get(f"eval_{moment}", {}) for each in runs]
        for name in measures.SCORES:
            values = [(row.get(name), row.get(f"{name}_interval")) for row in both]
            one, two = (row.get(_HITS.get(name)) or [] for row in both)
            if is_paired and both[0].get("n") == both[1].get("n") and len(one) == len(two) > 0:
                trials = both[0]["n"] if name == "avg@k" else 1
                values.append(seed_interval([(a - b) / trials for a, b in zip(one, two)]))
            if any(is_number(value) for value, _ in values):
                found[f"{name} {moment} training"] = values
    return found


def _divergences(runs: Sequence[Run], *, is_paired: bool) -> dict[str, list[tuple[Any, ...]]]:
    """As `_scores`: KL(student || teacher) on held-out prompts, on the answers of each writer."""
    found = {}
    sources = {each.config["evaluation"]["source"] for each in runs}
    for moment in ("before", "after"):
        rows = [(each.result or {}).get(f"divergence_{moment}", {}) for each in runs]
        asked = [[row.get(name) for name in ("temperature", "num_prompts", "n")] for row in rows]
        for writer in ("student", "teacher") if any(rows) else ():
            both = [row.get(writer, {}) for row in rows]
            values = [(row.get("reverse_kl"), row.get("reverse_kl_interval")) for row in both]
            if is_paired and asked[0] == asked[1] and len(sources) == 1:
                values.append(paired_ratios(*(row["per_prompt"] for row in both)))
            found[f"KL(S || T) {moment} training, {writer}'s answers"] = values
    return found
