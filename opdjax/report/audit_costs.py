"""The sections of an audit's page on credit assignment and stale data, and on time and memory."""

from __future__ import annotations

import statistics
from typing import Any

from opdjax.config.recipes import PLAIN
from opdjax.report import audit_charts
from opdjax.report.audit_charts import Entry
from opdjax.report.audit_words import EXACT, Document, named, ratio, short
from opdjax.report.charts import grid
from opdjax.report.markup import (
    Html,
    count,
    details,
    group_row,
    number,
    percent,
    quiet,
    section,
    significant,
    table,
    tag,
    text_cell,
    text_head,
)
from opdjax.runs.results import is_number

# Credit and stale data


def tree_section(document: Document) -> Html:
    """Bias of the expected gradient over all sequences of a small tree."""
    found = document["tree"]
    groups: dict[str, list[dict[str, Any]]] = {
        "One sequence a batch": [],
        "Two sequences a batch": [],
        "Stale data": [],
    }
    one, two, stale = groups.values()
    for row in found["rows"]:
        is_stale, is_two = (row["title"].startswith(word) for word in ("stale", "two"))
        (stale if is_stale else two if is_two else one).append(row)
    lines: list[Any] = []
    for heading, rows in groups.items():
        lines += [group_row(heading, 6)] if rows else []
        lines += [_tree_row(row) for row in rows]
    head = ["case", "bias, fixed contexts", "bias, sequence KL", "added by the baseline"]
    head += ["variance / signal²", text_head("recipe")]
    caption = (
        f"All sequences of {found['length']} tokens over {found['vocab']} ids, in float64: relative"
        " bias of the expected gradient against the gradient of the summed KL with a fixed"
        " distribution of contexts, and against the gradient of the KL of whole sequences. For a"
        " batch mean, the size is fitted and only the direction is compared."
    )
    box = table(head, lines, caption=caption, class_="dense")
    return section("tree", "Credit and stale data", box, lead=tree_sentence(found["rows"]))


def _tree_row(row: dict[str, Any]) -> list[Any]:
    biases = (_bias(row[name], "exact") for name in ("frozen", "sequence"))
    recipe = text_cell(tag("code", row["name"]))
    return [row["title"], *biases, _bias(row["baseline"], "0"), number(row["variance"]), recipe]


def _bias(value: float | None, exact: str) -> Html:
    if is_number(value) and abs(value) < EXACT:
        return tag("td", exact, class_="exact")
    return tag("td", percent(value))


def tree_sentence(rows: list[dict[str, Any]]) -> str:
    """How many cases have an exact gradient, and the largest bias of the others."""
    off = {row["title"]: min(row["frozen"], row["sequence"]) for row in rows}
    exact = sum(value < EXACT for value in off.values())
    text = f"{exact} of {count(len(rows), 'case')} have one of the two exact gradients"
    text += " in expectation"
    worst = max(off, key=off.get)
    if off[worst] >= EXACT:
        text += f"; the largest bias is that of “{worst}” ({percent(off[worst])})"
    added = {row["title"]: row["baseline"] for row in rows if is_number(row["baseline"])}
    moved = {title: value for title, value in added.items() if value >= EXACT}
    if moved:
        most = max(moved, key=moved.get)
        text += f". A baseline changes the expectation in {len(moved)} of {len(added)} cases, most"
        text += f" in “{most}” ({percent(moved[most])})"
    return text + "."


# Time and memory


_COSTS = (
    ("seconds_per_token", "Time per token", "µs", 1e6),
    ("bytes_per_token", "Memory per token", "kB", 1e-3),
)


def costs_section(document: Document) -> Html | None:
    """Time and memory of each recipe; None where they were not measured."""
    rows = document.get("costs") or {}
    if not rows:
        return None
    plain, figures = rows.get(PLAIN, {}), []
    for key, title, unit, scale in _COSTS:
        known = _known(rows, key)
        if not known or not is_number(plain.get(key)) or _is_even(known):
            continue
        entries = [
            Entry(
                short(document, name),
                value=_relative(known[name], plain.get(key)),
                text=f"{significant(scale * known[name])} {unit}",
            )
            for name in sorted(known, key=known.get)
        ]
        title = f"{title}, relative to opd"
        figures.append(audit_charts.ratios(title, "times opd, logarithmic", [("", entries)]))
    head = ["recipe"]
    for _, title, unit, _ in _COSTS:
        head += [f"{title}, {unit}", "over opd"]
    lines = [[named(document, name), *_cells(row, plain)] for name, row in rows.items()]
    note = (
        "The part that differs between recipes: from hidden states to the loss and its gradients"
        " for hidden states and head, with the teacher's log-probabilities. The layers of both"
        " models are not included. Time: median of alternating runs on the machine above. Memory:"
        " peak working memory of the compiled program divided by the tokens."
    )
    return section(
        "costs",
        "What it costs",
        grid(figures, is_large=True) if figures else None,
        quiet(note),
        details("Table: seconds and bytes", table(head, lines, class_="dense"), open=not figures),
        lead=cost_sentence(document),
    )


def _cells(row: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    cells = []
    for key, _, _, scale in _COSTS:
        value = row.get(key)
        cells.append(significant(scale * value) if is_number(value) else "–")
        cells.append(ratio(_relative(value, plain.get(key))))
    return cells


def _known(rows: dict[str, Any], key: str) -> dict[str, float]:
    return {name: row[key] for name, row in rows.items() if is_number(row.get(key))}


def _is_even(known: dict[str, float]) -> bool:
    """Whether all values are equal, up to 1 %."""
    return max(known.values()) <= 1.01 * min(known.values())


def _relative(value: float | None, plain: float | None) -> float | None:
    return value / plain if is_number(value) and is_number(plain) and plain else None


def cost_sentence(document: Document) -> str:
    """The lowest and highest cost, in time and in memory."""
    rows, parts = document["costs"], []
    for key, title, unit, scale in _COSTS:
        known = _known(rows, key)
        if not known:
            continue
        if _is_even(known):
            middle = significant(scale * statistics.median(known.values()))
            parts.append(f"{title} is {middle} {unit} for all.")
            continue
        ends = []
        for name in (min(known, key=known.get), max(known, key=known.get)):
            relative = _relative(known[name], rows.get(PLAIN, {}).get(key))
            is_plain = relative is None or name == PLAIN
            times = "" if is_plain else f", {significant(relative)} times opd"
            ends.append(
                f"{significant(scale * known[name])} {unit} ({short(document, name)}{times})"
            )
        parts.append(f"{title} ranges from {ends[0]} to {ends[1]}.")
    return " ".join(parts) or "No costs were measured."
