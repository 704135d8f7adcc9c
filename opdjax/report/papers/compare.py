"""Compares a paper's table with the runs of a sweep: our mean for each cell, missing runs, and the
verdicts on the paper's claims, from differences paired by seed. No jax.

Each paper has a YAML file in this directory with `paper` and `tables`, a list of `PaperTable`; its
entries have the fields of the dataclasses below. A row is an arm of a sweep
(`opdjax.config.grid.arms`). A column is a score or metric of its runs, possibly for one pair of
models. Sweeps at the paper's size and their small twins use the same labels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import yaml

from opdjax.config.saved import upgrade
from opdjax.config.validation import ConfigError, differences, from_dict, nearest
from opdjax.runs import statistics
from opdjax.runs.results import Point, Run, SeedGroup, read_group, read_run, seed_groups
from opdjax.runs.workdir import WorkdirError

PAPERS = ("vopd", "npd", "ropd", "rubricem")
# Where a number comes from, the most reliable source first.
MARKS = {
    "C": "the released code",
    "P": "the paper or its author",
    "R": "a later release of the same author",
    "A": "the abstract",
    "T": "the code base that the paper builds on",
    "N": "machine-written notes on the paper",
    "B": "an earlier note of the same kind",
    "W": "a collection of results",
    "H": "a predecessor of the same authors",
    "D": "derived by arithmetic",
    "I": "inferred",
}
_SCALES = {"%": 100.0, "h": 1 / 3600}  # from a run's number to the unit


@dataclasses.dataclass(frozen=True)
class Value:
    """A number of the paper, in its own unit."""

    number: float
    mark: str  # a key of MARKS


@dataclasses.dataclass(frozen=True)
class PaperColumn:
    """A quantity, how it is read from a run, and the pair of models that it applies to."""

    label: str
    # See `compare.reader`. Empty: only the paper has this number, no run here can have it.
    read: str = "avg@k"
    pair: str = ""  # label of the column's points in addition to the row's arm; empty: any
    unit: str = ""
    # Label of a row. If set, the number is not the score `read` but the cost (`spent`) until a run
    # first scores as much as the best evaluation of that row's run with the same seed.
    until: str = ""
    spent: Literal["prompts", "seconds"] = "prompts"

    @property
    def scale(self) -> float:
        """From a run's own number to the paper's unit."""
        return _SCALES.get(self.unit, 1.0)

    @property
    def is_timed(self) -> bool:
        """Whether the number depends on the machine."""
        parts = (self.read, self.spent if self.until else "")
        return "seconds" in parts or "time/" in self.read or "per_second" in self.read


@dataclasses.dataclass(frozen=True)
class Row:
    """A method: an arm of the sweep or, without one, a method that is not implemented here."""

    label: str
    arm: str = ""
    # The paper's numbers in the table's first columns, each with its mark ("58.7 N"), or None.
    values: tuple[str | None, ...] = ()
    note: str = ""
    # The score after or before training; `before` is the untrained student of these runs.
    when: Literal["after", "before"] = "after"

    def value(self, index: int) -> Value | None:
        """The paper's number in a column of the table; None if it has none."""
        text = self.values[index] if index < len(self.values) else None
        if text is None:
            return None
        number, mark = text.split()
        return Value(json.loads(number), mark)


@dataclasses.dataclass(frozen=True)
class PaperClaim:
    """A statement of the paper about two rows in a column, which runs can reproduce or contradict.

    `more`, `less`: left minus right is above `margin`, or below -margin. `equal`: it is within ±
    margin. `ratio`: left is at least `margin` times right. `gap`: left closes at least the share
    `margin` of the gap from `base` to right. Margins are in a run's own unit, not the paper's.
    """

    kind: Literal["more", "less", "equal", "ratio", "gap"]
    text: str
    left: str  # label of a row
    right: str
    column: str  # label; the claim is also tested in columns that read the same for other pairs
    margin: float = 0.0
    mark: str = "P"
    base: str = ""  # label of a row, for a gap


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """A table or figure of a paper."""

    name: str  # as in `opdjax table --paper NAME`
    paper: str
    title: str
    settings: str  # models, data, hardware
    columns: tuple[PaperColumn, ...]
    rows: tuple[Row, ...]
    claims: tuple[PaperClaim, ...]
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> str:
        """The labels of the table's points."""
        labels = [f"arm={row.arm}" for row in self.rows if row.arm]
        labels += [f"pair={column.pair}" for column in self.columns if column.pair]
        return " ".join(dict.fromkeys(labels))


