"""A paper's table beside the runs of a sweep: our mean for each cell, what is missing, and what
becomes of the paper's claims. No jax.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from opdjax.config.saved import upgrade
from opdjax.config.validation import differences
from opdjax.report.papers.reading import best_score, reader, spent_until
from opdjax.report.papers.tables import PaperColumn, PaperTable, Row
from opdjax.report.papers.verdicts import Cell, Verdict, verdicts_of
from opdjax.runs.results import Point, Run, SeedGroup, read_run, seed_groups
from opdjax.runs.workdir import WorkdirError

Reading = Callable[[pathlib.Path], Run]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A table with the cells of ours; columns that neither the paper nor the sweep fills are left
    out.
    """

    table: PaperTable
    columns: tuple[PaperColumn, ...]
    cells: Mapping[tuple[str, str], Cell]  # by the labels of row and column
    verdicts: tuple[Verdict, ...]
    flags: tuple[
        str, ...
    ] = ()  # what to know before rows are compared: other prompts, other commits

    @property
    def is_run(self) -> bool:
        """Whether the sweep holds any point of the table."""
        return any(cell.digest for cell in self.cells.values())


@dataclasses.dataclass(frozen=True)
class _Found:
    """The runs of one cell."""

    row: Row
    group: SeedGroup
    runs: Mapping[int, Run]  # those that are done, by seed


def compare(table: PaperTable, points: Sequence[Point]) -> Comparison:
    """WorkdirError where a cell would mix configs, or where rows of one column answered other
    questions.
    """
    reading = functools.cache(read_run)
    available = seed_groups(points)
    found = {
        (row.label, column.label): _find(row, column, available, reading)
        for row in table.rows
        for column in table.columns
    }
    cells = {
        (row.label, column.label): _cell(row, column, found)
        for row in table.rows
        for column in table.columns
    }
    flags = [flag for column in table.columns for flag in _checked(table, column, found)]
    runs = [run for each in found.values() if each is not None for run in each.runs.values()]
    kept = tuple(
        c
        for c in table.columns
        if any(
            cells[row.label, c.label].paper or cells[row.label, c.label].digest
            for row in table.rows
        )
    )
    return Comparison(
        table,
        kept,
        cells,
        tuple(verdicts_of(table, cells)),
        tuple(dict.fromkeys([*flags, *_commits(runs)])),
    )


def digest_of(group: SeedGroup) -> str:
    """Eight figures of the config's hash, the seed aside: what one cell averages over has one
    digest.
    """
    config = {
        name: value for name, value in upgrade(group.points[0].config).items() if name != "seed"
    }
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def _find(
    row: Row, column: PaperColumn, available: Sequence[SeedGroup], reading: Reading
) -> _Found | None:
    if row.labels is None or not column.read:
        return None
    wanted = {**row.labels, **column.labels}
    fitting = [group for group in available if wanted.items() <= group.overrides.items()]
    if len(fitting) > 1:
        changed = "\n  ".join(differences(fitting[0].points[0].config, fitting[1].points[0].config))
        raise WorkdirError(
            f"row {row.label!r}, column {column.label!r} fits runs of {len(fitting)} configs, which no mean may mix; "
            f"expected one for {wanted} (first -> second):\n  {changed}"
        )
    if not fitting:
        return None
    runs = {point.config["seed"]: reading(point.workdir) for point in fitting[0].done}
    _require_own_data(fitting[0], runs)
    return _Found(row, fitting[0], runs)


def _require_own_data(group: SeedGroup, runs: Mapping[int, Run]) -> None:
    first = next(iter(runs.values()), None)
    for point in group.done:
        run = runs[point.config["seed"]]
        changed = differences(upgrade(point.config), upgrade(run.config)) + differences(
            first.data, run.data
        )
        if changed:
            listed = "\n  ".join(changed)
            raise WorkdirError(
                f"{run.workdir} holds another run than its cell asks for, or saw other data; move it away:\n  {listed}"
            )


def _cell(row: Row, column: PaperColumn, found: Mapping[tuple[str, str], _Found | None]) -> Cell:
    own, paper = found[row.label, column.label], row.values.get(column.label)
    if own is None:
        return Cell(paper, {}, (), None)
    missing, digest, censored = own.group.missing, digest_of(own.group), set()
    if not column.until:
        values = {seed: reader(column.read, row.when)(run) for seed, run in own.runs.items()}
        return Cell(
            paper,
            {seed: value for seed, value in sorted(values.items()) if value is not None},
            missing,
            digest,
        )
    spent = {}
    goal = found[column.until, column.label]
    for seed, run in sorted(own.runs.items()):
        target = (
            best_score(goal.runs[seed], column.read)
            if goal is not None and seed in goal.runs
            else None
        )
        if row.when == "after" and target is not None:
            spent[seed], is_reached = spent_until(run, column, target)
            censored |= set() if is_reached else {seed}
    return Cell(paper, spent, missing, digest, frozenset(censored))


def _checked(
    table: PaperTable, column: PaperColumn, found: Mapping[tuple[str, str], _Found | None]
) -> list[str]:
    """Rows compare only where their students were asked the same questions in the same way; what
    else they differ in is told.
    """
    first, *others = [
        each for row in table.rows if (each := found[row.label, column.label]) is not None
    ] or [None]
    flags = []
    for other in others:
        names = f"rows {first.row.label!r} and {other.row.label!r} of {table.name}"
        if changed := differences(
            _evaluation(first, column), _evaluation(other, column), "evaluation."
        ):
            listed = "\n  ".join(changed)
            raise WorkdirError(
                f"{names} were evaluated in other ways and do not compare:\n  {listed}"
            )
        one, two = (next(iter(each.runs.values()), None) for each in (first, other))
        if one is None or two is None:
            continue
        if one.data.get("evaluation") != two.data.get("evaluation"):
            if one.config["student"]["path"] == two.config["student"]["path"]:
                raise WorkdirError(
                    f"{names} answered other prompts ({one.workdir}, {two.workdir}) and do not compare"
                )
            flags.append(f"{names} are of other students, whose prompts have other tokens")
        if one.data.get("prompts") != two.data.get("prompts") and "before" not in (
            first.row.when,
            other.row.when,
        ):
            flags.append(f"{names} were trained on other prompts")
        if _is_time(column) and (machines := differences(_machine(one), _machine(two))):
            flags.append(
                f"{names} ran on other machines, which seconds depend on: {'; '.join(machines)}"
            )
    return flags


def _is_time(column: PaperColumn) -> bool:
    return (
        "seconds" in (column.read, column.spent if column.until else "")
        or "time/" in column.read
        or "per_second" in column.read
    )


def _machine(run: Run) -> dict[str, object]:
    return {name: run.environment.get(name) for name in ("machine", "devices", "cores")}


def _evaluation(found: _Found, column: PaperColumn) -> dict[str, object]:
    """What a score depends on; when one is taken matters only where the first of them is looked
    for.
    """
    evaluation = upgrade(found.group.points[0].config)["evaluation"]
    left_out = ("batch_size",) if column.until else ("batch_size", "every")
    return {name: value for name, value in evaluation.items() if name not in left_out}


def _commits(runs: Iterable[Run]) -> list[str]:
    commits = sorted({str(run.environment.get("commit"))[:12] for run in runs})
    return (
        [f"runs of several commits stand in this table: {', '.join(commits)}"]
        if len(commits) > 1
        else []
    )
