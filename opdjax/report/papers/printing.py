"""A paper's table beside ours as text: Markdown and LaTeX for readers, CSV for programs. No jax."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from opdjax.config.validation import ConfigError, nearest
from opdjax.report.papers.compare import Comparison, compare
from opdjax.report.papers.registry import PAPER_TABLES
from opdjax.report.papers.tables import MARKS, PaperColumn, PaperTable, Row
from opdjax.report.papers.verdicts import Cell, Verdict
from opdjax.report.table_formats import Format, comma_separated, latex, markdown
from opdjax.runs.results import read_points

_CSV = (
    "kind",
    "name",
    "column",
    "unit",
    "paper",
    "mark",
    "ours",
    "half interval",
    "n",
    "difference",
    "missing",
    "config",
    "verdict",
)
_SIGN = {"ratio": "left / right", "gap": "share of the gap"}


def paper_table(directory: pathlib.Path, name: str, format: Format = "markdown") -> str:
    """The table of a paper beside the runs of the sweep in `directory`; ConfigError where no table
    has that name.
    """
    if name not in PAPER_TABLES:
        raise ConfigError(
            f"there is no table {name!r}; {nearest(name, PAPER_TABLES)}; the names are {', '.join(PAPER_TABLES)}"
        )
    found = compare(PAPER_TABLES[name], read_points(directory))
    return {"markdown": _markdown, "latex": _latex, "csv": _csv}[format](found)


def paper_tables() -> str:
    """Every table that can be stated, a line each."""
    width = max(map(len, PAPER_TABLES))
    return "\n".join(
        f"{name:{width}}  {table.title} ({table.paper})" for name, table in PAPER_TABLES.items()
    )


def _markdown(found: Comparison) -> str:
    table = found.table
    parts = [
        f"## {table.name}: {table.title}",
        f"{table.paper}. The paper's settings: {table.settings}.",
        markdown(*cells_of(found)),
    ]
    if found.verdicts:
        parts += [
            "What the paper claims, and what these runs say:",
            markdown(*claims_of(found.verdicts)),
        ]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes_of(found))])


def _latex(found: Comparison) -> str:
    comments = [
        f"{found.table.name}: {found.table.title}. {found.table.paper}. {found.table.settings}",
        *notes_of(found),
    ]
    tables = [
        latex(*cells_of(found)),
        *([latex(*claims_of(found.verdicts))] if found.verdicts else []),
    ]
    return "\n".join([*(f"% {comment}" for comment in comments), "\n\n".join(tables)])


def cells_of(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """(header, rows): of each column the paper's number, ours and their difference, each where
    there is one at all.
    """
    parts = [
        (column, kind)
        for column in found.columns
        for kind in ("paper", "ours", "ours - paper")
        if _has(found, column, kind)
    ]
    extra = {
        "missing": _missing,
        "config": _digests,
        "note": lambda found, row: row.note or ("" if row.labels else "not implemented here"),
    }
    header = [
        "method",
        *(
            f"{column.label}{f', {column.unit}' if column.unit else ''}: {kind}"
            for column, kind in parts
        ),
    ]
    rows = []
    for row in found.table.rows:
        numbers = [
            _shown(found.cells[row.label, column.label], column, kind) for column, kind in parts
        ]
        rows.append([row.label, *numbers, *(tell(found, row) for tell in extra.values())])
    kept = [
        i for i in range(len(header) + len(extra)) if i < len(header) or any(row[i] for row in rows)
    ]
    return [[*header, *extra][i] for i in kept], [[row[i] for i in kept] for row in rows]


def _has(found: Comparison, column: PaperColumn, kind: str) -> bool:
    cells = [found.cells[row.label, column.label] for row in found.table.rows]
    if kind == "ours":
        return any(cell.digest for cell in cells)
    return any(
        cell.paper if kind == "paper" else cell.difference(column) is not None for cell in cells
    )


def _shown(cell: Cell, column: PaperColumn, kind: str) -> str:
    if kind == "paper":
        return f"{cell.paper.number:g} [{cell.paper.mark}]" if cell.paper else ""
    if kind == "ours - paper":
        difference = cell.difference(column)
        return "" if difference is None else f"{difference:+.2f}"
    if cell.ours is None:
        return "not run" if cell.missing else "-" if cell.digest else ""
    shown, n = _interval(cell.ours, column.scale, column.unit), f"n={len(cell.by_seed)}"
    return f"≥ {shown} ({n}, {len(cell.censored)} never)" if cell.censored else f"{shown} ({n})"


def _interval(found: tuple[float, float], scale: float = 1.0, unit: str = "") -> str:
    mean, half = (number * scale for number in found)
    digits = 2 if unit == "%" or abs(mean) >= 10 else 3
    digits = 0 if abs(mean) >= 100 else digits
    return f"{mean:.{digits}f}" if math.isinf(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def claims_of(verdicts: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): what was claimed of what, and what became of it."""
    header = ["claim", "of", "column", "compared", "left - right, by seed", "n", "verdict"]
    return header, [
        [
            f"{each.claim.text} [{each.claim.mark}]",
            f"{each.claim.left}, {each.claim.right}",
            each.column.label,
            asked_of(each),
            _difference(each),
            str(each.n),
            each.status,
        ]
        for each in verdicts
    ]


