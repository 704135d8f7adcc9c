"""Compares a paper's table with the runs of a sweep: our mean for each cell, missing runs, and the
verdicts on the paper's claims. No jax.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from opdjax.config.grid import SCORED_ON
from opdjax.report.papers.cells import Cells, cell_of, find, flags
from opdjax.report.papers.tables import MARKS, PaperColumn, PaperTable, paper_tables
from opdjax.report.papers.tuning import tuning_of
from opdjax.report.papers.verdicts import Study, Verdict, adjusted, verdicts_on
from opdjax.runs.results import Point, read_run, seed_groups
from opdjax.runs.workdir import WorkdirError


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


def compare(table: PaperTable, points: Sequence[Point]) -> Comparison:
    """The table with the runs of the points.

    WorkdirError if a cell would mix configs, if a run's directory holds another config than its
    point, or if rows of one column were evaluated on different prompts or in different ways.
    """
    reading = functools.cache(read_run)
    compared = [point for point in points if SCORED_ON not in point.overrides]
    grids = [point for point in points if SCORED_ON in point.overrides]
    available = [*seed_groups(compared), *seed_groups(grids)]
    places = [(row, column) for row in table.rows for column in table.columns]
    found = {(row.label, of.label): find(row, of, available, reading) for row, of in places}
    tuning = lambda own: tuning_of(own[0], available, reading) if own else None
    cells = {
        row.label: {
            column.label: dataclasses.replace(
                cell_of(row, column, row.value(i), found),
                tuning=tuning(found[row.label, column.label]) if row.when == "after" else None,
            )
            for i, column in enumerate(table.columns)
        }
        for row in table.rows
    }
    study = Study(table, available, found, cells, reading)
    verdicts = [verdict for claim in table.claims for verdict in verdicts_on(claim, study)]
    filled = {
        label for row in cells.values() for label, cell in row.items() if cell.paper or cell.digest
    }
    marks = {claim.mark for claim in table.claims}
    marks |= {cell.paper.mark for row in cells.values() for cell in row.values() if cell.paper}
    return Comparison(
        table,
        tuple(column for column in table.columns if column.label in filled),
        cells,
        tuple(adjusted(verdicts)),
        tuple(dict.fromkeys(flags(table, found))),
        {mark: text for mark, text in MARKS.items() if mark in marks},
    )


def compare_all(points: Sequence[Point]) -> dict[str, Any]:
    """The comparisons of the tables that have points here, and by name the errors of others."""
    found, refused = [], {}
    for name, table in paper_tables().items():
        try:
            found.append(compare(table, points))
        except WorkdirError as error:
            refused[name] = str(error)
    return {"compared": [each for each in found if each.is_run], "refused": refused}