@functools.cache
def paper_tables() -> dict[str, PaperTable]:
    """The tables of all papers, by name. ConfigError if a file is wrong."""
    here = pathlib.Path(__file__).parent
    return {table.name: table for name in PAPERS for table in load(here / f"{name}.yaml")}


def paper_named(name: str) -> PaperTable:
    """The table with this name; ConfigError if there is none."""
    tables = paper_tables()
    if name not in tables:
        advice = f"{nearest(name, tables)}; the names are {', '.join(tables)}"
        raise ConfigError(f"there is no table {name!r}; {advice}")
    return tables[name]


def load(file: pathlib.Path) -> list[PaperTable]:
    """The tables of one paper; ConfigError with the file and the entry if a field is wrong."""
    found = yaml.safe_load(file.read_text("utf-8"))
    return [
        from_dict(PaperTable, of | {"paper": found["paper"]}, f"{file.name}: {of.get('name')}.")
        for of in found["tables"]
    ]


# Comparison

Status = Literal["reproduced", "contradicted", "inconclusive", "not run"]
Interval = tuple[float, float | None]  # mean and half of its 95 % interval; None: one seed
Bounds = tuple[float | None, float | None]  # None: no bound
Cells = Mapping[str, Mapping[str, "Cell"]]  # by labels of row and column


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


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of a claim in one column, in a run's own unit."""

    claim: PaperClaim
    column: PaperColumn
    status: Status
    # Left minus right, over seeds; the ratio or the share of the gap for claims of that kind. The
    # interval of a ratio is symmetric in its logarithm, and `difference` has the larger half.
    difference: Interval | None = None
    interval: Bounds | None = None  # both ends; None: one seed
    claimed: Bounds = (None, None)  # the range where the claim holds
    n: int = 0  # pairs


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A table with our cells and verdicts. `json.dumps(dataclasses.asdict(...))` accepts it."""

    table: PaperTable
    columns: tuple[PaperColumn, ...]  # those that the paper or the sweep fills
    cells: Cells
    verdicts: tuple[Verdict, ...]
    flags: tuple[str, ...]  # caveats: rows with other prompts, commits or machines
    marks: Mapping[str, str]  # those that the table uses, with their meaning

    @property
    def is_run(self) -> bool:
        """Whether the sweep has any point of the table."""
        return any(cell.digest for row in self.cells.values() for cell in row.values())


# By labels of row and column: the points of a cell, and their completed runs by seed.
_Found = Mapping[tuple[str, str], tuple[SeedGroup, dict[int, Run]] | None]


def compare(table: PaperTable, points: Sequence[Point]) -> Comparison:
    """The table with the runs of the points.

    WorkdirError if a cell would mix configs, if a run's directory holds another config than its
    point, or if rows of one column were evaluated on different prompts or in different ways.
    """
    reading, available = functools.cache(read_run), seed_groups(points)
    places = [(row, column) for row in table.rows for column in table.columns]
    found = {(row.label, of.label): _find(row, of, available, reading) for row, of in places}
    cells = {
        row.label: {
            column.label: _cell(row, column, row.value(i), found)
            for i, column in enumerate(table.columns)
        }
        for row in table.rows
    }
    filled = {
        label for row in cells.values() for label, cell in row.items() if cell.paper or cell.digest
    }
    marks = {claim.mark for claim in table.claims}
    marks |= {cell.paper.mark for row in cells.values() for cell in row.values() if cell.paper}
    return Comparison(
        table,
        tuple(column for column in table.columns if column.label in filled),
        cells,
        tuple(verdict for claim in table.claims for verdict in _verdicts(claim, table, cells)),
        tuple(dict.fromkeys(_flags(table, found))),
        {mark: text for mark, text in MARKS.items() if mark in marks},
    )


def _find(
    row: Row, column: PaperColumn, available: Sequence[SeedGroup], reading: Callable[..., Run]
) -> tuple[SeedGroup, dict[int, Run]] | None:
    if not (row.arm and column.read):
        return None
    wanted = {"arm": row.arm} | ({"pair": column.pair} if column.pair else {})
    fitting = [group for group in available if wanted.items() <= group.overrides.items()]
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


def _cell(row: Row, column: PaperColumn, paper: Value | None, found: _Found) -> Cell:
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
    return Cell(paper, by_seed, ours, difference, group.missing, group.digest, tuple(censored))


def reader(read: str, when: Literal["after", "before"] = "after") -> Callable[[Run], float | None]:
    """A function that returns a column's number of a run, or None if the run has no such number.

    `avg@k`, `pass@k`, `greedy`: the score after (or before) training, over all prompts.
    `avg@k:NAME`: the same for one benchmark, or for `mean`, the mean over all benchmarks.
    `median:METRIC`: median of a metric over all steps. `last:METRIC`: its mean over the last ten.
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
    }
    if kind not in readers:
        expected = "a score (avg@k:NAME), seconds, median:METRIC or last:METRIC"
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
        prompts = step * run.config["train"]["prompts_per_step"]
        spent = prompts if column.spent == "prompts" else run.total_at("seconds", step)
        found[seed] = float(spent), bool(reached)
    return found