def _difference(verdict: Verdict) -> str:
    if verdict.difference is None:
        return ""
    return "0 in every seed" if verdict.difference == (0.0, 0.0) else _interval(verdict.difference)


def asked_of(verdict: Verdict) -> str:
    """What the paper says of the difference, such as `above 0`."""
    kind, margin = verdict.claim.kind, verdict.claim.margin
    wanted = {
        "more": f"above {margin:g}",
        "less": f"below {0 - margin:g}",
        "equal": f"within ± {margin:g}",
    }
    return wanted.get(kind) or f"{_SIGN[kind]}: at least {margin:g}"


def _missing(found: Comparison, row: Row) -> str:
    return _by_pair(found, row, lambda cell: [_seed(id) for id in cell.missing])


def _digests(found: Comparison, row: Row) -> str:
    return _by_pair(found, row, lambda cell: [cell.digest] if cell.digest else [])


def _by_pair(found: Comparison, row: Row, tell) -> str:
    """What cells of one pair of models share, once; the pair by name where there are several."""
    told = {
        column.labels.get("pair", ""): tell(found.cells[row.label, column.label])
        for column in found.columns
    }
    pairs = {
        c.labels.get("pair", "")
        for c in found.columns
        if any(found.cells[r.label, c.label].digest for r in found.table.rows)
    }
    return "; ".join(
        (f"{pair} " if len(pairs) > 1 else "") + ", ".join(items)
        for pair, items in told.items()
        if items
    )


def _seed(id: str) -> str:
    """The seed that is not there; the id where it has none."""
    found = re.search(r"(?:^|,)(seed=\d+)", id)
    return found[1] if found else id


def notes_of(found: Comparison) -> Iterable[str]:
    """What a reader of the table must know."""
    table = found.table
    yield from (f"Mind: {flag}." for flag in found.flags)
    if not found.is_run:
        yield f"This directory has no point of the table: it looks for {_wanted(table)}."
    yield from table.notes
    marks = {cell.paper.mark for cell in found.cells.values() if cell.paper} | {
        claim.mark for claim in table.claims
    }
    yield f"Behind a number of the paper: {', '.join(f'[{mark}] {MARKS[mark]}' for mark in MARKS if mark in marks)}."
    if found.is_run:
        yield "± is half a 95 % interval over n seeds (Student's t); a claim is seen, or contradicted, where all of that interval says so."
        yield "config: a digest of every setting but the seed; cells of one digest are of the same runs."


def _wanted(table: PaperTable) -> str:
    names = dict.fromkeys(
        f"{k}={v}"
        for part in (*table.rows, *table.columns)
        if part.labels
        for k, v in part.labels.items()
    )
    return " ".join(names)


def _csv(found: Comparison) -> str:
    """A line a cell, then a line a claim; differences of claims are in a run's own unit."""
    lines: list[list[Any]] = []
    for row in found.table.rows:
        for column in found.columns:
            cell = found.cells[row.label, column.label]
            if cell.paper or cell.digest:
                lines.append(_csv_cell(row, column, cell))
    for each in found.verdicts:
        mean, half = each.difference or ("", math.inf)
        lines.append(
            [
                "claim",
                each.claim.text,
                each.column.label,
                "",
                "",
                each.claim.mark,
                mean,
                "" if math.isinf(half) else half,
                each.n,
                "",
                "",
                "",
                each.status,
            ]
        )
    return comma_separated(_CSV, lines)


def _csv_cell(row: Row, column: PaperColumn, cell: Cell) -> list[Any]:
    paper = (cell.paper.number, cell.paper.mark) if cell.paper else ("", "")
    mean, half = (value * column.scale for value in cell.ours) if cell.ours else ("", math.inf)
    difference = cell.difference(column)
    status = f"at least, in {len(cell.censored)} of {len(cell.by_seed)}" if cell.censored else ""
    ours = (
        mean,
        "" if math.isinf(half) else half,
        len(cell.by_seed),
        "" if difference is None else difference,
    )
    return [
        "cell",
        row.label,
        column.label,
        column.unit,
        *paper,
        *ours,
        " ".join(cell.missing),
        cell.digest or "",
        status,
    ]
