"""The facts of a sweep: its arms, by falling score, and its points.

An arm is the points that differ only in their seed; only they are averaged.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from opdjax.config.saved import upgrade
from opdjax.config.validation import ConfigError
from opdjax.report import measures
from opdjax.report.against import differing, settings_of
from opdjax.report.answers import Marker, of_arms, unmarked
from opdjax.report.drawing import REST, SERIES, Line, interval_line, smooth, smoothing_window
from opdjax.report.papers.compare import PaperFacts, of_table, paper_facts
from opdjax.report.papers.tables import paper_named
from opdjax.report.table import COLUMNS, column_interval
from opdjax.report.text import fixed, shown
from opdjax.runs.results import AXES, Point, Run, is_number, mean, read_run, seed_groups
from opdjax.runs.statistics import has_right_answer, seed_interval
from opdjax.runs.workdir import WorkdirError

Interval = tuple[float, float]  # mean over seeds, half width of its 95 % interval
Reading = Callable[[Run], float | None]
Lines = dict[str, Line]  # by arm, the best first
_VARYING = 6  # most settings in a point's row
_LINE_LENGTH = 150  # points of a drawn line
_JUDGED = "rubric/reward_mean", "rubric/auc", "rubric/tied_groups", "rubric/no_signal_share"
_JUDGED_NUMBERS: dict[str, Reading] = {
    "reward, last 10 steps": lambda run: run.last_mean("rubric/reward_mean"),
    "AUC, all steps": lambda run: mean(run.column("rubric/auc")),
    "tied groups": lambda run: mean(run.column("rubric/tied_groups")),
    "failed groups": lambda run: mean(run.column("rubric/failed_share")),
    "judge calls a step": lambda run: _api(run, len(run.metrics), "calls"),
    "tokens a step": lambda run: _api(run, len(run.metrics), "input_tokens", "output_tokens"),
    "dollars a run": lambda run: _api(run, 1, "dollars"),
}
_AHEAD = "staleness/kl", "staleness/mean", "staleness/effective_sample_size", "filter/keep_rate"
_AHEAD_NUMBERS: dict[str, Reading] = {
    "age, updates": lambda run: mean(run.column("staleness/mean")),
    "KL, all steps": lambda run: mean(run.column("staleness/kl")),
    "KL, last 10 steps": lambda run: run.last_mean("staleness/kl"),
    "highest KL": lambda run: max(filter(is_number, run.column("staleness/kl")), default=None),
    "effective sample size": lambda run: mean(run.column("staleness/effective_sample_size")),
    "keep rate": lambda run: run.keep_rate,
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm and the numbers of its finished runs."""

    name: str
    settings: dict[str, str]  # in which arms differ; empty texts where it has none
    slot: int  # the colour of its lines; REST if there are more arms than colours
    is_reference: bool  # scores the teacher itself among students: a ceiling
    seeds: dict[int, int]  # seed -> place of its point
    num_runs: int
    numbers: dict[str, Interval | None]  # of table.COLUMNS
    costs: dict[str, Interval | None]  # by axis
    config: dict[str, Any] = dataclasses.field(repr=False)  # no fact, as the runs
    runs: tuple[Run, ...] = dataclasses.field(repr=False)

    @property
    def score(self) -> Interval | None:
        """avg@k after training."""
        return self.numbers["avg@k"]


@dataclasses.dataclass(frozen=True)
class PointFacts:
    """A point and the result of its run."""

    id: str
    state: str  # done, failed, begun or waiting
    settings: dict[str, Any]  # in which points differ, if they are few; else the seed
    step: int = 0
    num_steps: int = 0
    score: tuple[float | None, float | None] = (None, None)  # avg@k, interval over prompts
    skipped_steps: int | None = None
    seconds: float | None = None
    failure: dict[str, str] = dataclasses.field(default_factory=dict)
    reason: str = ""  # of the failure, in one line


@dataclasses.dataclass(frozen=True)
class SomeArms:
    """The arms that have certain metrics: lines of these, and numbers by arm."""

    arms: tuple[Arm, ...]  # with colours of their own
    lines: dict[str, Lines]
    numbers: dict[str, dict[str, Interval | None]]


