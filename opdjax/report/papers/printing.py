"""Prints a paper's table with our numbers: Markdown and LaTeX for readers, CSV for programs. No
jax.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from opdjax.config.validation import ConfigError, nearest
from opdjax.report.papers.compare import Comparison, compare
from opdjax.report.papers.registry import PAPER_TABLES
from opdjax.report.papers.tables import MARKS, PaperColumn, PaperTable, Row
from opdjax.report.papers.verdicts import Cell, Verdict
from opdjax.report.table import seed_of
from opdjax.report.table_formats import Format, comma_separated, latex, markdown
from opdjax.runs.results import read_points

_CSV = "kind,name,column,unit,paper,mark,ours,half interval,n,difference,missing,config,verdict"
_RATIOS = {"ratio": "left / right", "gap": "share of the gap"}


def paper_table(directory: pathlib.Path, name: str, format: Format = "markdown") -> str:
    """The paper's table with the runs of the sweep in `directory`; ConfigError if no table has the
    name.
    """
    if name not in PAPER_TABLES:
        raise ConfigError(
            f"there is no table {name!r}; {nearest(name, PAPER_TABLES)}; the names are "
            f"{', '.join(PAPER_TABLES)}"
        )
    found = compare(PAPER_TABLES[name], read_points(directory))
    return {"markdown": _markdown, "latex": _latex, "csv": _csv}[format](found)


def paper_tables() -> str:
    """A line per table: name, title and paper."""
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
        parts += ["The paper's claims, tested on these runs:", markdown(*claims_of(found.verdicts))]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes_of(found))])


def _latex(found: Comparison) -> str:
    table = found.table
    about = f"{table.name}: {table.title}. {table.paper}. {table.settings}"
    tables = [latex(*cells_of(found))]
    if found.verdicts:
        tables.append(latex(*claims_of(found.verdicts)))
    comments = [f"% {comment}" for comment in (about, *notes_of(found))]
    return "\n".join([*comments, "\n\n".join(tables)])


def cells_of(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """(header, rows): for each column the paper's number, ours and their difference; a part that no
    row has is left out.
    """
    parts = [
        (column, part)
        for column in found.columns
        for part in ("paper", "ours", "difference")
        if has_part(found, column, part)
    ]
    shown = {"paper": "paper", "ours": "ours", "difference": "ours - paper"}
    header = ["method"]
    for column, part in parts:
        unit = f", {column.unit}" if column.unit else ""
        header.append(f"{column.label}{unit}: {shown[part]}")
    rows = [
        [row.label, *(_shown(found.cells[row.label, c.label], c, part) for c, part in parts)]
        for row in found.table.rows
    ]
    extra = {
        "missing": [_by_pair(found, row, _missing_seeds) for row in found.table.rows],
        "config": [_by_pair(found, row, _digests) for row in found.table.rows],
        "note": [row_note(row) for row in found.table.rows],
    }
    for name, texts in extra.items():
        if any(texts):
            header.append(name)
            rows = [[*row, text] for row, text in zip(rows, texts)]
    return header, rows


def has_part(found: Comparison, column: PaperColumn, part: str) -> bool:
    """Whether any row of a column has the part: `paper`, `ours` or `difference`."""
    cells = [found.cells[row.label, column.label] for row in found.table.rows]
    if part == "ours":
        return any(cell.digest for cell in cells)
    return any(
        cell.paper if part == "paper" else cell.difference(column) is not None for cell in cells
    )


def row_note(row: Row) -> str:
    """The row's note; a row without an arm always has one."""
    return row.note or ("" if row.labels else "not implemented here")


