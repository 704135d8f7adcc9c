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
class Differences:
    """The fields in which runs differ, each with its values, and the number of the others."""

    fields: dict[str, tuple[Any, ...]]
    num_same: int


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
    settings: Differences
    data: Differences
    environment: Differences


def against_facts(run: Run, other: Run, names: tuple[str, str]) -> AgainstFacts:
    """The facts of a run and of the one it is compared with."""
    runs = run, other
    digests = [each.data.get("evaluation") for each in runs]
    scores = [_score(runs, *which) for which in _SCORES]
    spent = {axis: tuple(measures.spent(each, axis) for each in runs) for axis in AXES}
    return AgainstFacts(
        names,
        seeds=tuple(each.config["seed"] for each in runs),
        unfinished=tuple(each.workdir.name for each in runs if each.result is None),
        without_evaluation=tuple(
            each.workdir.name for each, digest in zip(runs, digests) if digest is None
        ),
        has_same_prompts=digests[0] == digests[1],
        scores=tuple(score for score in scores if any(is_number(v) for v, _ in score.values)),
        costs={axis: each for axis, each in spent.items() if all(map(is_number, each))},
        settings=_differences(*(settings_of(each.config) for each in runs)),
        data=_differences(run.data, other.data),
        environment=_differences(run.environment, other.environment),
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


def _differences(*each: Mapping[str, Any]) -> Differences:
    found = differing(each)
    return Differences(found, len(each[0].keys() | each[1].keys()) - len(found))


_SCORES = [(name, moment) for moment in ("before", "after") for name in measures.SCORES]


def _score(runs: tuple[Run, Run], name: str, moment: str) -> Score:
    one, two = rows = [(each.result or {}).get(f"eval_{moment}", {}) for each in runs]
    values = tuple((row.get(name), row.get(f"{name}_interval")) for row in rows)
    first, second = (row.get(_HITS.get(name, ""), []) for row in rows)
    is_same = runs[0].data.get("evaluation") == runs[1].data.get("evaluation")
    if not is_same or one.get("n") != two.get("n") or not first or len(first) != len(second):
        return Score(name, moment, values, None)
    trials = one["n"] if name == "avg@k" else 1
    paired = seed_interval([(a - b) / trials for a, b in zip(first, second)])
    return Score(name, moment, values, paired)
