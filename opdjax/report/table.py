"""Tables of a sweep and of papers as Markdown and LaTeX for readers, CSV and JSON for programs. No
jax.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from opdjax.report.papers.compare import Cell, Comparison, Interval, Part, Verdict, compare, finite
from opdjax.report.papers.tables import PaperColumn, PaperTable, paper_named, paper_tables
from opdjax.runs.results import Point, Run, SeedGroup, read_group, read_points, seed_groups
from opdjax.runs.statistics import seed_interval
from opdjax.runs.workdir import WorkdirError, read_run_config

Format = Literal["markdown", "latex", "csv", "json"]

# The numbers of a run that a row shows; a column that no run has is left out.
COLUMNS: dict[str, Callable[[Run], float | None]] = {
    "avg@k": lambda run: run.score("avg@k"),
    "greedy": lambda run: run.score("greedy"),
    "pass@k": lambda run: run.score("pass@k"),
    "gain in avg@k": lambda run: run.gain,
    "median gradient norm": lambda run: run.median("grad/norm"),
    "KL, last 10 steps": lambda run: run.last_mean("kl/student_teacher"),
    "staleness KL": lambda run: run.staleness,
    "keep rate": lambda run: run.keep_rate,
    "seconds": lambda run: run.seconds,
}
_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "{}$&#_%"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"±": r"$\pm$", "≥": r"$\geq$"}
)
_CSV = "kind,name,column,unit,paper,mark,ours,half interval,n,difference,missing,config,verdict"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub Markdown table; bars and line breaks inside cells are escaped."""
    text = lambda cell: cell.replace("|", r"\|").replace("\n", " ")
    line = lambda cells: f"| {' | '.join(map(text, cells))} |"
    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def latex(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A booktabs tabular; characters that are special to TeX are escaped inside cells."""
    text = lambda cell: cell.translate(_LATEX).replace("\n", " ")
    line = lambda cells: " & ".join(map(text, cells)) + r" \\"
    begin = rf"\begin{{tabular}}{{{'l' * len(header)}}}"
    head = [begin, r"\toprule", line(header), r"\midrule"]
    return "\n".join([*head, *map(line, rows), r"\bottomrule", r"\end{tabular}"])


def _comma_separated(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV with numbers in full precision."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue().rstrip("\n")


def _interval(found: Interval | None, digits: Callable[[float], int]) -> str:
    if found is None:
        return ""
    return " ± ".join(f"{each:.{digits(each)}f}" for each in found if each is not None)


def _or_empty(found: Sequence[Any] | None, count: int = 2) -> list[Any]:
    """The values of a CSV line; empty where they are None."""
    return ["" if each is None else each for each in found or [None] * count]


def seed_of(id: str) -> str:
    """The `seed=N` of a point's id; the id if it has none."""
    found = re.search(r"(?:^|,)(seed=\d+)", id)
    return found[1] if found else id


# A sweep


@dataclasses.dataclass(frozen=True)
class _TableRow:
    """A setting and the statistics of its runs."""

    overrides: Mapping[str, Any]
    values: Mapping[str, Interval]  # by column
    n: int
    missing: tuple[str, ...]


def table(directory: pathlib.Path, format: Format = "markdown") -> str:
    """The sweep in `directory`, a row per setting.

    A cell has the mean and half the 95 % interval over seeds (Student's t; no interval for one
    seed). Further columns have the number of seeds n and the missing ones. WorkdirError if runs of
    one row have different data or models.
    """
    points = read_points(directory)
    rows = [_row(group) for group in seed_groups(points)]
    if format == "json":
        return json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
    names = list(dict.fromkeys(name for row in rows for name in row.overrides))
    columns = [name for name in COLUMNS if any(name in row.values for row in rows)]
    labels = [[str(row.overrides.get(name, "")) for name in names] for row in rows]
    if format == "csv":
        means = [part for name in columns for part in (name, f"{name} half interval")]
        lines = [
            [
                *own,
                *(number for name in columns for number in _or_empty(row.values.get(name))),
                row.n,
                " ".join(row.missing),
            ]
            for own, row in zip(labels, rows)
        ]
        return _comma_separated([*names, *means, "n", "missing"], lines)
    digits = lambda value: 3 if abs(value) < 100 else 0
    cells = [
        [
            *own,
            *(_interval(row.values.get(name), digits) for name in columns),
            str(row.n),
            ", ".join(map(seed_of, row.missing)),
        ]
        for own, row in zip(labels, rows)
    ]
    header = [*names, *columns, "n", "missing"]
    if format == "latex":
        return latex(header, cells)
    return "\n".join([markdown(header, cells), "", *_notes(points, columns)])


def _row(group: SeedGroup) -> _TableRow:
    runs = read_group(group)
    found = {name: [v for v in map(read, runs) if v is not None] for name, read in COLUMNS.items()}
    values = {name: finite(*seed_interval(numbers)) for name, numbers in found.items() if numbers}
    return _TableRow(group.overrides, values, len(runs), group.missing)


def _notes(points: list[Point], columns: list[str]) -> list[str]:
    commits = _commits(points)
    fields = ("source", "num_samples", "num_prompts")
    kinds = {tuple(point.config["evaluation"][name] for name in fields) for point in points}
    evaluations = "; ".join(
        f"{source}: k = {k}, at most {count} prompts" for source, k, count in sorted(kinds, key=str)
    )
    notes = [
        "± is half a 95 % interval over seeds (Student's t). Runs of one row answer the same "
        "prompts, so it does not include the variance over prompts."
    ]
    if "staleness KL" in columns:
        notes.append(
            "Staleness KL: KL(student || behaviour) of the tokens trained on, last 10 steps. Keep "
            "rate: mean over all steps."
        )
    if columns:
        notes.append(
            "KL is exact, except for opd and for vopd with a top-k baseline, where it is the mean "
            "log-ratio of the sampled tokens."
        )
        notes.append(f"{evaluations}. {_done(points)}.")
    if len(commits) > 1:
        notes.append("The runs of this table are of several commits.")
    return notes


def _commits(points: Sequence[Point]) -> list[str]:
    done = [point.workdir for point in points if point.status == "done"]
    return sorted({str(read_run_config(each)["environment"].get("commit"))[:12] for each in done})


def _done(points: Sequence[Point]) -> str:
    count = sum(point.status == "done" for point in points)
    return f"{count} of {len(points)} points done; commit {', '.join(_commits(points)) or 'none'}"


# Papers


def list_of_papers() -> str:
    """A line per table of a paper: name, title and paper."""
    tables = paper_tables()
    width = max(map(len, tables))
    return "\n".join(f"{name:{width}}  {of.title} ({of.paper})" for name, of in tables.items())


def paper_table(directory: pathlib.Path, name: str, format: Format = "markdown") -> str:
    """A paper's table with the runs of the sweep in `directory`. With the name `all`: all claims,
    then every table that has a point there.

    ConfigError if no table has the name, WorkdirError if `all` finds no point of any table.
    """
    tables = paper_tables().values() if name == "all" else [paper_named(name)]
    points = read_points(directory)
    found = [compare(of, points) for of in tables]
    if name == "all":
        found = [each for each in found if each.is_run]
        if not found:
            raise WorkdirError(
                f"{directory} has no point of any paper's table; expected labels arm and pair"
            )
    if format == "json":
        facts = [dataclasses.asdict(each) for each in found]
        return json.dumps(facts if name == "all" else facts[0], indent=1)
    if format == "csv":
        header = _CSV.split(",")
        if name == "all":
            lines = [[each.table.name, *line] for each in found for line in _csv_lines(each)]
            return _comma_separated(["table", *header], lines)
        return _comma_separated(header, _csv_lines(found[0]))
    shown = {"markdown": _markdown, "latex": _latex}[format]
    return "\n\n".join(
        [*([_overview(found, points, format)] if name == "all" else []), *map(shown, found)]
    )


def _overview(found: Sequence[Comparison], points: Sequence[Point], format: Format) -> str:
    """All claims of several tables."""
    named = [(each.table.name, verdict) for each in found for verdict in each.verdicts]
    header, rows = _claims([verdict for _, verdict in named])
    made = [["table", *header], [[name, *row] for (name, _), row in zip(named, rows)]]
    if format == "latex":
        return latex(*made)
    counted = collections.Counter(verdict.status for _, verdict in named).most_common()
    counts = ", ".join(f"{count} {status}" for status, count in counted)
    about = (
        "Reproduced: the whole 95 % interval of the paired difference over seeds is on the claim's "
        "side. Contradicted: none of it is."
    )
    return "\n\n".join(
        [f"## All {len(named)} claims: {counts}", about, markdown(*made), f"{_done(points)}."]
    )


def _markdown(found: Comparison) -> str:
    of = found.table
    parts = [f"## {of.name}: {of.title}", f"{of.paper}. The paper's settings: {of.settings}."]
    parts.append(markdown(*_cells(found)))
    if found.verdicts:
        parts += ["The paper's claims, tested on these runs:", markdown(*_claims(found.verdicts))]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in _paper_notes(found))])


