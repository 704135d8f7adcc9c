"""The papers' part of a sweep's page: a line per claim, then a card per table with the paper's
numbers and ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from opdjax.config.validation import ConfigError, nearest
from opdjax.report.claim_charts import claim_chart
from opdjax.report.markup import (
    Html,
    count,
    definitions,
    details,
    join,
    notice,
    plus_minus,
    section,
    table,
    table_row,
    tag,
    text_head,
)
from opdjax.report.papers.compare import Cell, Comparison, Verdict, compare
from opdjax.report.papers.tables import MARKS, PaperColumn, PaperTable, Row, paper_tables
from opdjax.report.table import claimed, seed_of
from opdjax.runs.results import Point
from opdjax.runs.workdir import WorkdirError

Found = dict[str, Comparison | WorkdirError]  # by table; an error if its runs do not compare

# A sign and a word each, so that a verdict is readable without its colour.
_STATUS = {"reproduced": "✓", "contradicted": "✗", "inconclusive": "?", "not run": "–"}
_MEANING = {
    "reproduced": "the whole 95 % interval of the paired difference is on the claim's side",
    "contradicted": "the whole interval is on the other side",
    "inconclusive": "the interval covers both sides: it needs more seeds or a larger difference",
    "not run": "the compared rows have no finished runs with a common seed here",
}


def compared(points: Sequence[Point], only: str | None = None) -> Found:
    """The tables that have points here, by name.

    ConfigError if `only` is no table, WorkdirError if it has no point here.
    """
    if only is not None and only not in paper_tables():
        raise ConfigError(
            f"--paper {only!r} is no table of a paper; {nearest(only, paper_tables())}; opdjax "
            "table --papers lists them"
        )
    found: Found = {}
    for name, paper_table in paper_tables().items():
        if only in (None, name):
            try:
                made = compare(paper_table, points)
            except WorkdirError as error:
                found[name] = error
            else:
                found |= {name: made} if made.is_run else {}
    if only is not None and not found:
        raise WorkdirError(
            f"--paper {only}: the sweep has no point of this table; expected points with labels "
            f"such as {_labels(only)}"
        )
    return found


def _labels(name: str) -> str:
    return ", ".join([f"arm={row.arm}" for row in paper_tables()[name].rows if row.arm][:4])


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


def paper_sections(found: Found, *, is_narrowed: bool = False) -> list[Html]:
    """The overview of all claims and a card per table; empty if no table has a point here."""
    if not found:
        return []
    cards = [
        _card(each) if isinstance(each, Comparison) else _refused(name, each)
        for name, each in found.items()
    ]
    about = (
        "The paper's numbers, from its own models, and the numbers of these runs. Different models "
        "have different scores: if the scales differ, no difference is taken, and only the claims "
        "(which method wins, by how much) are compared."
    )
    legend = (
        "In brackets: the source of the paper's number, explained in the notes. Ours: mean ± half "
        "a 95 % interval over n seeds. In a chart, the dot is our mean difference, the bar its "
        "95 % interval, and the claim holds in the shaded area: a claim is reproduced if the whole "
        "bar is in it and contradicted if none is. A dotted bar: one seed, which has no interval."
    )
    rest = [name for name in paper_tables() if name not in found]
    absent = None
    if rest and not is_narrowed:
        absent = tag("p", f"Tables without a point here: {', '.join(rest)}.", class_="quiet")
    notes = (tag("p", text, class_="quiet") for text in (about, legend))
    return [_overview(found), section("papers", "Paper tables", *notes, *cards, absent)]


def _refused(name: str, error: WorkdirError) -> Html:
    refusal = tag("p", f"{name}: its runs do not compare, so no number is shown.")
    return tag(
        "article",
        tag("h3", f"{name}: {paper_tables()[name].title}"),
        notice(join((refusal, tag("pre", str(error)))), kind="warning"),
        id=f"paper-{name}",
        class_="card",
    )


# All claims


def _overview(found: Found) -> Html:
    made = [each for each in found.values() if isinstance(each, Comparison)]
    verdicts = [(each.table, verdict) for each in made for verdict in each.verdicts]
    statuses = [verdict.status for _, verdict in verdicts]
    counts = [f"{statuses.count(name)} {name}" for name in _STATUS if name in statuses]
    claims, tables = count(len(verdicts), "claim"), count(len(found), "paper table")
    lead = tag("p", f"{claims} of {tables}: {', '.join(counts)}.", class_="finding")
    head = [
        *map(text_head, ("verdict", "claim", "table")),
        "difference over seeds",
        "pairs",
        text_head("measured as"),
    ]
    rows = [_overview_row(table_, verdict) for table_, verdict in verdicts]
    caption = (
        "A claim is tested on pairs of runs with the same seed, by the 95 % interval (Student's t) "
        "of their difference. A verdict applies to these runs and models, not to the paper's."
    )
    meanings = {f"{_STATUS[name]} {name}": text for name, text in _MEANING.items()}
    return section(
        "claims",
        "Claims of the papers",
        lead,
        table(head, rows, caption=caption, class_="claims dense"),
        details("Meaning of the verdicts", definitions(meanings)),
    )


def _overview_row(of: PaperTable, verdict: Verdict) -> Html:
    link = tag("a", of.name, href=f"#paper-{of.name}")
    cells = [
        tag("th", chip(verdict.status), scope="row"),
        tag("td", verdict.claim.text, class_="wrap text"),
        tag("td", link, class_="text"),
        _difference(verdict),
        str(verdict.n),
        tag("td", _subject(verdict), class_="wrap text"),
    ]
    return table_row(cells)


def chip(status: str) -> Html:
    """A verdict as sign, word and colour."""
    return tag("span", f"{_STATUS[status]} {status}", class_=f"chip {status.replace(' ', '-')}")


def _subject(verdict: Verdict) -> str:
    """The compared rows and the column."""
    claim = verdict.claim
    forms = {
        "ratio": f"{claim.left} / {claim.right}",
        "gap": f"{claim.left}, as a share of the gap from {claim.base} to {claim.right}",
    }
    return f"{forms.get(claim.kind, f'{claim.left} − {claim.right}')}: {verdict.column.label}"


def _difference(verdict: Verdict) -> str:
    if verdict.difference is None:
        return "–"
    kind = {"ratio": " (ratio)", "gap": " (share)"}.get(verdict.claim.kind, "")
    mean, half = verdict.difference
    return _with_interval(mean, half, _digits(mean), signed=not kind) + kind


def _with_interval(mean: float, half: float | None, digits: int, *, signed: bool = False) -> str:
    """One seed has an interval without bounds."""
    return plus_minus(mean, math.inf if half is None else half, digits, signed=signed)


def _digits(value: float) -> int:
    return 0 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3


# One table


def _card(found: Comparison) -> Html:
    own = found.table
    untested = tag("p", "The paper makes no claim here that runs could test.", class_="quiet")
    return tag(
        "article",
        tag("h3", f"{own.name}: {own.title}"),
        tag("p", f"{own.paper}. The paper's settings: {own.settings}.", class_="quiet"),
        *(notice(f"{flag[:1].upper()}{flag[1:]}.") for flag in found.flags),
        _numbers(found),
        _claims(found) if found.verdicts else untested,
        _notes(found),
        id=f"paper-{own.name}",
        class_="card",
    )


def _numbers(found: Comparison) -> Html:
    """Columns with our numbers or with claims; the others on request."""
    claims = {claim.column for claim in found.table.claims}
    columns = found.columns
    is_run = [column for column, part in found.parts(columns) if part == "ours"]
    shown = [c for c in columns if c.label in claims or c in is_run] or columns
    hidden = [column for column in columns if column not in shown]
    rest = None
    if hidden:
        summary = f"{count(len(hidden), 'more column')} with numbers of the paper only"
        rest = details(summary, _matrix(found, hidden), class_="more")
    return join((_matrix(found, shown), rest))


def _matrix(found: Comparison, columns: Sequence[PaperColumn]) -> Html:
    parts, rows = found.parts(columns), found.table.rows
    extra = {
        "missing": [
            _missing([found.cells[row.label][column.label] for column in columns]) for row in rows
        ],
        "note": [row.note for row in rows],
    }
    extra = {name: texts for name, texts in extra.items() if any(texts)}
    head = [text_head("method"), *(_heading(*part) for part in parts), *map(text_head, extra)]
    lines = [
        table_row(
            [
                row.label,
                *(_cell(found, row, *part) for part in parts),
                *(tag("td", texts[at], class_="wrap text") for texts in extra.values()),
            ]
        )
        for at, row in enumerate(rows)
    ]
    return table(head, lines, class_="dense")


def _heading(column: PaperColumn, part: str) -> Html:
    whose = {"paper": "paper", "ours": "ours", "difference": "ours − paper"}[part]
    unit = f", {column.unit}" if column.unit else ""
    return tag("th", f"{column.label}{unit}", tag("span", whose, class_="whose"), scope="col")


def _cell(found: Comparison, row: Row, column: PaperColumn, part: str) -> Any:
    cell = found.cells[row.label][column.label]
    if part == "paper":
        if cell.paper is None:
            return ""
        mark = tag("abbr", f"[{cell.paper.mark}]", title=MARKS[cell.paper.mark])
        return tag("td", f"{cell.paper.number:g} ".replace("-", "−"), mark)
    if part == "difference":
        value = cell.difference
        return "" if value is None else plus_minus(value, None, 2, signed=True)
    return tag("td", _ours(cell, column), class_="ours")


def _ours(cell: Cell, column: PaperColumn) -> str:
    if cell.ours is None:
        return "not run" if cell.missing else "–" if cell.digest else ""
    value, half = cell.ours
    shown = _with_interval(value, half, 2 if column.unit == "%" else _digits(value))
    n = f"n = {len(cell.by_seed)}"
    if cell.censored:
        return f"≥ {shown} ({n}, {len(cell.censored)} never)"
    return f"{shown} ({n})"


def _missing(cells: Sequence[Cell]) -> str:
    """The seeds of the cells' points that are not done."""
    ids = (id for cell in cells for id in cell.missing)
    seeds = list(dict.fromkeys(seed_of(id).removeprefix("seed=") for id in ids))
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}" if seeds else ""


def _claims(found: Comparison) -> Html:
    head = [
        *map(text_head, ("verdict", "claim and test", "our difference")),
        "in numbers",
        "pairs",
    ]
    rows = [
        table_row(
            [
                tag("th", chip(verdict.status), scope="row"),
                tag("td", _stated(verdict), class_="wrap text"),
                tag("td", claim_chart(verdict), class_="text"),
                _difference(verdict),
                str(verdict.n),
            ]
        )
        for verdict in found.verdicts
    ]
    return table(head, rows, class_="claims dense")


def _stated(verdict: Verdict) -> Html:
    claim = verdict.claim
    mark = tag("abbr", f"[{claim.mark}]", title=MARKS[claim.mark])
    range_ = claimed(verdict).replace("-", "−")
    test = tag("span", f"{_subject(verdict)}; claimed: {range_}", class_="asked")
    return join((claim.text, " ", mark, test))


def _notes(found: Comparison) -> Html:
    notes = found.table.notes
    listed = tag("ul", *(tag("li", note) for note in notes)) if notes else None
    marks = {f"[{mark}]": text for mark, text in found.marks.items()}
    return details("Notes, and the letters in brackets", listed, definitions(marks))
