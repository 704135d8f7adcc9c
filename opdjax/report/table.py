"""Tables of a sweep and of papers: Markdown for readers, JSON for programs. No jax."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from opdjax.report.measures import SCORES
from opdjax.report.papers.cells import Cell, Interval, finite
from opdjax.report.papers.compare import Comparison, compare
from opdjax.report.papers.tables import paper_named, paper_tables
from opdjax.report.papers.verdicts import DECIDED, Verdict
from opdjax.runs.results import (
    DIVERGENCES,
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

Format = Literal["markdown", "json"]
# The numbers of a run that a row shows; a column that no run has is left out.
COLUMNS: dict[str, Callable[[Run], float | None]] = {
    "avg@k": lambda run: run.score("avg@k"),
    "greedy": lambda run: run.score("greedy"),
    "pass@k": lambda run: run.score("pass@k"),
    "gain in avg@k": lambda run: run.gain,
    **{
        f"{label}{where}": functools.partial(Run.divergence, name=name, writer=writer)
        for writer, where in (("student", ""), ("teacher", ", T's answers"))
        for name, label in list(DIVERGENCES.items())[:4]
    },
    "change in KL(S || T)": lambda run: run.change_in_kl,
    "median gradient norm": lambda run: run.median("grad/norm"),
    "KL, last 10 steps": lambda run: run.last_mean("kl/student_teacher"),
    "staleness KL": lambda run: run.staleness,
    "keep rate": lambda run: run.keep_rate,
    "seconds": lambda run: run.seconds,
}
_CLAIMS = ["claim", "of", "column", "compared", "left - right", "greedy: left - right", "n"]
_CLAIMS += ["verdict", "after Holm's correction", "smallest effect seen"]
_SEEDS = (
    "± is half a 95 % interval over seeds (Student's t), or over prompts where every seed's share "
    "is 0 or 1. Runs of one row answer the same prompts, so it does not include the variance over "
    "prompts."
)
_STALENESS = (
    "Staleness KL: KL(student || behaviour) of the tokens trained on, last 10 steps. Keep rate: "
    "mean over all steps."
)
DIVERGENCE_NOTE = (
    "S: student, T: teacher. KL and JSD, nats a token, and same top, the share of tokens with the "
    "same most likely id, are of the student's answers to held-out prompts, or of T's answers."
)
_KL = (
    "KL is exact, except for opd and for vopd with a top-k baseline, where it is the mean "
    "log-ratio of the sampled tokens."
)
_NOTES = [
    "± of a score is half a 95 % interval over n seeds (Student's t); of a paired difference, over "
    "seeds and prompts where each prompt's score was kept. A ratio of costs until a score, or one "
    "whose seeds spread over a factor of ten, is a median with the interval of the sign test, "
    "which needs six seeds.",
    "A claim is reproduced if the whole interval is on its side, contradicted if none of it is, "
    "else inconclusive, with the smallest effect that this error finds with a power of 80 %. "
    "Holm's correction is for all decided claims of a table. A claim is not testable here if the "
    "design or the records of the runs exclude an answer.",
    "rate: the learning rate used, and the grid that it was chosen from, on validation prompts and "
    "another seed, all else equal. A claim is judged only if both arms used the best rate of grids "
    "of one size.",
    "config: a digest of all settings but the seed; cells with one digest come from the same runs.",
]
SIDES = (
    "Reproduced: the whole 95 % interval of the paired difference is on the claim's side. "
    "Contradicted: none of it is."
)


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A GitHub Markdown table; bars and line breaks inside cells are escaped."""
    text = lambda cell: str(cell).replace("|", r"\|").replace("\n", " ")
    line = lambda cells: f"| {' | '.join(map(text, cells))} |"
    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def _seed_of(id: str) -> str:
    """The `seed=N` of a point's id; the id if it has none."""
    found = re.search(r"(?:^|,)(seed=\d+)", id)
    return found[1] if found else id