def _shown(cell: Cell, column: PaperColumn, part: str) -> str:
    if part == "paper":
        return f"{cell.paper.number:g} [{cell.paper.mark}]" if cell.paper else ""
    if part == "difference":
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
    """(header, rows): a row per verdict."""
    header = ["claim", "of", "column", "compared", "left - right, by seed", "n", "verdict"]
    return header, [
        [
            f"{each.claim.text} [{each.claim.mark}]",
            f"{each.claim.left}, {each.claim.right}",
            each.column.label,
            claimed_of(each),
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


def claimed_of(verdict: Verdict) -> str:
    """The claimed range of the difference, such as `above 0`."""
    kind, margin = verdict.claim.kind, verdict.claim.margin
    if kind in _RATIOS:
        return f"{_RATIOS[kind]}: at least {margin:g}"
    if kind == "equal":
        return f"within ± {margin:g}"
    return f"above {margin:g}" if kind == "more" else f"below {0 - margin:g}"


def _missing_seeds(cell: Cell) -> list[str]:
    return [seed_of(id) for id in cell.missing]


def _digests(cell: Cell) -> list[str]:
    return [cell.digest] if cell.digest else []


def _by_pair(found: Comparison, row: Row, items_of: Callable[[Cell], list[str]]) -> str:
    """Facts that the cells of one pair of models share, once per pair; with the pair's name if the
    table has runs of several.
    """
    is_run = {_pair_of(column) for column in found.columns if has_part(found, column, "ours")}
    facts = {
        _pair_of(column): items_of(found.cells[row.label, column.label]) for column in found.columns
    }
    return "; ".join(
        (f"{pair} " if len(is_run) > 1 else "") + ", ".join(items)
        for pair, items in facts.items()
        if items
    )


def _pair_of(column: PaperColumn) -> str:
    """The pair of models that a column is restricted to, or an empty string."""
    return column.labels.get("pair", "")


def notes_of(found: Comparison) -> Iterable[str]:
    """Caveats, the table's notes and the meaning of its marks."""
    table = found.table
    yield from (f"Caveat: {flag}." for flag in found.flags)
    if not found.is_run:
        yield f"This directory has no point of the table: it looks for {_wanted(table)}."
    yield from table.notes
    marks = marks_of(found)
    yield f"Source of a paper's number: {', '.join(f'[{m}] {text}' for m, text in marks.items())}."
    if found.is_run:
        yield (
            "± is half a 95 % interval over n seeds (Student's t). A claim is reproduced if the "
            "whole interval is on its side, contradicted if none of it is, else inconclusive."
        )
        yield (
            "config: a digest of all settings but the seed; cells with one digest come from the "
            "same runs."
        )


def marks_of(found: Comparison) -> dict[str, str]:
    """The marks that the table uses, with their meaning."""
    used = {cell.paper.mark for cell in found.cells.values() if cell.paper}
    used |= {claim.mark for claim in found.table.claims}
    return {mark: text for mark, text in MARKS.items() if mark in used}


def _wanted(table: PaperTable) -> str:
    parts = [part.labels for part in (*table.rows, *table.columns) if part.labels]
    return " ".join(dict.fromkeys(f"{k}={v}" for labels in parts for k, v in labels.items()))


def _csv(found: Comparison) -> str:
    """A line per cell, then a line per claim; differences of claims are in a run's own unit."""
    lines = []
    for row in found.table.rows:
        for column in found.columns:
            cell = found.cells[row.label, column.label]
            if cell.paper or cell.digest:
                lines.append(_csv_cell(row, column, cell))
    for each in found.verdicts:
        ours = _csv_interval(each.difference, each.n)
        paper = ("", "", each.claim.mark)  # unit, paper, mark
        rest = ("", "", "", each.status)
        lines.append(["claim", each.claim.text, each.column.label, *paper, *ours, *rest])
    return comma_separated(_CSV.split(","), lines)


def _csv_cell(row: Row, column: PaperColumn, cell: Cell) -> list[Any]:
    paper = (cell.paper.number, cell.paper.mark) if cell.paper else ("", "")
    ours = cell.ours and tuple(value * column.scale for value in cell.ours)
    difference = cell.difference(column)
    status = f"at least, in {len(cell.censored)} of {len(cell.by_seed)}" if cell.censored else ""
    return [
        *("cell", row.label, column.label, column.unit),
        *paper,
        *_csv_interval(ours, len(cell.by_seed)),
        "" if difference is None else difference,
        " ".join(cell.missing),
        cell.digest or "",
        status,
    ]


def _csv_interval(found: tuple[float, float] | None, n: int) -> tuple[Any, Any, int]:
    """(mean, half width, n); the half width of one seed is empty."""
    mean, half = found or ("", math.inf)
    return mean, "" if math.isinf(half) else half, n
