"""The cells of a paper's table: which runs they hold, their means, and caveats. No jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from opdjax.config.grid import SCORED_ON
from opdjax.config.saved import upgrade
from opdjax.config.validation import differences
from opdjax.report.papers import testable
from opdjax.report.papers.tables import PaperColumn, PaperTable, Row, Value
from opdjax.report.papers.tuning import Tuning
from opdjax.runs import statistics
from opdjax.runs.results import Run, SeedGroup, read_group
from opdjax.runs.workdir import WorkdirError

Interval = tuple[float, float | None]  # mean and half of its 95 % interval; None: one seed


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number of the paper, and ours."""

    paper: Value | None
    by_seed: Mapping[int, float] = dataclasses.field(default_factory=dict)  # in a run's own unit
    ours: Interval | None = None  # in the paper's unit; None: nothing has been run
    # Our mean minus the paper's number, in the paper's unit. A column for other models than the
    # paper's has no number of the paper, so numbers of different models are never subtracted.
    difference: float | None = None
    missing: tuple[str, ...] = ()  # ids of points that are not done
    digest: str | None = None  # of the config without the seed; None: the sweep has no such point
    # Seeds that never reached the target of PaperColumn.until; their value is all that they spent.
    censored: tuple[int, ...] = ()
    greedy: Interval | None = None  # beside a score of sampled answers, in the paper's unit
    tuning: Tuning | None = None  # None: not run, or the student or teacher before training


Cells = Mapping[str, Mapping[str, "Cell"]]  # by labels of row and column


# By labels of row and column: the points of a cell, and their completed runs by seed.
Found = Mapping[tuple[str, str], tuple[SeedGroup, dict[int, Run]] | None]


def find(
    row: Row, column: PaperColumn, available: Sequence[SeedGroup], reading: Callable[..., Run]
) -> tuple[SeedGroup, dict[int, Run]] | None:
    """The points of a cell, without those of a grid, and their runs by seed; None if none fit."""
    if not (row.arm and column.read):
        return None
    wanted = {"arm": row.arm} | ({"pair": column.pair} if column.pair else {})
    fitting = [
        group
        for group in available
        if wanted.items() <= group.overrides.items() and SCORED_ON not in group.overrides
    ]
    if len(fitting) > 1:
        changed = "\n  ".join(differences(fitting[0].points[0].config, fitting[1].points[0].config))
        raise WorkdirError(
            f"row {row.label!r}, column {column.label!r} fits runs of {len(fitting)} configs, "
            f"which no mean may mix; expected one for {wanted} (first -> second):\n  {changed}"
        )
    if not fitting:
        return None
    runs = {run.config["seed"]: run for run in read_group(fitting[0], reading)}
    return fitting[0], dict(sorted(runs.items()))


def cell_of(row: Row, column: PaperColumn, paper: Value | None, found: Found) -> Cell:
    """The cell with the runs that were found for its row and column."""
    own, censored = found[row.label, column.label], []
    if own is None:
        return Cell(paper)
    (group, runs), read = own, reader(column.read, row.when)
    by_seed = {seed: value for seed, run in runs.items() if (value := read(run)) is not None}
    if column.until:
        goal = found[column.until, column.label] if row.when == "after" else None
        spent = _spent(runs, goal[1] if goal else {}, column)
        by_seed = {seed: amount for seed, (amount, _) in spent.items()}
        censored = [seed for seed, (_, is_reached) in spent.items() if not is_reached]
    ours = difference = None
    if by_seed:
        mean, half = statistics.seed_interval(list(by_seed.values()))
        ours = finite(mean * column.scale, half * column.scale)
        difference = ours[0] - paper.number if paper else None
    scores = [run.score(column.read.replace("avg@k", "greedy"), row.when) for run in runs.values()]
    greedy = None
    if column.read.startswith("avg@k") and not column.until and scores and None not in scores:
        greedy = finite(*(column.scale * x for x in statistics.seed_interval(scores)))
    about = group.missing, group.digest, tuple(censored), greedy
    return Cell(paper, by_seed, ours, difference, *about)


