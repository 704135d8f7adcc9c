"""The facts of two runs side by side: settings, data, machine, scores and cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from opdjax.config.saved import upgrade
from opdjax.report import measures
from opdjax.runs.results import AXES, Run, is_number
from opdjax.runs.statistics import seed_interval

_HITS = {"avg@k": "per_prompt", "greedy": "per_prompt_greedy"}


def against_facts(run: Run, other: Run, names: tuple[str, str]) -> dict[str, Any]:
    """The facts of a run and of the one it is compared with; every pair is in this order."""
    runs = run, other
    digests = [each.data.get("evaluation") for each in runs]
    is_paired = digests[0] == digests[1]
    scores = [_score(runs, *which, is_paired=is_paired) for which in _SCORES]
    spent = {axis: [measures.spent(each, axis) for each in runs] for axis in AXES}
    parts = {
        "settings": [settings_of(each.config) for each in runs],
        "data": [each.data for each in runs],
        "environment": [each.environment for each in runs],
    }
    differences = {part: differing(each) for part, each in parts.items()}
    num_fields = {part: len(one.keys() | two.keys()) for part, (one, two) in parts.items()}
    return {
        "names": names,
        "seeds": [each.config["seed"] for each in runs],
        "unfinished": [each.workdir.name for each in runs if each.result is None],
        "without_evaluation": [
            each.workdir.name for each, digest in zip(runs, digests) if digest is None
        ],
        "has_same_prompts": is_paired,  # in the evaluations
        "scores": [s for s in scores if any(is_number(value) for value, _ in s["values"])],
        "costs": {axis: each for axis, each in spent.items() if all(map(is_number, each))},
        "differences": differences,  # by part and field
        # Fields that are the same, by part.
        "num_same": {part: num_fields[part] - len(own) for part, own in differences.items()},
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


_SCORES = [(name, moment) for moment in ("before", "after") for name in measures.SCORES]


def _score(runs: Sequence[Run], name: str, moment: str, *, is_paired: bool) -> dict[str, Any]:
    """A score of both runs, each with half its 95 % interval over prompts, and the first minus the
    second, paired by prompt.
    """
    one, two = ((each.result or {}).get(f"eval_{moment}", {}) for each in runs)
    values = [(row.get(name), row.get(f"{name}_interval")) for row in (one, two)]
    hits = [row.get(_HITS.get(name, "")) or [] for row in (one, two)]
    difference = None
    if is_paired and one.get("n") == two.get("n") and len(hits[0]) == len(hits[1]) > 0:
        trials = one["n"] if name == "avg@k" else 1
        difference = seed_interval([(first - second) / trials for first, second in zip(*hits)])
    return {"name": name, "moment": moment, "values": values, "difference": difference}
