"""Paper tables beside the runs of a sweep: every claim in one line, then a card a table with the
paper's numbers and ours.
"""

from __future__ import annotations

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
)
from opdjax.report.papers.compare import Comparison, compare
from opdjax.report.papers.printing import asked_of
from opdjax.report.papers.registry import PAPER_TABLES
from opdjax.report.papers.tables import MARKS, PaperColumn, PaperTable, Row
from opdjax.report.papers.verdicts import Cell, Verdict
from opdjax.runs.results import Point
from opdjax.runs.workdir import WorkdirError

# Each with a sign and a word, so that colour is never all that tells them apart.
_STATUS = {"reproduced": "✓", "contradicted": "✗", "inconclusive": "?", "not run": "–"}
_MEANING = {
    "reproduced": "all of the 95 % interval of the paired difference is on the claim's side",
    "contradicted": "all of it is on the other side",
    "inconclusive": "it reaches over both sides: more seeds, or a larger difference, would be needed",
    "not run": "the rows that it compares have no finished runs with a seed in common here",
}


def compared(
    points: Sequence[Point], only: str | None = None
) -> dict[str, Comparison | WorkdirError]:
    """The tables that have points here; in place of one whose runs do not compare, why they do not.

    ConfigError where `only` is no table, WorkdirError where it has no point here.
    """
    if only is not None and only not in PAPER_TABLES:
        raise ConfigError(
            f"--paper {only!r} is no table of a paper; {nearest(only, PAPER_TABLES)}; opdjax table --papers lists them"
        )
    found: dict[str, Comparison | WorkdirError] = {}
    for name, paper_table in PAPER_TABLES.items():
        if only in (None, name):
            try:
                made = compare(paper_table, points)
            except WorkdirError as error:
                found[name] = error
            else:
                found |= {name: made} if made.is_run else {}
    if only is not None and not found:
        raise WorkdirError(
            f"--paper {only}: the sweep has no point of this table; expected points with labels such as {_labels(only)}"
        )
    return found


def _labels(name: str) -> str:
    rows = [row.labels for row in PAPER_TABLES[name].rows if row.labels]
    return ", ".join(
        " ".join(f"{key}={value}" for key, value in labels.items()) for labels in rows[:4]
    )


def of_table(points: Sequence[Point], name: str) -> list[Point]:
    """The points of a table's rows and columns."""
    rows, columns = PAPER_TABLES[name].rows, PAPER_TABLES[name].columns
    wanted = [
        {**row.labels, **column.labels}
        for row in rows
        if row.labels
        for column in columns
        if column.read
    ]
    return [
        point
        for point in points
        if any(labels.items() <= point.overrides.items() for labels in wanted)
    ]


def paper_sections(
    found: dict[str, Comparison | WorkdirError], *, is_narrowed: bool = False
) -> list[Html | None]:
    """The overview of all claims and the cards; nothing where no table has a point here."""
    if not found:
        return []
    cards = [
        _card(each) if isinstance(each, Comparison) else _refused(name, each)
        for name, each in found.items()
    ]
    about = (
        "What the paper measured, on its own models, beside what these runs measured, on theirs. Other models make other numbers: where "
        "the scales differ no difference is taken, and it is the claims (who wins, by how much) that are compared."
    )
    how = (
        "In brackets: how sure the paper's number is, told in the notes. Ours: mean ± half a 95 % interval over n seeds. Drawn: the dot is "
        "our mean difference, the bar its 95 % interval, the shade where the claim holds: all of the bar in the shade is seen, none of it "
        "contradicted. A dotted bar across: one seed alone, which has no interval."
    )
    rest = [name for name in PAPER_TABLES if name not in found]
    absent = (
        tag("p", f"Tables without a point here: {', '.join(rest)}.", class_="quiet")
        if rest and not is_narrowed
        else None
    )
    return [
        _overview(found),
        section(
            "papers",
            "Paper tables",
            tag("p", about, class_="quiet"),
            tag("p", how, class_="quiet"),
            *cards,
            absent,
        ),
    ]


