"""The facts of a sweep: its arms, by falling score, and its points.

An arm is the points that differ only in their seed; only they are averaged.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from opdjax.config.saved import upgrade
from opdjax.config.validation import ConfigError
from opdjax.report import drawing, measures
from opdjax.report.drawing import REST, SERIES, Line
from opdjax.report.papers.compare import compare_all
from opdjax.report.run import differing, settings_of, side_by_side
from opdjax.report.table import COLUMNS, column_interval, interval
from opdjax.report.text import fixed, shown
from opdjax.runs.results import AXES, Point, Run, is_number, mean, read_run, seed_groups
from opdjax.runs.statistics import NO_RIGHT_ANSWER, has_right_answer
from opdjax.runs.workdir import WorkdirError

Interval = tuple[float, float]  # mean over seeds, half width of its 95 % interval
Lines = dict[str, Line]  # by arm, the best first
_LINE_LENGTH = 150  # points of a drawn line
_METRICS = ("kl/student_teacher", "grad/norm", "rubric/reward_mean", "staleness/kl")  # drawn
# Numbers of judged arms, and of arms that sample ahead of their update.
NUMBERS: Mapping[str, Callable[[Run], float | None]] = {
    "reward, last 10 steps": lambda run: run.last_mean("rubric/reward_mean"),
    "AUC, all steps": lambda run: mean(run.column("rubric/auc")),
    "tied groups": lambda run: mean(run.column("rubric/tied_groups")),
    "failed groups": lambda run: mean(run.column("rubric/failed_share")),
    "judge calls a step": lambda run: _api(run, len(run.metrics), "calls"),
    "tokens a step": lambda run: _api(run, len(run.metrics), "input_tokens", "output_tokens"),
    "dollars a run": lambda run: _api(run, 1, "dollars"),
    "age, updates": lambda run: mean(run.column("staleness/mean")),
    "KL, all steps": lambda run: mean(run.column("staleness/kl")),
    "effective sample size": lambda run: mean(run.column("staleness/effective_sample_size")),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm and the numbers of its finished runs."""

    name: str
    settings: dict[str, str]  # in which arms differ; empty texts where it has none
    slot: int  # the colour of its lines; REST if there are more arms than colours
    is_reference: bool  # scores the teacher itself among students: a ceiling
    seeds: dict[int, str]  # seed -> state of its point
    num_runs: int
    numbers: dict[str, Interval | None]  # of table.COLUMNS and NUMBERS
    costs: dict[str, Interval | None]  # by axis
    config: dict[str, Any] = dataclasses.field(repr=False)  # no fact, as the runs
    runs: tuple[Run, ...] = dataclasses.field(repr=False)

    @property
    def score(self) -> Interval | None:
        """avg@k after training."""
        return self.numbers["avg@k"]


def sweep_facts(points: Sequence[Point], name: str) -> dict[str, Any]:
    """The facts of the points; WorkdirError if none is readable."""
    points, runs, damaged = _readable(points)
    every = _ranked(points, runs)
    arms = [arm for arm in every if not arm.is_reference] or every
    finished = [run for arm in arms for run in arm.runs]
    first, *others = [measures.leaves(point.config) for point in points]
    varying = differing([first, *others])
    ahead = [arm for arm in arms if arm.numbers["staleness KL"]]
    scores = {arm.name: fixed(arm.score and arm.score[0]) for arm in arms}
    return {
        "name": name,
        "k": _agreed(row.get("k") for arm in every for run in arm.runs for row in run.evaluated),
        "notices": [*_notices(finished, list(runs.values())), *damaged],
        "arms": arms,
        # The arms that share the highest score, at three digits.
        "best": [name for name, score in scores.items() if score == scores[arms[0].name] != "–"],
        "references": [arm for arm in every if arm not in arms],
        "before": {  # scores of the untrained student, where runs agree
            score: _agreed(run.score(score, "before") for run in finished)
            for score in measures.SCORES
        },
        # Cost -> arms that none beats in cost and score.
        "fronts": {axis: found for axis in AXES if (found := _front(arms, axis))},
        "differences": _differences(arms),
        "curves": {axis: found for axis in AXES if (found := _curves(arms, axis))},
        "metrics": {
            name: metric_lines(ahead if name.startswith("staleness/") else arms, name)
            for name in _METRICS
        },
        "answers": side_by_side(
            {arm.name: row for arm in arms for run in arm.runs[:1] for row in run.evaluated[-1:]}
        ),
        "points": [_point(point, runs.get(point.workdir)) for point in points],
        "papers": compare_all(points),
        "common": {name: shown(value) for name, value in first.items() if name not in varying},
    }