def reader(read: str, when: Literal["after", "before"] = "after") -> Callable[[Run], float | None]:
    """A function that returns a column's number of a run, or None if the run has no such number.

    `avg@k`, `pass@k`, `greedy`: the score after (or before) training, over all prompts.
    `avg@k:NAME`: the same for one benchmark, or for `mean`, the mean over all benchmarks.
    `median:METRIC`: median of a metric over all steps. `last:METRIC`: its mean over the last ten.
    `first:METRIC`: that of the first step, whose weights, prompts and draws all arms share.
    `seconds`: training time. Only scores exist before training. An empty `read` returns None for
    every run. ValueError for any other `read`.
    """
    kind, _, name = read.partition(":")
    if "@" in kind or kind == "greedy":
        return lambda run: run.score(read, when)
    readers: dict[str, Callable[[Run], float | None]] = {
        "": lambda run: None,
        "seconds": lambda run: run.seconds,
        "median": lambda run: run.median(name),
        "last": lambda run: run.last_mean(name),
        "first": lambda run: next(iter(run.column(name)), None),
    }
    if kind not in readers:
        expected = "a score (avg@k:NAME), seconds, median:, last: or first:METRIC"
        raise ValueError(f"a column reads {read!r}; expected {expected}")
    return readers[kind if when == "after" else ""]


def _spent(
    runs: Mapping[int, Run], goals: Mapping[int, Run], column: PaperColumn
) -> dict[int, tuple[float, bool]]:
    """By seed: what was spent until as good as the goal's best, or in all, and whether it was."""
    targets = {seed: [score for _, score in run.curve(column.read)] for seed, run in goals.items()}
    found = {}
    for seed, run in runs.items():
        if not targets.get(seed):
            continue
        reached = [step for step, score in run.curve(column.read) if score >= max(targets[seed])]
        step = reached[0] if reached else (run.result or {}).get("num_steps", run.planned_steps)
        found[seed] = testable.spent_at(run, step, column.spent), bool(reached)
    return found


def finite(mean: float, half: float) -> Interval:
    """The interval with None for an infinite half width, as JSON has no infinity."""
    return mean, half if math.isfinite(half) else None


def flags(table: PaperTable, found: Found) -> Iterator[str]:
    """Caveats on comparing the rows of a column; WorkdirError if they do not compare."""
    for column in table.columns:
        present = [row for row in table.rows if found[row.label, column.label]]
        for other in present[1:]:
            yield from _pair_flags(table, column, found, (present[0], other))
    runs = [run for each in found.values() if each for run in each[1].values()]
    commits = sorted({str(run.environment.get("commit"))[:12] for run in runs})
    if len(commits) > 1:
        yield f"the runs of this table are of several commits: {', '.join(commits)}"


def _pair_flags(
    table: PaperTable, column: PaperColumn, found: Found, rows: tuple[Row, Row]
) -> Iterator[str]:
    names = f"rows {rows[0].label!r} and {rows[1].label!r} of {table.name}"
    groups, runs = zip(*(found[row.label, column.label] for row in rows))
    # The interval between evaluations matters only to the first one that reaches a target.
    left_out = None if column.until else "every"
    asked = [upgrade(group.points[0].config)["evaluation"] for group in groups]
    settings = [{k: v for k, v in each.items() if k != left_out} for each in asked]
    if changed := differences(*settings, "evaluation."):
        listed = "\n  ".join(changed)
        raise WorkdirError(f"{names} were evaluated in other ways and do not compare:\n  {listed}")
    if not all(runs):
        return
    one, two = (next(iter(each.values())) for each in runs)
    if one.data.get("evaluation") != two.data.get("evaluation"):
        if one.config["student"]["path"] == two.config["student"]["path"]:
            raise WorkdirError(
                f"{names} answered other prompts ({one.workdir}, {two.workdir}) and do not compare"
            )
        yield f"{names} have different students, whose prompts have different tokens"
    is_start = "before" in (row.when for row in rows)
    if one.data.get("prompts") != two.data.get("prompts") and not is_start:
        yield f"{names} were trained on other prompts"
    machine = ("machine", "devices", "cores")
    machines = [{name: run.environment.get(name) for name in machine} for run in (one, two)]
    if column.is_timed and (changed := differences(*machines)):
        yield f"{names} ran on other machines, which affects seconds: {'; '.join(changed)}"