@dataclasses.dataclass(frozen=True)
class SweepFacts:
    """A sweep."""

    name: str
    k: int | None  # of avg@k; None if runs differ in it
    is_all_wrong: bool  # there are evaluations, and none of any run graded an answer right
    arms: tuple[Arm, ...]
    references: tuple[Arm, ...]
    best: tuple[str, ...]  # the arms that share the highest score, at three digits
    score_range: Interval  # ends of the intervals of all arms
    before: dict[str, float | None]  # scores of the untrained student, where runs agree
    damaged: dict[str, str]  # id of a point -> why it cannot be read
    changed_files: dict[str, str]  # digest in which runs differ -> equal part of their settings
    mixed: tuple[str, ...]  # other facts in which runs differ: evaluation, opdjax, commit, jax
    fronts: dict[str, tuple[str, ...]]  # cost -> arms that none beats in cost and score
    differences: dict[str, dict[str, list[str]]]  # setting -> its value -> arms, most arms first
    rates: dict[str, dict[str, Line]]  # by other settings and score, against the learning rate
    curves: dict[str, dict[str, Lines]]  # by axis and score
    training: dict[str, Lines]  # by metric
    positions: tuple[str, ...]  # ranges of tokens
    kl_by_position: Lines
    judged: SomeArms
    ahead: SomeArms  # near-policy arms
    answers: dict[str, Any] | None
    points: tuple[PointFacts, ...]
    papers: PaperFacts | None
    common: dict[str, Any]  # settings that all points share


def sweep_facts(
    points: Sequence[Point], name: str, mark: Marker = unmarked, paper: str | None = None
) -> SweepFacts:
    """The facts of the points, or of those of one table of a paper; WorkdirError if no point is
    readable or of the table, ConfigError if there is no such table.
    """
    points, runs, damaged = _readable(points)
    papers = paper_facts(points, paper)
    if paper is not None:
        points, name = of_table(points, paper_named(paper)), f"{name}: {paper}"
    every = _ranked(points, runs)
    arms = [arm for arm in every if not arm.is_reference] or every
    finished = [run for arm in arms for run in arm.runs]
    counts = [measures.samples_per_prompt(run) for arm in every for run in arm.runs]
    evaluations = [row for run in runs.values() for row in run.evaluations]
    scores = {arm.name: fixed(arm.score and arm.score[0]) for arm in arms}
    spans = (arm.score for arm in arms if arm.score)
    ends = [m + side * (h if is_number(h) else 0.0) for m, h in spans for side in (-1, 1)]
    # What runs should share; of the evaluation: what final scores depend on.
    shared = [
        {"evaluation": upgrade(run.config)["evaluation"] | {"every": 0}}
        | {name: run.environment.get(name) for name in ("opdjax", "commit", "jax")}
        for run in finished
    ]
    first, *others = [measures.leaves(point.config) for point in points]
    varying = differing([first, *others])
    few = [name for name in varying if len(varying) <= _VARYING or name == "seed"]
    judged = [arm for arm in arms if any(_has(run, _JUDGED[0]) for run in arm.runs)]
    ahead = [arm for arm in arms if any(run.is_near_policy for run in arm.runs)]
    positions, kl_by_position = _by_position([arm for arm in arms if arm.slot != REST])
    return SweepFacts(
        name,
        _agreed(k for k in counts if k is not None),
        bool(evaluations) and not has_right_answer(evaluations),
        tuple(arms),
        references=tuple(arm for arm in every if arm.is_reference and arms is not every),
        best=tuple(name for name, score in scores.items() if score == scores[arms[0].name] != "–"),
        score_range=(min(ends, default=0.0), max(ends, default=1.0)),
        before={
            score: _agreed(run.score(score, "before") for run in finished)
            for score in measures.SCORES
        },
        damaged=damaged,
        changed_files=_changed_files(finished),
        mixed=tuple(differing(shared)),
        fronts={axis: found for axis in AXES if (found := _front(arms, axis))},
        differences=_differences(arms),
        rates=_rates(arms),
        curves={axis: found for axis in AXES if (found := _curves(arms, axis))},
        training={name: metric_lines(arms, name) for name in ("kl/student_teacher", "grad/norm")},
        positions=positions,
        kl_by_position=kl_by_position,
        judged=_some(judged, _JUDGED, _JUDGED_NUMBERS),
        ahead=_some(ahead, _AHEAD, _AHEAD_NUMBERS),
        answers=of_arms([(arm.name, arm.runs) for arm in arms], mark),
        points=tuple(_point(point, runs.get(point.workdir), few) for point in points),
        papers=papers,
        common={name: value for name, value in first.items() if name not in varying},
    )


