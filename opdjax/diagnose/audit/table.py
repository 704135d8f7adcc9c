"""The audit's document as text for a terminal; columns have the names of the document's keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any


def text(document: dict[str, Any]) -> str:
    """Return the tables of the measured parts, and the names of the unfinished ones.

    The config's own recipe has a row in each table of estimators; its cells are empty where a
    single context does not define its gradient.
    """
    tables = [*_tables(document)]
    if unfinished := document.get("unfinished"):
        tables.append(f"not measured yet: {', '.join(unfinished)}")
    return "\n\n".join(tables)


def _tables(document: dict[str, Any]) -> Iterator[str]:
    table, plain = partial(_table, document["subjects"]), partial(_table, {})
    if found := document.get("vocabulary"):
        title = f"{found['num_contexts']} random contexts, V = {found['vocab']}, float64, every"
        yield table(f"{title} token enumerated (logit space)", found["rows"])
    if found := document.get("tree"):
        title = f"a tree of all sequences (V = {found['vocab']}, T = {found['length']}), float64: "
        bias = lambda row: {name: row[name] for name in ("frozen", "sequence", "baseline")}
        cells = lambda row: {"bias": bias(row), "variance / signal^2": row["variance"]}
        rows = {row["title"]: cells(row) for row in found["rows"]}
        yield plain(title + "relative bias of the expected gradient", rows)
    if found := document.get("contexts"):
        title = f"{found['num_contexts']} contexts of {document['student']}, teacher "
        title += f"{document['teacher']}, mean KL {found['kl_mean']:.3g} nats (logit space, every "
        yield table(f"{title} token in closed form)", found["rows"])
        for key, groups in (("by_position", found["buckets"]), ("by_kl", found["bins"])):
            rows = {name: row[key] for name, row in found["rows"].items() if key in row}
            yield table(f"variance / opd, logits, {key.replace('_', ' ')}", _by(groups, rows))
    if found := document.get("costs"):
        yield table("the loss", found)
    if found := document.get("gradients"):
        title = f"gradient of one rollout, all parameters; signal / noise of {found['batch']}"
        yield table(f"{title} rollouts; ratios to opd", found["rows"])
        rows = {"share of opd's noise": found["by_kl"]["variance_share"]} | found["by_kl"]["rows"]
        title = "action noise / opd, parameters, by kl (95 %)"
        yield table(title, _by(document["contexts"]["bins"], rows))
    if found := document.get("batch_pitfalls"):
        rows = {f"{name} (pitfall)": row for name, row in found.items()}
        yield plain("gradient of the exact KL under a batch's pitfall", rows)


def _by(groups: list[dict[str, Any]], rows: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return rows with a column for each bucket of positions, or for each bin of the KL."""
    position = "{first} to {last}".format_map
    quantiles = lambda bin: f"{100 * bin['from']:g} to {100 * bin['to']:g} %"
    names = [(position if "first" in each else quantiles)(each) for each in groups]
    shares = {key: [each[key] for each in groups] for key in ("kl_share", "variance_share")}
    return {name: dict(zip(names, cells)) for name, cells in (shares | rows).items()}


def _cells(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (heading, text) of each number, and each (number, low, high), of a row."""
    for key, value in row.items():
        heading = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            yield from _cells(value, f"{heading}, ")
        elif isinstance(value, list | tuple) and value and not isinstance(value[0], list | tuple):
            number, *ends = ["" if x is None else f"{x:.3g}" for x in value]
            yield heading, f"{number} ({' to '.join(ends)})" if number else ""
        elif isinstance(value, float):
            # The rounding error of an exact estimator is shown as 0.
            is_zero = prefix.startswith("bias") and abs(value) < 1e-5
            yield heading, "0" if is_zero else f"{value:.3g}"


def _table(subjects: dict[str, Any], title: str, rows: Mapping[str, Any]) -> str:
    """Return a table with a row for each estimator, the config's own recipe always."""
    own = {name: {} for name, each in subjects.items() if each["is_own"] and name not in rows}
    mark = lambda name: " (pitfall)" * subjects.get(name, {}).get("is_pitfall", False)
    found = {name + mark(name): dict(_cells(row)) for name, row in (own | rows).items()}
    headings = list(dict.fromkeys(heading for row in found.values() for heading in row))
    cells = [["", *headings]]
    cells += [[name, *(row.get(each, "") for each in headings)] for name, row in found.items()]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [title]
    for first, *others in cells:
        aligned = map(str.rjust, others, widths[1:])
        lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)
