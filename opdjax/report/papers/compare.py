"""Compares a paper's table with the runs of a sweep: our mean for each cell, missing runs, and the
verdicts on the paper's claims. No jax.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

from opdjax.config.saved import upgrade
from opdjax.config.validation import differences
from opdjax.report.papers.reading import best_score, reader, spent_until
from opdjax.report.papers.tables import PaperColumn, PaperTable, Row
from opdjax.report.papers.verdicts import Cell, Verdict, verdicts_of
from opdjax.report.table import Reading, read_group
from opdjax.runs.results import Point, Run, SeedGroup, read_run, seed_groups
from opdjax.runs.workdir import WorkdirError


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A table with our cells; columns that neither the paper nor the sweep fills are left out."""

    table: PaperTable
    columns: tuple[PaperColumn, ...]
    cells: Mapping[tuple[str, str], Cell]  # by (row label, column label)
    verdicts: tuple[Verdict, ...]
    flags: tuple[str, ...] = ()  # caveats: rows with other prompts, commits or machines

    @property
    def is_run(self) -> bool:
        """Whether the sweep has any point of the table."""
        return any(cell.digest for cell in self.cells.values())


@dataclasses.dataclass(frozen=True)
class _CellRuns:
    """The runs of one cell."""

    row: Row
    group: SeedGroup
    runs: Mapping[int, Run]  # completed runs by seed

    @property
    def first_run(self) -> Run | None:
        return next(iter(self.runs.values()), None)


_Found = Mapping[tuple[str, str], _CellRuns | None]


def compare(table: PaperTable, points: Sequence[Point]) -> Comparison:
    """The table with the runs of the points.

    WorkdirError if a cell would mix configs, if a run's directory holds another config than its
    point, or if rows of one column were evaluated on different prompts or in different ways.
    """
    reading = functools.cache(read_run)
    available = seed_groups(points)
    keys = [(row, column) for row in table.rows for column in table.columns]
    found = {
        (row.label, column.label): _find(row, column, available, reading) for row, column in keys
    }
    cells = {(row.label, column.label): _cell(row, column, found) for row, column in keys}
    flags = [flag for column in table.columns for flag in _column_flags(table, column, found)]
    filled = {column for (_, column), cell in cells.items() if cell.paper or cell.digest}
    return Comparison(
        table,
        tuple(column for column in table.columns if column.label in filled),
        cells,
        tuple(verdicts_of(table, cells)),
        tuple(dict.fromkeys([*flags, *_commit_flags(found)])),
    )


def _digest(group: SeedGroup) -> str:
    """The first eight characters of the hash of the group's config without its seed."""
    config = upgrade(group.points[0].config)
    config.pop("seed")
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def _find(
    row: Row, column: PaperColumn, available: Sequence[SeedGroup], reading: Reading
) -> _CellRuns | None:
    if row.labels is None or not column.read:
        return None
    wanted = {**row.labels, **column.labels}
    fitting = [group for group in available if wanted.items() <= group.overrides.items()]
    if len(fitting) > 1:
        changed = "\n  ".join(differences(fitting[0].points[0].config, fitting[1].points[0].config))
        raise WorkdirError(
            f"row {row.label!r}, column {column.label!r} fits runs of {len(fitting)} configs, "
            f"which no mean may mix; expected one for {wanted} (first -> second):\n  {changed}"
        )
    if not fitting:
        return None
    runs = read_group(fitting[0], reading)
    return _CellRuns(row, fitting[0], {run.config["seed"]: run for run in runs})


def _cell(row: Row, column: PaperColumn, found: _Found) -> Cell:
    own, paper = found[row.label, column.label], row.values.get(column.label)
    if own is None:
        return Cell(paper, {}, (), None)
    cell = functools.partial(Cell, paper, missing=own.group.missing, digest=_digest(own.group))
    runs = sorted(own.runs.items())
    if not column.until:
        read = reader(column.read, row.when)
        return cell({seed: value for seed, run in runs if (value := read(run)) is not None})
    goal = found[column.until, column.label]
    if goal is None or row.when == "before":
        return cell({})
    targets = {seed: best_score(run, column.read) for seed, run in goal.runs.items()}
    spent = {
        seed: spent_until(run, column, target)
        for seed, run in runs
        if (target := targets.get(seed)) is not None
    }
    return cell(
        {seed: amount for seed, (amount, _) in spent.items()},
        censored=frozenset(seed for seed, (_, is_reached) in spent.items() if not is_reached),
    )


def _column_flags(table: PaperTable, column: PaperColumn, found: _Found) -> list[str]:
    """Caveats on comparing the rows of a column; WorkdirError if they do not compare."""
    present = [each for row in table.rows if (each := found[row.label, column.label]) is not None]
    return [flag for other in present[1:] for flag in _pair_flags(table, column, present[0], other)]


def _pair_flags(
    table: PaperTable, column: PaperColumn, first: _CellRuns, other: _CellRuns
) -> Iterator[str]:
    names = f"rows {first.row.label!r} and {other.row.label!r} of {table.name}"
    settings = [_evaluation(each, column) for each in (first, other)]
    if changed := differences(*settings, "evaluation."):
        listed = "\n  ".join(changed)
        raise WorkdirError(f"{names} were evaluated in other ways and do not compare:\n  {listed}")
    one, two = first.first_run, other.first_run
    if one is None or two is None:
        return
    if one.data.get("evaluation") != two.data.get("evaluation"):
        if one.config["student"]["path"] == two.config["student"]["path"]:
            raise WorkdirError(
                f"{names} answered other prompts ({one.workdir}, {two.workdir}) and do not compare"
            )
        yield f"{names} have different students, whose prompts have different tokens"
    is_start = "before" in (first.row.when, other.row.when)
    if one.data.get("prompts") != two.data.get("prompts") and not is_start:
        yield f"{names} were trained on other prompts"
    if _is_time(column) and (machines := differences(_machine(one), _machine(two))):
        yield f"{names} ran on other machines, which affects seconds: {'; '.join(machines)}"


def _is_time(column: PaperColumn) -> bool:
    parts = (column.read, column.spent if column.until else "")
    return "seconds" in parts or "time/" in column.read or "per_second" in column.read


def _machine(run: Run) -> dict[str, object]:
    return {name: run.environment.get(name) for name in ("machine", "devices", "cores")}


def _evaluation(found: _CellRuns, column: PaperColumn) -> dict[str, object]:
    """The evaluation settings that a column depends on; the interval between evaluations matters
    only if the column reads the first evaluation that reaches a target.
    """
    evaluation = upgrade(found.group.points[0].config)["evaluation"]
    left_out = None if column.until else "every"
    return {name: value for name, value in evaluation.items() if name != left_out}


def _commit_flags(found: _Found) -> list[str]:
    runs = [run for each in found.values() if each is not None for run in each.runs.values()]
    commits = sorted({str(run.environment.get("commit"))[:12] for run in runs})
    if len(commits) < 2:
        return []
    return [f"the runs of this table are of several commits: {', '.join(commits)}"]