def _readable(points: Sequence[Point]) -> tuple[list[Point], dict[pathlib.Path, Run], list[str]]:
    """(readable points, runs by directory, errors): one damaged file hides no other run."""
    kept, runs, damaged = [], {}, []
    for point in points:
        try:
            upgrade(point.config)
            if point.status in ("done", "begun"):
                runs[point.workdir] = read_run(point.workdir)
                upgrade(runs[point.workdir].config)
            kept.append(point)
        except (WorkdirError, ConfigError) as error:
            damaged.append(f"{point.id} is left out, it cannot be read: {error}")
    if not kept:
        raise WorkdirError(damaged[0])
    return kept, runs, damaged


def _agreed(values: Iterable[Any]) -> Any:
    """The one value that all known ones are, or None."""
    found = set(values) - {None}
    return found.pop() if len(found) == 1 else None


def _notices(finished: Sequence[Run], runs: Sequence[Run]) -> list[str]:
    """What runs should share and do not, and graders that found nothing right."""
    found = []
    for digest in ("prompts", "evaluation", "student", "teacher"):
        part = "data" if digest == "prompts" else digest
        digests: dict[str, set[str]] = collections.defaultdict(set)
        for run in finished:  # a run without a teacher has no digest of one
            digests[repr(run.config.get(part))] |= {run.data.get(digest)} - {None}
        if any(len(each) > 1 for each in digests.values()):
            points = f"points with the same {part} settings: their files changed in between"
            found.append(f"The {digest} digest differs between {points}.")
    # Of the evaluation: what final scores depend on.
    if differing([upgrade(run.config)["evaluation"] | {"every": 0} for run in finished]):
        found.append("The points were evaluated with different settings: not all scores compare.")
    names = ("opdjax", "commit", "jax")
    if changed := differing([{n: run.environment.get(n) for n in names} for run in finished]):
        found.append(f"The points were run under different versions ({', '.join(changed)}).")
    evaluations = [row for run in runs for row in run.evaluations]
    if evaluations and not has_right_answer(evaluations):
        found.append(f"{NO_RIGHT_ANSWER.capitalize()}.")
    return found


def _ranked(points: Sequence[Point], runs: Mapping[pathlib.Path, Run]) -> list[Arm]:
    """All arms by falling score, those without a finished run last, then the teacher's own."""
    groups = seed_groups(points)
    overrides = [group.overrides for group in groups]
    names = differing(overrides) if len(groups) > 1 else overrides[0]
    configs = [upgrade(group.points[0].config) for group in groups]
    are_many = len({config["student"]["path"] for config in configs}) > 1
    arms = []
    for group, config in zip(groups, configs):
        done = [runs[point.workdir] for point in group.done]
        arms.append(
            Arm(
                name="",
                settings={name: str(group.overrides.get(name, "")) for name in names},
                slot=REST,
                is_reference=are_many and config["student"]["path"] == config["teacher"]["path"],
                seeds={point.config["seed"]: point.status for point in group.points},
                num_runs=len(done),
                numbers={name: column_interval(name, done) for name in COLUMNS}
                | {name: interval(map(read, done)) for name, read in NUMBERS.items()},
                costs={axis: interval(measures.spent(run, axis) for run in done) for axis in AXES},
                config=config,
                runs=tuple(done),
            )
        )
    score = lambda arm: (arm.score or (-math.inf,))[0]
    kl = lambda arm: (arm.numbers["KL(S || T)"] or (math.inf,))[0]  # where nothing was graded
    arms.sort(key=lambda arm: (arm.is_reference, not arm.runs, -score(arm), kl(arm)))
    labels = [label(arm.settings) for arm in arms]
    # Where there are too many arms, only the first, which are the best, have a colour.
    num_drawn = sum(bool(arm.runs) and not arm.is_reference for arm in arms)
    num_coloured = num_drawn if num_drawn <= SERIES else SERIES - 1
    return [
        dataclasses.replace(
            arm,
            name=f"{name} ({at + 1})" if labels.count(name) > 1 else name,
            slot=at if at < num_coloured else REST,
        )
        for at, (arm, name) in enumerate(zip(arms, labels))
    ]


