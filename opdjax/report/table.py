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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jinja2

from opdjax.report.measures import SCORES
from opdjax.report.papers.compare import Cell, Comparison, Interval, Part, Verdict, compare, finite
from opdjax.report.papers.tables import PaperColumn, paper_named, paper_tables
from opdjax.runs.results import (
    Point,
    Run,
    SeedGroup,
    is_number,
    read_group,
    read_points,
    seed_groups,
)
from opdjax.runs.statistics import NO_RIGHT_ANSWER, rule_of_three, score_label, seed_interval
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
_NONE = None, None
_CSV = "kind,name,column,unit,paper,mark,ours,half interval,n,difference,missing,config,verdict"


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A GitHub Markdown table; bars and line breaks inside cells are escaped."""
    text = lambda cell: str(cell).replace("|", r"\|").replace("\n", " ")
    line = lambda cells: f"| {' | '.join(map(text, cells))} |"
    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def latex(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A booktabs tabular; characters that are special to TeX are escaped inside cells."""
    text = lambda cell: str(cell).translate(_LATEX).replace("\n", " ")
    line = lambda cells: " & ".join(map(text, cells)) + r" \\"
    begin = rf"\begin{{tabular}}{{{'l' * len(header)}}}"
    head = [begin, r"\toprule", line(header), r"\midrule"]
    return "\n".join([*head, *map(line, rows), r"\bottomrule", r"\end{tabular}"])


def _comma_separated(rows: Iterable[Sequence[Any]]) -> str:
    """CSV with numbers in full precision; None is an empty field."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().rstrip("\n")


def seed_of(id: str) -> str:
    """The `seed=N` of a point's id; the id if it has none."""
    found = re.search(r"(?:^|,)(seed=\d+)", id)
    return found[1] if found else id


def _rendered(name: str, format: Format, **facts: Any) -> str:
    """A text template of `assets/report/tables`, filled in."""
    loader = jinja2.PackageLoader("opdjax", "assets/report/tables")
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    tools = {"markdown": markdown, "latex": latex, "cells": cells, "claims": _claims}
    kind = {"markdown": "md", "latex": "tex"}[format]
    template = environment.get_template(f"{name}.{kind}.jinja")
    return template.render(tools | facts, commits=_commits).rstrip("\n")


def _commits(points: Sequence[Point]) -> list[str]:
    done = [point.workdir for point in points if point.status == "done"]
    return sorted({str(read_run_config(each)["environment"].get("commit"))[:12] for each in done})


# A sweep


def table(directory: pathlib.Path, format: Format = "markdown") -> str:
    """The sweep in `directory`, a row per setting.

    A cell has the mean and half the 95 % interval over seeds (Student's t; no interval for one
    seed). Further columns have the number of seeds n and the missing ones. WorkdirError if runs of
    one row have different data or models.
    """
    points = read_points(directory)
    rows = [_row(group) for group in seed_groups(points)]
    if format == "json":
        return json.dumps(rows, indent=1)
    names = list(dict.fromkeys(name for row in rows for name in row["overrides"]))
    columns = [name for name in COLUMNS if any(name in row["values"] for row in rows)]
    is_csv = format == "csv"
    fixed = lambda value: f"{value:.{3 if abs(value) < 100 else 0}f}"
    joined = lambda found: " ± ".join(fixed(each) for each in found if each is not None)
    parts = lambda name: [name, f"{name} half interval"] if is_csv else [name]
    shown = lambda found: found if is_csv else [joined(found)]
    fields = ("source", "num_samples", "num_prompts")
    kinds = {tuple(point.config["evaluation"][name] for name in fields) for point in points}
    every_k = {k for _, k, _ in kinds}
    k = every_k.pop() if len(every_k) == 1 and not is_csv else None
    header = [score_label(part, k) for name in columns for part in parts(name)]
    header = [*names, *header, "n", "missing"]
    lines = [
        [
            *(str(row["overrides"].get(name, "")) for name in names),
            *(number for name in columns for number in shown(row["values"].get(name, _NONE))),
            row["n"],
            " ".join(row["missing"]) if is_csv else ", ".join(map(seed_of, row["missing"])),
        ]
        for row in rows
    ]
    if is_csv:
        return _comma_separated([header, *lines])
    graded = (*SCORES, "gain in avg@k")
    scored = [row["values"].get(name, _NONE)[0] for row in rows for name in graded]
    is_wrong = any(score is not None for score in scored) and not any(scored)
    facts = {"no_right_answer": NO_RIGHT_ANSWER if is_wrong else ""}
    facts |= {"points": points, "has_runs": bool(columns), "evaluations": sorted(kinds, key=str)}
    return _rendered("sweep", format, header=header, rows=lines, **facts)


def _row(group: SeedGroup) -> dict[str, Any]:
    """A setting, the mean and interval of its runs in each column, their number, missing points."""
    runs = read_group(group)
    found = {name: column_interval(name, runs) for name in COLUMNS}
    values = {name: finite(*interval) for name, interval in found.items() if interval}
    about = {"overrides": group.overrides, "values": values}
    return about | {"n": len(runs), "missing": group.missing}