def _latex(found: Comparison) -> str:
    of = found.table
    about = f"{of.name}: {of.title}. {of.paper}. {of.settings}"
    comments = [f"% {comment}" for comment in (about, *_paper_notes(found))]
    claims = [latex(*_claims(found.verdicts))] if found.verdicts else []
    return "\n".join([*comments, "\n\n".join([latex(*_cells(found)), *claims])])


def _cells(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """(header, rows): for each column the paper's number, ours and their difference."""
    parts, rows = found.parts(found.columns), found.table.rows
    columns = {"method": [row.label for row in rows]}
    for column, part in parts:
        unit = f", {column.unit}" if column.unit else ""
        whose = "ours - paper" if part == "difference" else part
        columns[f"{column.label}{unit}: {whose}"] = [
            _shown(found.cells[row.label][column.label], column, part) for row in rows
        ]
    optional = {
        "missing": [_by_pair(found, row.label, lambda c: map(seed_of, c.missing)) for row in rows],
        "config": [_by_pair(found, row.label, lambda c: [c.digest or ""]) for row in rows],
        "note": [row.note for row in rows],
    }
    columns |= {name: texts for name, texts in optional.items() if any(texts)}
    return list(columns), [list(row) for row in zip(*columns.values())]


def _shown(cell: Cell, column: PaperColumn, part: Part) -> str:
    if part == "paper":
        return f"{cell.paper.number:g} [{cell.paper.mark}]" if cell.paper else ""
    if part == "difference":
        return "" if cell.difference is None else f"{cell.difference:+.2f}"
    if cell.ours is None:
        return "not run" if cell.missing else "-" if cell.digest else ""
    shown, n = _significant(cell.ours, column.unit), f"n={len(cell.by_seed)}"
    return f"≥ {shown} ({n}, {len(cell.censored)} never)" if cell.censored else f"{shown} ({n})"


def _significant(found: Interval, unit: str = "") -> str:
    mean = abs(found[0])
    digits = 0 if mean >= 100 else 2 if unit == "%" or mean >= 10 else 3
    return _interval(found, lambda _: digits)


def _by_pair(found: Comparison, row: str, facts_of: Callable[[Cell], Iterable[str]]) -> str:
    """Facts that the cells of one pair of models share, once per pair; with the pair's name if the
    table has runs of several.
    """
    is_run = {column.pair for column, part in found.parts(found.columns) if part == "ours"}
    facts = {each.pair: ", ".join(facts_of(found.cells[row][each.label])) for each in found.columns}
    return "; ".join(
        (f"{pair} " if len(is_run) > 1 else "") + text for pair, text in facts.items() if text
    )


def _claims(verdicts: Iterable[Verdict]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): a row per verdict."""
    header = ["claim", "of", "column", "compared", "left - right, by seed", "n", "verdict"]
    return header, [
        [
            f"{each.claim.text} [{each.claim.mark}]",
            f"{each.claim.left}, {each.claim.right}",
            each.column.label,
            claimed(each),
            _difference(each.difference),
            str(each.n),
            each.status,
        ]
        for each in verdicts
    ]


def _difference(found: Interval | None) -> str:
    if found is None:
        return ""
    return "0 in every seed" if found == (0.0, 0.0) else _significant(found)


def claimed(verdict: Verdict) -> str:
    """The claimed range of the difference, such as `above 0`."""
    kind, margin = verdict.claim.kind, verdict.claim.margin
    if kind in ("ratio", "gap"):
        what = {"ratio": "left / right", "gap": "share of the gap"}[kind]
        return f"{what}: at least {margin:g}"
    if kind == "equal":
        return f"within ± {margin:g}"
    return f"above {margin:g}" if kind == "more" else f"below {0 - margin:g}"


def _paper_notes(found: Comparison) -> Iterator[str]:
    """Caveats, the table's notes and the meaning of its marks."""
    yield from (f"Caveat: {flag}." for flag in found.flags)
    if not found.is_run:
        yield f"This directory has no point of the table: it looks for {wanted(found.table)}."
    yield from found.table.notes
    marks = ", ".join(f"[{mark}] {text}" for mark, text in found.marks.items())
    yield f"Source of a paper's number: {marks}."
    if found.is_run:
        yield (
            "± is half a 95 % interval over n seeds (Student's t). A claim is reproduced if the "
            "whole interval is on its side, contradicted if none of it is, else inconclusive."
        )
        yield (
            "config: a digest of all settings but the seed; cells with one digest come from the "
            "same runs."
        )


def wanted(of: PaperTable) -> str:
    """The labels of a table's points."""
    labels = [f"arm={row.arm}" for row in of.rows if row.arm]
    labels += [f"pair={column.pair}" for column in of.columns if column.pair]
    return " ".join(dict.fromkeys(labels))


def _csv_lines(found: Comparison) -> Iterator[list[Any]]:
    """A line per cell, then a line per claim; differences of claims are in a run's own unit."""
    for row in found.table.rows:
        for column in found.columns:
            cell = found.cells[row.label][column.label]
            if cell.paper or cell.digest:
                yield _csv_cell(row.label, column, cell)
    for each in found.verdicts:
        about = ["claim", each.claim.text, each.column.label, "", "", each.claim.mark]
        yield [*about, *_or_empty(each.difference), each.n, "", "", "", each.status]


def _csv_cell(row: str, column: PaperColumn, cell: Cell) -> list[Any]:
    n, never = len(cell.by_seed), len(cell.censored)
    paper = (cell.paper.number, cell.paper.mark) if cell.paper else None
    return [
        *("cell", row, column.label, column.unit),
        *_or_empty(paper),
        *_or_empty(cell.ours),
        n,
        "" if cell.difference is None else cell.difference,
        " ".join(cell.missing),
        cell.digest or "",
        f"at least, in {never} of {n}" if never else "",
    ]