def _refused(name: str, error: WorkdirError) -> Html:
    reason = join(
        (
            tag("p", f"{name}: its runs do not compare, so no number is shown."),
            tag("pre", str(error)),
        )
    )
    return tag(
        "article",
        tag("h3", f"{name}: {PAPER_TABLES[name].title}"),
        notice(reason, kind="warning"),
        id=f"paper-{name}",
        class_="card",
    )


# All claims


def _overview(found: dict[str, Comparison | WorkdirError]) -> Html:
    verdicts = [
        (each.table, verdict)
        for each in found.values()
        if isinstance(each, Comparison)
        for verdict in each.verdicts
    ]
    counts = {
        status: sum(verdict.status == status for _, verdict in verdicts) for status in _STATUS
    }
    told = ", ".join(f"{amount} {status}" for status, amount in counts.items() if amount)
    lead = tag(
        "p",
        f"{count(len(verdicts), 'claim')} of {count(len(found), 'paper table')}: {told}.",
        class_="finding",
    )
    head = [
        _text("verdict"),
        _text("claim"),
        _text("table"),
        "difference over seeds",
        "pairs",
        _text("measured as"),
    ]
    rows = [_overview_row(table_, verdict) for table_, verdict in verdicts]
    caption = (
        "Each claim is tested on pairs of runs with the same seed, by the 95 % interval (Student's t) of their difference. A verdict is of "
        "these runs and models, not of the paper's."
    )
    return section(
        "claims",
        "Claims of the papers",
        lead,
        table(head, rows, caption=caption, class_="claims dense"),
        details(
            "What the verdicts mean",
            definitions({f"{_STATUS[name]} {name}": text for name, text in _MEANING.items()}),
        ),
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
    """A verdict by sign, word and colour."""
    return tag("span", f"{_STATUS[status]} {status}", class_=f"chip {status.replace(' ', '-')}")


def _subject(verdict: Verdict) -> str:
    """What is compared with what, in which column."""
    claim = verdict.claim
    how = {
        "ratio": f"{claim.left} / {claim.right}",
        "gap": f"{claim.left}, as a share of the way from {claim.base} to {claim.right}",
    }
    return f"{how.get(claim.kind, f'{claim.left} − {claim.right}')}: {verdict.column.label}"


def _difference(verdict: Verdict) -> str:
    if verdict.difference is None:
        return "–"
    kind = {"ratio": " (ratio)", "gap": " (share)"}.get(verdict.claim.kind, "")
    return plus_minus(*verdict.difference, _digits(verdict.difference[0]), signed=not kind) + kind


def _digits(value: float) -> int:
    return 0 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3


# One table


def _card(found: Comparison) -> Html:
    own = found.table
    runs = (
        None
        if found.verdicts
        else tag("p", "The paper makes no claim here that runs could test.", class_="quiet")
    )
    return tag(
        "article",
        tag("h3", f"{own.name}: {own.title}"),
        tag("p", f"{own.paper}. The paper's setting: {own.settings}.", class_="quiet"),
        *(notice(f"{flag[:1].upper()}{flag[1:]}.") for flag in found.flags),
        _numbers(found),
        _claims(found) if found.verdicts else runs,
        _notes(found),
        id=f"paper-{own.name}",
        class_="card",
    )


def _numbers(found: Comparison) -> Html:
    shown, hidden = _split(found)
    rest = None
    if hidden:
        rest = details(
            f"{count(len(hidden), 'more column')} that the paper alone has",
            _matrix(found, hidden),
            class_="more",
        )
    return join((_matrix(found, shown), rest))


def _split(found: Comparison) -> tuple[list[PaperColumn], list[PaperColumn]]:
    """Columns of ours and those that claims are of; the others."""
    named = {claim.column for claim in found.table.claims}
    shown = [
        column for column in found.columns if column.label in named or _has(found, column, "ours")
    ]
    shown = shown or list(found.columns)
    return shown, [column for column in found.columns if column not in shown]


def _has(found: Comparison, column: PaperColumn, part: str) -> bool:
    cells = [found.cells[row.label, column.label] for row in found.table.rows]
    if part == "ours":
        return any(cell.digest for cell in cells)
    return any(
        cell.paper if part == "paper" else cell.difference(column) is not None for cell in cells
    )


def _matrix(found: Comparison, columns: Sequence[PaperColumn]) -> Html:
    parts = [
        (column, part)
        for column in columns
        for part in ("paper", "ours", "difference")
        if _has(found, column, part)
    ]
    rows = found.table.rows
    missing = {
        row.label: _missing([found.cells[row.label, column.label] for column in columns])
        for row in rows
    }
    notes = {row.label: row.note or ("" if row.labels else "not implemented here") for row in rows}
    extra = {
        name: told for name, told in (("missing", missing), ("note", notes)) if any(told.values())
    }
    head = [
        _text("method"),
        *(_heading(column, part) for column, part in parts),
        *(_text(name) for name in extra),
    ]
    lines = [
        table_row(
            [
                row.label,
                *(_cell(found, row, *part) for part in parts),
                *(tag("td", told[row.label], class_="wrap text") for told in extra.values()),
            ]
        )
        for row in rows
    ]
    return table(head, lines, class_="dense")


def _heading(column: PaperColumn, part: str) -> Html:
    whose = {"paper": "paper", "ours": "ours", "difference": "ours − paper"}[part]
    unit = f", {column.unit}" if column.unit else ""
    return tag("th", f"{column.label}{unit}", tag("span", whose, class_="whose"), scope="col")


def _cell(found: Comparison, row: Row, column: PaperColumn, part: str) -> Any:
    cell = found.cells[row.label, column.label]
    if part == "paper":
        if cell.paper is None:
            return ""
        mark = tag("abbr", f"[{cell.paper.mark}]", title=MARKS[cell.paper.mark])
        return tag("td", f"{cell.paper.number:g} ".replace("-", "−"), mark)
    if part == "difference":
        value = cell.difference(column)
        return "" if value is None else plus_minus(value, None, 2, signed=True)
    return tag("td", _ours(cell, column), class_="ours")


def _ours(cell: Cell, column: PaperColumn) -> str:
    if cell.ours is None:
        return "not run" if cell.missing else "–" if cell.digest else ""
    value, half = (number * column.scale for number in cell.ours)
    digits = 2 if column.unit == "%" else _digits(value)
    n = f"n = {len(cell.by_seed)}"
    if cell.censored:
        return f"≥ {plus_minus(value, half, digits)} ({n}, {len(cell.censored)} never)"
    return f"{plus_minus(value, half, digits)} ({n})"


def _missing(cells: Sequence[Cell]) -> str:
    ids = list(dict.fromkeys(id for cell in cells for id in cell.missing))
    seeds = [
        next((part.removeprefix("seed=") for part in id.split(",") if part.startswith("seed=")), id)
        for id in ids
    ]
    return (
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(dict.fromkeys(seeds))}"
        if seeds
        else ""
    )


def _claims(found: Comparison) -> Html:
    head = [
        _text("verdict"),
        _text("claim, and how it is tested"),
        _text("our difference, drawn"),
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
    asked = asked_of(verdict).replace("-", "−")
    return join(
        (claim.text, " ", mark, tag("span", f"{_subject(verdict)}; asked: {asked}", class_="asked"))
    )


def _notes(found: Comparison) -> Html:
    cells = found.cells.values()
    marks = {cell.paper.mark for cell in cells if cell.paper} | {
        claim.mark for claim in found.table.claims
    }
    told = {f"[{mark}]": text for mark, text in MARKS.items() if mark in marks}
    remarks = (
        tag("ul", *(tag("li", note) for note in found.table.notes)) if found.table.notes else None
    )
    return details("Notes, and what the letters in brackets mean", remarks, definitions(told))


def _text(name: str) -> Html:
    return tag("th", name, class_="text", scope="col")