def _readable(
    points: Sequence[Point],
) -> tuple[list[Point], dict[pathlib.Path, Run], dict[str, str]]:
    """(readable points, runs by directory, errors by id): one damaged file hides no other run."""
    kept, runs, damaged = [], {}, {}
    for point in points:
        try:
            upgrade(point.config)
            if point.status in ("done", "begun"):
                runs[point.workdir] = read_run(point.workdir)
                upgrade(runs[point.workdir].config)
            kept.append(point)
        except (WorkdirError, ConfigError) as error:
            damaged[point.id] = str(error)
    if not kept:
        raise WorkdirError(next(iter(damaged.values())))
    return kept, runs, damaged


def _agreed(values: Iterable[Any]) -> Any:
    """The one value that all are, or None."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


# Arms


def interval(values: Iterable[float | None]) -> Interval | None:
    """`seed_interval` of the finite values; None if there are none."""
    known = [float(value) for value in values if is_number(value)]
    return seed_interval(known) if known else None


def _ranked(points: Sequence[Point], runs: Mapping[pathlib.Path, Run]) -> list[Arm]:
    """All arms by falling score, those without a finished run last, then the teacher's own."""
    groups = seed_groups(points)
    names = differing_overrides([group.overrides for group in groups])
    configs = [upgrade(group.points[0].config) for group in groups]
    are_many = len({config["student"]["path"] for config in configs}) > 1
    arms = []
    for group, config in zip(groups, configs):
        done = [runs[point.workdir] for point in group.done]
        arms.append(
            Arm(
                name="",
                settings={n: shown_override(group.overrides.get(f, "")) for f, n in names.items()},
                slot=REST,
                is_reference=are_many and config["student"]["path"] == config["teacher"]["path"],
                seeds={point.config["seed"]: points.index(point) for point in group.points},
                num_runs=len(done),
                numbers={name: column_interval(name, done) for name in COLUMNS},
                costs={axis: interval(measures.spent(run, axis) for run in done) for axis in AXES},
                config=config,
                runs=tuple(done),
            )
        )
    arms.sort(key=lambda arm: (arm.is_reference, -(arm.score or (-math.inf,))[0]))
    named = distinct([label(arm.settings) for arm in arms])
    return _coloured([dataclasses.replace(arm, name=name) for arm, name in zip(arms, named)])


def _slots(names: Sequence[str]) -> dict[str, int]:
    """A colour each; if there are too many, only the first, which are the best, have one."""
    most = SERIES if len(names) <= SERIES else SERIES - 1
    return {name: at if at < most else REST for at, name in enumerate(names)}


def _coloured(arms: Sequence[Arm]) -> list[Arm]:
    slots = _slots([arm.name for arm in arms if arm.runs and not arm.is_reference])
    return [dataclasses.replace(arm, slot=slots.get(arm.name, REST)) for arm in arms]


def label(settings: Mapping[str, str]) -> str:
    """An arm's name: the settings in which it differs from others."""
    given = ((name, value) for name, value in settings.items() if value)
    parts = (value if name == "arm" else f"{name} {value}" for name, value in given)
    return ", ".join(parts) or "base"


def distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered by position where several are equal."""
    return [f"{name} ({at})" if names.count(name) > 1 else name for at, name in enumerate(names, 1)]


def differing_overrides(overrides: list[dict[str, Any]]) -> dict[str, str]:
    """The overrides in which arms differ (of one arm: all), each with its short name."""
    names = differing(overrides) if len(overrides) > 1 else overrides[0]
    return dict(zip(names, short_names([*names])))


def short_names(names: Sequence[str]) -> list[str]:
    """Settings without their section, where that is unique."""
    fields = [name.rpartition(".")[2] for name in names]
    return [field if fields.count(field) == 1 else name for name, field in zip(names, fields)]


def shown_override(value: Any) -> str:
    """The override in the form in which `shown` writes a setting; sweeps store it as text."""
    if not isinstance(value, str) or value.isdecimal():
        return shown(value)
    try:
        return shown(float(value)) if is_number(float(value)) else value
    except ValueError:
        return value


def _changed_files(runs: Sequence[Run]) -> dict[str, str]:
    parts = {"prompts": "data", "evaluation": "evaluation"}
    changed = {}
    for digest, part in (parts | {model: model for model in ("student", "teacher")}).items():
        found: dict[str, set[str]] = collections.defaultdict(set)
        for run in runs:  # a run without a teacher has no digest of one
            found[repr(run.config.get(part))] |= {run.data.get(digest)} - {None}
        if any(len(digests) > 1 for digests in found.values()):
            changed[digest] = part
    return changed


def _differences(arms: Sequence[Arm]) -> dict[str, dict[str, list[str]]]:
    found = {}
    for field, values in differing([settings_of(arm.config) for arm in arms]).items():
        named: dict[str, list[str]] = collections.defaultdict(list)
        for arm, value in zip(arms, values):
            named[shown(value) or "(empty)"].append(arm.name)
        found[field] = dict(sorted(named.items(), key=lambda each: -len(each[1])))
    return found


def _front(arms: Sequence[Arm], axis: str) -> tuple[str, ...]:
    """The arms that no other beats in cost and score, the cheapest first; none of one arm."""
    known = [arm for arm in arms if arm.score and arm.costs[axis]]
    places = {arm.name: (arm.costs[axis][0], -arm.score[0]) for arm in known}
    if len(places) < 2 or not any(cost > 0 for cost, _ in places.values()):
        return ()
    is_beaten = lambda one: any(
        other[0] <= one[0] and other[1] <= one[1] and other != one for other in places.values()
    )
    return tuple(name for name in sorted(places, key=places.get) if not is_beaten(places[name]))


# Lines


def _band(x: Iterable[float], values: Iterable[Interval | None], slot: int, **style: Any) -> Line:
    """A line with its intervals; an infinite half width is not drawn."""
    means, halves = zip(*(value or (None, None) for value in values))
    return interval_line([*x], means, halves, slot=slot, **{"has_markers": False} | style)


_MARKED = {"has_markers": True, "bars": True}


def _rates(arms: Sequence[Arm]) -> dict[str, dict[str, Line]]:
    """Scores against the learning rate, by other settings; the best of these have a colour."""
    families: dict[str, list[Arm]] = collections.defaultdict(list)
    for arm in arms:
        rest = measures.leaves(arm.config) | {"seed": None, "optimizer.learning_rate": None}
        if arm.score is not None:
            families[json.dumps(rest, sort_keys=True)].append(arm)
    rate_of = lambda arm: arm.config["optimizer"]["learning_rate"]
    kept = [sorted(family, key=rate_of) for family in families.values() if len(family) > 1]
    others = (
        {n: v for n, v in family[0].settings.items() if n.rpartition(".")[2] != "learning_rate"}
        for family in kept
    )
    slots = _slots(distinct([*map(label, others)]))
    return {
        name: {
            score: _band(
                map(rate_of, family), [arm.numbers[score] for arm in family], slot, **_MARKED
            )
            for score in measures.SCORES
        }
        for (name, slot), family in zip(slots.items(), kept)
    }


def _curves(arms: Sequence[Arm], axis: str) -> dict[str, Lines]:
    """The scores during training; a score that no arm has at two steps is left out."""
    found = {
        score: {arm.name: line for arm in arms if (line := _score_line(arm, axis, score))}
        for score in measures.SCORES
    }
    is_curve = lambda lines: any(len(line.x) > 1 for line in lines.values())
    return {score: lines for score, lines in found.items() if is_curve(lines)}


def _score_line(arm: Arm, axis: str, score: str) -> Line | None:
    """A score at the steps where every run of the arm was evaluated."""
    found = [
        {row["step"]: row[score] for row in measures.evaluated(run) if score in row}
        for run in arm.runs
    ]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    spent = [measures.totals(run, axis, steps) for run in arm.runs]
    if not steps or None in spent:
        return None
    values = [interval(run[step] for run in found) for step in steps]
    return _band(map(statistics.fmean, zip(*spent)), values, arm.slot, has_markers=True)


def metric_lines(arms: Sequence[Arm], name: str) -> Lines:
    """A line per arm that has the metric: each run smoothed, then their mean over seeds."""
    found = {}
    for arm in arms:
        if runs := [run for run in arm.runs if _has(run, name)]:
            length = min(len(run.metrics) for run in runs)
            kept = slice(0, length, math.ceil(length / _LINE_LENGTH))
            smoothed = (
                smooth(run.column(name), smoothing_window(len(run.metrics))) for run in runs
            )
            values = map(interval, zip(*(each[kept] for each in smoothed)))
            found[arm.name] = _band(measures.steps_of(runs[0])[kept], values, arm.slot)
    return found


def _has(run: Run, metric: str) -> bool:
    return any(value is not None for value in run.column(metric))


def _by_position(arms: Sequence[Arm]) -> tuple[tuple[str, ...], Lines]:
    """Ranges of tokens and the KL in each, at the end of training."""
    late = lambda run: run.metrics[-measures.end_length(len(run.metrics)) :]
    found = {arm.name: [measures.kl_by_position(late(run)) for run in arm.runs] for arm in arms}
    buckets = sorted({bucket for runs in found.values() for run in runs for bucket in run})
    lines = {}
    for arm in arms:
        values = [interval(run.get(bucket) for run in found[arm.name]) for bucket in buckets]
        if any(values):
            lines[arm.name] = _band(range(len(buckets)), values, arm.slot, **_MARKED)
    return tuple(map(measures.bucket_label, buckets)), lines


def _some(arms: Sequence[Arm], metrics: Sequence[str], numbers: dict[str, Reading]) -> SomeArms:
    arms = _coloured(arms)
    return SomeArms(
        tuple(arms),
        {metric: metric_lines(arms, metric) for metric in metrics},
        {a.name: {n: interval(map(read, a.runs)) for n, read in numbers.items()} for a in arms},
    )


def _api(run: Run, share: int, *kinds: str) -> float | None:
    """All requests to judges, tokens or dollars, over `share`; None if there were no requests."""
    found = [
        value
        for row in run.metrics
        for name, value in row.items()
        if name.startswith("api/") and name.rpartition("/")[2] in kinds
    ]
    return math.fsum(filter(is_number, found)) / share if found else None


# Points


def _point(point: Point, run: Run | None, names: Sequence[str]) -> PointFacts:
    settings = measures.leaves(point.config)
    about = point.id, point.status, dict(zip(short_names(names), map(settings.get, names)))
    if run is None:
        failure = measures.failure_texts(point.failure or {})
        texts = [text.splitlines() for text in failure.values() if text]
        logs = [lines for lines in texts if len(lines) > 1]  # a program's last line is the error
        return PointFacts(*about, failure=failure, reason=(logs or texts or [[""]])[0][-1])
    after = (run.result or {}).get("eval_after", {})
    return PointFacts(
        *about,
        step=run.metrics[-1]["step"] if run.metrics else 0,
        num_steps=run.planned_steps,
        score=(after.get("avg@k"), after.get("avg@k_interval")),
        skipped_steps=measures.skipped_steps(run),
        seconds=measures.spent(run, "seconds"),
    )
