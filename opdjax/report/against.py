"""The facts of two runs side by side: settings, data, machine, scores and cost."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from opdjax.config.saved import upgrade
from opdjax.report import measures
from opdjax.runs.results import AXES, Run, is_number
from opdjax.runs.statistics import seed_interval

_HITS = {"avg@k": "per_prompt", "greedy": "per_prompt_greedy"}


@dataclasses.dataclass(frozen=True)
class Score:
    """A score of both runs, each with half its 95 % interval over prompts."""

    name: str
    moment: str  # before or after training
    values: tuple[tuple[float | None, float | None], ...]
    difference: tuple[float, float] | None  # first minus second, paired by prompt


@dataclasses.dataclass(frozen=True)
class AgainstFacts:
    """Two runs; every pair of values is in the order of the names."""

    names: tuple[str, str]
    seeds: tuple[int, int]
    unfinished: tuple[str, ...]
    without_evaluation: tuple[str, ...]
    has_same_prompts: bool  # in the evaluations
    scores: tuple[Score, ...]
    costs: dict[str, tuple[float, float]]  # by axis
    differences: dict[str, dict[str, tuple[Any, Any]]]  # by part: settings, data, environment
    num_same: dict[str, int]  # fields that are the same, by part


def against_facts(run: Run, other: Run, names: tuple[str, str]) -> AgainstFacts:
    """The facts of a run and of the one it is compared with."""
    runs = run, other
    digests = [each.data.get("evaluation") for each in runs]
    has_same_prompts = digests[0] == digests[1]
    scores = [_score(runs, *which, is_paired=has_same_prompts) for which in _SCORES]
    spent = {axis: tuple(measures.spent(each, axis) for each in runs) for axis in AXES}
    parts = {
        "settings": [settings_of(each.config) for each in runs],
        "data": [each.data for each in runs],
        "environment": [each.environment for each in runs],
    }
    found = {part: differing(each) for part, each in parts.items()}
    return AgainstFacts(
        names,
        tuple(each.config["seed"] for each in runs),
        tuple(each.workdir.name for each in runs if each.result is None),
        tuple(each.workdir.name for each, digest in zip(runs, digests) if digest is None),
        has_same_prompts,
        tuple(score for score in scores if any(is_number(value) for value, _ in score.values)),
        {axis: each for axis, each in spent.items() if all(map(is_number, each))},
        found,
        {
            part: len(one.keys() | two.keys()) - len(found[part])
            for part, (one, two) in parts.items()
        },
    )


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


def _score(runs: Sequence[Run], name: str, moment: str, *, is_paired: bool) -> Score:
    one, two = ((each.result or {}).get(f"eval_{moment}", {}) for each in runs)
    values = tuple((row.get(name), row.get(f"{name}_interval")) for row in (one, two))
    hits = [row.get(_HITS.get(name, "")) or [] for row in (one, two)]
    if not is_paired or one.get("n") != two.get("n") or not len(hits[0]) == len(hits[1]) > 0:
        return Score(name, moment, values, None)
    trials = one["n"] if name == "avg@k" else 1
    difference = seed_interval([(first - second) / trials for first, second in zip(*hits)])
    return Score(name, moment, values, difference)