def label(settings: Mapping[str, str]) -> str:
    """An arm's name: the settings in which it differs from others."""
    given = ((name, value) for name, value in settings.items() if value)
    parts = (value if name == "arm" else f"{name} {value}" for name, value in given)
    return ", ".join(parts) or "base"


def _front(arms: Sequence[Arm], axis: str) -> tuple[str, ...]:
    """The arms that no other beats in cost and score, the cheapest first; none of one arm."""
    known = [arm for arm in arms if arm.score and arm.costs[axis]]
    places = {arm.name: (arm.costs[axis][0], -arm.score[0]) for arm in known}
    if axis == "steps" or len(places) < 2 or not any(cost > 0 for cost, _ in places.values()):
        return ()
    is_beaten = lambda one: any(
        other[0] <= one[0] and other[1] <= one[1] and other != one for other in places.values()
    )
    return tuple(name for name in sorted(places, key=places.get) if not is_beaten(places[name]))


def _differences(arms: Sequence[Arm]) -> dict[str, dict[str, list[str]]]:
    """Setting -> its value -> arms, most arms first."""
    found = {}
    for field, values in differing([settings_of(arm.config) for arm in arms]).items():
        named: dict[str, list[str]] = collections.defaultdict(list)
        for arm, value in zip(arms, values):
            named[shown(value) or "(empty)"].append(arm.name)
        found[field] = dict(sorted(named.items(), key=lambda each: -len(each[1])))
    return found


def _band(x: Iterable[float], values: Iterable[Interval | None], slot: int, **style: Any) -> Line:
    means, halves = zip(*(value or (None, None) for value in values))
    return drawing.interval_line([*x], means, halves, slot=slot, **style)


def _curves(arms: Sequence[Arm], axis: str) -> dict[str, Lines]:
    """The scores during training; a score that no arm has at two steps is left out."""
    found = {}
    for score in measures.SCORES:
        lines = {arm.name: line for arm in arms if (line := _score_line(arm, axis, score))}
        if any(len(line.x) > 1 for line in lines.values()):
            found[score] = lines
    return found


def _score_line(arm: Arm, axis: str, score: str) -> Line | None:
    """A score at the steps where every run of the arm was evaluated."""
    found = [{row["step"]: row[score] for row in run.evaluated if score in row} for run in arm.runs]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    spent = [measures.totals(run, axis, steps) for run in arm.runs]
    if not steps or None in spent:
        return None
    values = [interval(run[step] for run in found) for step in steps]
    return _band(map(statistics.fmean, zip(*spent)), values, arm.slot)


def metric_lines(arms: Sequence[Arm], name: str) -> dict[str, Line]:
    """A line per arm that has the metric: each run smoothed, then their mean over seeds."""
    found = {}
    for arm in arms:
        if runs := [run for run in arm.runs if drawing.finite(run.column(name))]:
            length = min(len(run.metrics) for run in runs)
            kept = slice(0, length, math.ceil(length / _LINE_LENGTH))
            window = lambda run: drawing.smoothing_window(len(run.metrics))
            columns = [drawing.smooth(run.column(name), window(run))[kept] for run in runs]
            values, steps = map(interval, zip(*columns)), runs[0].column("step")[kept]
            found[arm.name] = _band(steps, values, arm.slot, has_markers=False)
    return found


def _api(run: Run, share: int, *kinds: str) -> float | None:
    """All requests to judges, tokens or dollars, over `share`; None if there were no requests."""
    found = [
        value
        for row in run.metrics
        for name, value in row.items()
        if name.startswith("api/") and name.rpartition("/")[2] in kinds
    ]
    return math.fsum(filter(is_number, found)) / share if found else None


def _point(point: Point, run: Run | None) -> dict[str, Any]:
    """A point and the result of its run."""
    after = ((run and run.result) or {}).get("eval_after", {})
    return {
        "id": point.id,
        "state": point.status,
        "failure": measures.failure_texts(point.failure or {}) if point.status == "failed" else {},
        "step": run.metrics[-1]["step"] if run and run.metrics else 0,
        "num_steps": run.planned_steps if run else 0,
        "score": (after.get("avg@k"), after.get("avg@k_interval")),
        "skipped_steps": run and measures.skipped_steps(run),
        "seconds": run and measures.spent(run, "seconds"),
    }