def finite(mean: float, half: float) -> Interval:
    """The interval with None for an infinite half width, as JSON has no infinity."""
    return mean, half if math.isfinite(half) else None


def _flags(table: PaperTable, found: _Found) -> Iterator[str]:
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
    table: PaperTable, column: PaperColumn, found: _Found, rows: tuple[Row, Row]
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


def _verdicts(claim: PaperClaim, table: PaperTable, cells: Cells) -> list[Verdict]:
    """In all columns of the same quantity that have runs; a single `not run` if none has."""
    named = next(column for column in table.columns if column.label == claim.column)
    alike = [column for column in table.columns if _kind(column) == _kind(named)]
    found = [_verdict(claim, column, cells) for column in alike]
    return [each for each in found if each.n] or [each for each in found if each.column is named]


def _kind(column: PaperColumn) -> tuple[str, str, str]:
    """Columns of one kind read the same quantity; scores on all benchmarks are one kind."""
    read = column.read.partition(":")[0] if "@" in column.read else column.read
    return read, column.until, column.spent


def _verdict(claim: PaperClaim, column: PaperColumn, cells: Cells) -> Verdict:
    left, right = (cells[label][column.label] for label in (claim.left, claim.right))
    if claim.kind == "gap":
        start = cells[claim.base][column.label]
        values = statistics.shares_of_gap(left.by_seed, start.by_seed, right.by_seed)
    else:
        is_ratio = claim.kind == "ratio"
        values = statistics.paired_by_seed(left.by_seed, right.by_seed, is_ratio=is_ratio)
    low, high = {
        "less": (None, 0 - claim.margin),
        "equal": (-claim.margin, claim.margin),
    }.get(claim.kind, (claim.margin, None))
    verdict = functools.partial(Verdict, claim, column, claimed=(low, high), n=len(values))
    if not values:
        return verdict("not run")
    if any(map(math.isnan, values.values())):
        return verdict("inconclusive")
    mean, half = statistics.seed_interval(list(values.values()))
    # A number of a run that never reached its target is a lower bound.
    reach = (
        -math.inf if values.keys() & set(right.censored) else mean - half,
        math.inf if values.keys() & set(left.censored) else mean + half,
    )
    asked = (math.log(claim.margin), None) if claim.kind == "ratio" else (low, high)
    is_within = statistics.lies_within(reach, asked)
    status = "inconclusive" if is_within is None else "reproduced" if is_within else "contradicted"
    low, high = mean - half, mean + half
    if claim.kind == "ratio":
        mean, half, low, high = statistics.ratio_of_logarithm(mean, half)
    return verdict(status, finite(mean, half), (low, high) if math.isfinite(half) else None)


def compare_all(points: Sequence[Point]) -> dict[str, Any]:
    """The comparisons of the tables that have points here, and by name the errors of others."""
    found, refused = [], {}
    for name, table in paper_tables().items():
        try:
            found.append(compare(table, points))
        except WorkdirError as error:
            refused[name] = str(error)
    return {"compared": [each for each in found if each.is_run], "refused": refused}