def _done(points: Sequence[Point]) -> str:
    done = [point.workdir for point in points if point.status == "done"]
    commits = {str(read_run_config(each)["environment"].get("commit"))[:12] for each in done}
    named = ", ".join(sorted(commits)) or "none"
    return f"{len(done)} of {len(points)} points done; commit {named}."


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
    fields = ("source", "num_samples", "num_prompts")
    kinds = {tuple(point.config["evaluation"][name] for name in fields) for point in points}
    every_k = {k for _, k, _ in kinds}
    k = every_k.pop() if len(every_k) == 1 else None
    fixed = lambda value: f"{value:.{3 if abs(value) < 100 else 0}f}"
    cell = lambda found: " ± ".join(fixed(each) for each in found if each is not None)
    lines = [
        [
            *(str(row["overrides"].get(name, "")) for name in names),
            *(cell(row["values"].get(name, ())) for name in columns),
            row["n"],
            ", ".join(map(_seed_of, row["missing"])),
        ]
        for row in rows
    ]
    header = [*names, *(score_label(name, k) for name in columns), "n", "missing"]
    notes = [_SEEDS, _STALENESS] if "staleness KL" in columns else [_SEEDS]
    notes += [DIVERGENCE_NOTE] if "change in KL(S || T)" in columns else []
    graded = (*SCORES, "gain in avg@k")
    scores = [row["values"][name][0] for row in rows for name in graded if name in row["values"]]
    if scores and not any(scores):
        notes.append(NO_RIGHT_ANSWER)
    if columns:
        asked = (f"{of}: k = {k}, at most {n} prompts" for of, k, n in sorted(kinds, key=str))
        notes += [_KL, f"{'; '.join(asked)}. {_done(points)}"]
    return "\n".join([markdown(header, lines), "", *notes])


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
    found = interval(map(COLUMNS[name], runs))
    if name in SCORES and found in ((0.0, 0.0), (1.0, 0.0)):
        counts = (run.result["eval_after"].get("num_prompts", 0) for run in runs if run.result)
        return found[0], rule_of_three(min(counts))
    return found


def interval(values: Iterable[float | None]) -> tuple[float, float] | None:
    """`seed_interval` of the finite values; None if there are none."""
    known = [float(value) for value in values if is_number(value)]
    return seed_interval(known) if known else None


def list_of_papers() -> str:
    """A line per table of a paper: name, title and paper."""
    return "\n".join(f"{name:22}{of.title} ({of.paper})" for name, of in paper_tables().items())


def paper_table(directory: pathlib.Path, name: str, format: Format = "markdown") -> str:
    """A paper's table with the runs of the sweep in `directory`. With the name `all`: all claims,
    then every table that has a point there.

    ConfigError if no table has the name, WorkdirError if `all` finds no point of any table.
    """
    is_all = name == "all"
    points = read_points(directory)
    tables = paper_tables().values() if is_all else [paper_named(name)]
    found = [compare(of, points) for of in tables]
    found = [each for each in found if each.is_run or not is_all]
    if not found:
        raise WorkdirError(
            f"{directory} has no point of any paper's table; expected labels arm and pair"
        )
    if format == "json":
        facts = [dataclasses.asdict(each) for each in found]
        return json.dumps(facts if is_all else facts[0], indent=1)
    parts = []
    if is_all:
        parts = [f"## All {counted(found)}", SIDES, markdown(*claims(found)), _done(points)]
    for each in found:
        of = each.table
        parts += [f"## {of.name}: {of.title}", about(each), markdown(*cells(each))]
        if each.verdicts:
            parts += ["The paper's claims, tested on these runs:", markdown(*claims([each]))]
        caveats = [f"Caveat: {flag}." for flag in each.flags]
        if not each.is_run:
            labels = f"it looks for {of.labels}"
            caveats.append(f"This directory has no point of the table: {labels}.")
        parts.append("\n".join(f"- {note}" for note in (*caveats, *notes(each))))
    return "\n\n".join(parts)


def counted(found: Sequence[Comparison]) -> str:
    """The number of claims, and of those with each verdict; a claim of two tables counts once."""
    different: dict[Any, str] = {}
    for each in found:
        arms = {row.label: (row.arm, row.when) for row in each.table.rows}
        for verdict in each.verdicts:
            claim, column = verdict.claim, verdict.column
            rows = (arms.get(label) for label in (claim.left, claim.right, claim.base))
            read = column.read, column.pair, column.until, column.spent
            different.setdefault((claim.kind, verdict.claimed, *rows, *read), verdict.status)
    counts = collections.Counter(different.values()).most_common()
    return f"{len(different)} claims: {', '.join(f'{count} {status}' for status, count in counts)}"


def about(found: Comparison) -> str:
    """The paper of a table, and what it was measured on."""
    return f"{found.table.paper}. The paper's settings: {found.table.settings}."


def notes(found: Comparison) -> list[str]:
    """What a reader of a table must know: the paper's notes, sources, intervals."""
    sources = ", ".join(f"[{mark}] {text}" for mark, text in found.marks.items())
    lines = [*found.table.notes, f"Source of a paper's number: {sources}."]
    return lines + _NOTES if found.is_run else lines