def column_interval(name: str, runs: Sequence[Run]) -> tuple[float, float] | None:
    """(mean of a column, half its 95 % interval over seeds); None if no run has a number.

    The interval of a share that is 0, or 1, in every seed is that over the prompts.
    """
    numbers = [value for value in map(COLUMNS[name], runs) if is_number(value)]
    if not numbers:
        return None
    mean, half = seed_interval(numbers)
    if half == 0 and name in SCORES and mean in (0.0, 1.0):
        counts = (run.result["eval_after"].get("num_prompts", 0) for run in runs if run.result)
        half = rule_of_three(min(counts))
    return mean, half


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
    is_all = name == "all"
    tables = paper_tables().values() if is_all else [paper_named(name)]
    points = read_points(directory)
    found = [compare(of, points) for of in tables]
    found = [each for each in found if each.is_run or not is_all]
    if not found:
        raise WorkdirError(
            f"{directory} has no point of any paper's table; expected labels arm and pair"
        )
    if format == "json":
        facts = [dataclasses.asdict(each) for each in found]
        return json.dumps(facts if is_all else facts[0], indent=1)
    if format == "csv":
        lines = [[each.table.name, *line] for each in found for line in _csv_lines(each)]
        lines = [["table", *_CSV.split(",")], *lines]
        return _comma_separated(lines if is_all else [line[1:] for line in lines])
    statuses = [verdict.status for each in found for verdict in each.verdicts]
    counts = collections.Counter(statuses).most_common()
    return _rendered("papers", format, found=found, points=points, counts=counts, is_all=is_all)


def cells(found: Comparison, columns: Sequence[PaperColumn]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): for each column the paper's number, ours and their difference."""
    parts, rows = found.parts(columns), found.table.rows
    texts = {"method": [row.label for row in rows]}
    for column, part in parts:
        unit = f", {column.unit}" if column.unit else ""
        whose = "ours - paper" if part == "difference" else part
        texts[f"{column.label}{unit}: {whose}"] = [
            _shown(found.cells[row.label][column.label], column, part) for row in rows
        ]
    is_run = {column.pair for column, part in parts if part == "ours"}

    def by_pair(row: str, facts_of: Callable[[Cell], Iterable[str]]) -> str:
        """Facts that the cells of a pair share; with the pair's name if there are several."""
        facts = {each.pair: ", ".join(facts_of(found.cells[row][each.label])) for each in columns}
        named = lambda pair: f"{pair} " if len(is_run) > 1 else ""
        return "; ".join(named(pair) + text for pair, text in facts.items() if text)

    optional = {
        "missing": [by_pair(row.label, lambda cell: map(seed_of, cell.missing)) for row in rows],
        "config": [by_pair(row.label, lambda cell: [cell.digest or ""]) for row in rows],
        "note": [row.note for row in rows],
    }
    texts |= {name: each for name, each in optional.items() if any(each)}
    return list(texts), [list(row) for row in zip(*texts.values())]


def _shown(cell: Cell, column: PaperColumn, part: Part) -> str:
    if part == "paper":
        return f"{cell.paper.number:g} [{cell.paper.mark}]" if cell.paper else ""
    if part == "difference":
        return "" if cell.difference is None else f"{cell.difference:+.2f}"
    if cell.ours is None:
        return "not run" if cell.missing else "-" if cell.digest else ""
    shown, n = _significant(cell.ours, column.unit), f"n={len(cell.by_seed)}"
    return f"≥ {shown} ({n}, {len(cell.censored)} never)" if cell.censored else f"{shown} ({n})"


def _significant(found: Interval | None, unit: str = "") -> str:
    if found is None:
        return ""
    mean = abs(found[0])
    digits = 0 if mean >= 100 else 2 if unit == "%" or mean >= 10 else 3
    return " ± ".join(f"{each:.{digits}f}" for each in found if each is not None)


def _claims(found: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): a row per verdict, with the name of its table if there are several."""
    header = ["claim", "of", "column", "compared", "left - right, by seed", "n", "verdict"]
    rows = [
        [
            *([of.table.name] if len(found) > 1 else []),
            f"{each.claim.text} [{each.claim.mark}]",
            f"{each.claim.left}, {each.claim.right}",
            each.column.label,
            claimed(each),
            "0 in every seed" if each.difference == (0.0, 0.0) else _significant(each.difference),
            each.n,
            each.status,
        ]
        for of in found
        for each in of.verdicts
    ]
    return (["table"] if len(found) > 1 else []) + header, rows


def claimed(verdict: Verdict) -> str:
    """The claimed range of the difference, such as `above 0`."""
    margin = verdict.claim.margin
    return {
        "more": f"above {margin:g}",
        "less": f"below {0 - margin:g}",
        "equal": f"within ± {margin:g}",
        "ratio": f"left / right: at least {margin:g}",
        "gap": f"share of the gap: at least {margin:g}",
    }[verdict.claim.kind]


def _csv_lines(found: Comparison) -> Iterator[list[Any]]:
    """A line per cell, then a line per claim; differences of claims are in a run's own unit."""
    for row in found.table.rows:
        for column in found.columns:
            cell = found.cells[row.label][column.label]
            n, never = len(cell.by_seed), len(cell.censored)
            if cell.paper or cell.digest:
                yield [
                    *("cell", row.label, column.label, column.unit),
                    *((cell.paper.number, cell.paper.mark) if cell.paper else _NONE),
                    *(cell.ours or _NONE),
                    *(n, cell.difference, " ".join(cell.missing), cell.digest),
                    f"at least, in {never} of {n}" if never else None,
                ]
    for each in found.verdicts:
        about = ["claim", each.claim.text, each.column.label, None, None, each.claim.mark]
        yield [*about, *(each.difference or _NONE), each.n, None, None, None, each.status]
