"""The facts of the papers' part of a sweep's page: the tables of papers that have points there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from opdjax.config.validation import ConfigError, nearest
from opdjax.report.papers.compare import Comparison, compare
from opdjax.report.papers.tables import paper_tables
from opdjax.runs.results import Point
from opdjax.runs.workdir import WorkdirError


@dataclasses.dataclass(frozen=True)
class PaperFacts:
    """The tables that have points here."""

    compared: tuple[Comparison, ...]
    refused: dict[str, tuple[str, str]]  # table whose runs do not compare -> (title, error)
    absent: tuple[str, ...]  # tables without a point; none where one table was asked for


def paper_facts(points: Sequence[Point], only: str | None = None) -> PaperFacts | None:
    """The tables with their runs, or `only` one; None if no table has a point here.

    ConfigError if `only` is no table, WorkdirError if it has no point here.
    """
    tables = paper_tables()
    if only is not None and only not in tables:
        raise ConfigError(
            f"--paper {only!r} is no table of a paper; {nearest(only, tables)}; opdjax table "
            "--papers lists them"
        )
    found, refused = [], {}
    for table in [tables[only]] if only else tables.values():
        try:
            found.append(compare(table, points))
        except WorkdirError as error:
            refused[table.name] = table.title, str(error)
    found = [each for each in found if each.is_run]
    named = {each.table.name for each in found} | refused.keys()
    if only is not None and not named:
        arms = ", ".join([f"arm={row.arm}" for row in tables[only].rows if row.arm][:4])
        raise WorkdirError(
            f"--paper {only}: the sweep has no point of this table; expected points with labels "
            f"such as {arms}"
        )
    absent = () if only else tuple(name for name in tables if name not in named)
    return PaperFacts(tuple(found), refused, absent) if named else None


def of_table(points: Sequence[Point], name: str) -> list[Point]:
    """The points that belong to cells of a table."""
    rows, columns = paper_tables()[name].rows, paper_tables()[name].columns
    arms = {row.arm for row in rows if row.arm}
    pairs = {column.pair for column in columns if column.read}
    return [
        point
        for point in points
        if point.overrides.get("arm") in arms
        and ("" in pairs or point.overrides.get("pair") in pairs)
    ]