def cells(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """(header, rows): for each column the paper's number, ours and their difference."""
    rows = [found.cells[row.label] for row in found.table.rows]
    texts = {"method": [row.label for row in found.table.rows]}
    for column in found.columns:
        name = f"{column.label}, {column.unit}" if column.unit else column.label
        for part, shown in _PARTS.items():
            texts[f"{name}: {part}"] = [shown(row[column.label], column.unit) for row in rows]
    pairs = {each.pair for each in found.columns for row in rows if row[each.label].digest}

    def by_pair(row: Mapping[str, Cell], fact_of: Callable[[Cell], str]) -> str:
        """What the cells of a pair share; with the pair's name if there are several."""
        facts = {each.pair: fact_of(row[each.label]) for each in found.columns}
        named = lambda pair: f"{pair} " if len(pairs) > 1 else ""
        return "; ".join(named(pair) + fact for pair, fact in facts.items() if fact)

    missing = lambda cell: ", ".join(map(_seed_of, cell.missing))
    texts["missing"] = [by_pair(row, missing) for row in rows]
    rate = lambda cell: str(cell.tuning or "")
    texts["rate"] = [by_pair(row, rate) for row in rows]
    texts["config"] = [by_pair(row, lambda cell: cell.digest or "") for row in rows]
    texts["note"] = [row.note for row in found.table.rows]
    filled = {name: each for name, each in texts.items() if any(each)}
    return list(filled), [list(row) for row in zip(*filled.values())]


def _ours(cell: Cell, unit: str) -> str:
    if cell.ours is None:
        return "not run" if cell.missing else "-" if cell.digest else ""
    shown, n = _significant(cell.ours, unit), f"n={len(cell.by_seed)}"
    return f"≥ {shown} ({n}, {len(cell.censored)} never)" if cell.censored else f"{shown} ({n})"


def _significant(found: Interval | None, unit: str = "") -> str:
    if found is None:
        return ""
    mean = abs(found[0])
    digits = 0 if mean >= 100 else 2 if unit == "%" or mean >= 10 else 3
    return " ± ".join(f"{each:.{digits}f}" for each in found if each is not None)


_PARTS: dict[str, Callable[[Cell, str], str]] = {
    "paper": lambda cell, _: f"{cell.paper.number:g} [{cell.paper.mark}]" if cell.paper else "",
    "ours": _ours,
    "ours, greedy": lambda cell, unit: _significant(cell.greedy, unit),
    "ours - paper": lambda cell, _: "" if cell.difference is None else f"{cell.difference:+.2f}",
}


def claims(found: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): a row per verdict, with the name of its table if there are several."""
    rows = [
        [
            *([of.table.name] if len(found) > 1 else []),
            f"{each.claim.text} [{each.claim.mark}]",
            f"{each.claim.left}, {each.claim.right}",
            each.column.label,
            _claimed(each),
            _difference(each),
            _significant(each.greedy),
            each.n,
            f"{each.status}: {each.reason}" if each.reason else each.status,
            _corrected(each),
            "" if each.detectable is None else f"{each.detectable:.3g}",
        ]
        for of in found
        for each in of.verdicts
    ]
    return (["table"] if len(found) > 1 else []) + _CLAIMS, rows


def _difference(verdict: Verdict) -> str:
    if not verdict.over.startswith("median") or verdict.difference is None:
        return _significant(verdict.difference)
    low, high = verdict.interval or ("", "")
    return f"median {verdict.difference[0]:.3g}" + (f" ({low:.3g} to {high:.3g})" if high else "")


def _corrected(verdict: Verdict) -> str:
    """The verdict that remains after Holm's correction, with its p-value."""
    if verdict.adjusted is None or verdict.status not in DECIDED:
        return ""
    status = verdict.status if verdict.adjusted <= 0.05 else "inconclusive"
    return f"{status}, p {'< 0.001' if verdict.adjusted < 1e-3 else f'= {verdict.adjusted:.2g}'}"


def _claimed(verdict: Verdict) -> str:
    """The claimed range of the difference."""
    margin = verdict.claim.margin
    return {
        "more": f"above {margin:g}",
        "less": f"below {0 - margin:g}",
        "equal": f"within ± {verdict.claimed[1] or 0:g}",
        "ratio": f"left / right: at least {margin:g}",
        "gap": f"share of the gap: at least {margin:g}",
    }[verdict.claim.kind]
