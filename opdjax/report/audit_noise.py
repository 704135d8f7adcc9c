"""The section of an audit's page on noise: of logits, and of the gradient of all parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opdjax.config.recipes import PLAIN
from opdjax.report import audit_charts
from opdjax.report.audit_charts import PARTS, Entry
from opdjax.report.audit_words import EXACT, Document, is_pitfall, named, ratio, short, subject
from opdjax.report.charts import grid, swatches
from opdjax.report.markup import (
    Html,
    count,
    details,
    notice,
    number,
    percent,
    quiet,
    section,
    significant,
    table,
)
from opdjax.runs.results import is_number

_SAME = 0.01  # expected gradients are equal below this relative bias
_MAX_STACK = 3.0  # limit of a chart of noise, in multiples of the noise of opd
_GROUPS = (
    "Same expected gradient as opd",
    "Another expected gradient",
    "Tokens of a sequence coupled",
    "Pitfalls",
)
_PART_NAMES = {
    "prompt": "noise between prompts",
    "trajectory": "noise between answers to a prompt",
    "action": "noise between redraws of every token",
}


def noise_section(document: Document) -> Html:
    """Variance of logits, and the noise of parameter gradients by its cause."""
    figures = [_variance_chart(document)]
    key = [(name, audit_charts.dot(is_pitfall=name == "pitfall")) for name in ("recipe", "pitfall")]
    rest: list[Html] = []
    if "gradients" in document:
        found = document["gradients"]
        figures.append(_stack_chart(document))
        key += [(_PART_NAMES[part], audit_charts.part_box(part)) for part in PARTS]
        key.append(("all noise", audit_charts.bar()))
        note = (
            "Parameters: gradient of one rollout, split by an analysis of variance with"
            f" {count(found['num_redraws'], 'redraw')} of every token. Where a recipe couples the"
            " tokens of a sequence, trajectory noise includes action noise. A part that is"
            " estimated below 0 is drawn as 0; the total and the table keep its value. s/n: signal"
            f" over noise of a batch of {found['batch']} rollouts."
        )
        box = details("Table: signal, noise and its parts", _gradient_table(document))
        rest = [quiet(note), box]
    else:
        option = "audit.parameter_space"
        rest = [notice(f"The gradients of all parameters were not measured ({option}).")]
    note = (
        "Logits: variance of one sample per context, as a multiple of opd's, with a 95 % bootstrap"
        " interval over prompts. A smaller variance is an improvement only at the same expected"
        " gradient. Exact divergences sample no token and have no variance."
    )
    return section(
        "noise",
        "How noisy is it?",
        swatches(key),
        grid(figures, is_large=True),
        quiet(note),
        *rest,
        lead=noise_sentence(document),
    )


def _group_of(document: Document, name: str) -> str:
    row = document["contexts"]["rows"].get(name)
    same, other, coupled, pitfalls = _GROUPS
    if is_pitfall(document, name):
        return pitfalls
    if row is None:
        return coupled
    bias = row["bias"]["reverse"]
    return same if bias is not None and bias < _SAME else other


def _grouped(
    document: Document, entries: dict[str, Entry], size: Callable[[str], float]
) -> list[tuple[str, list[Entry]]]:
    """The entries by expected gradient, the least noisy first."""
    groups: dict[str, list[Entry]] = {heading: [] for heading in _GROUPS}
    for name in sorted(entries, key=size):
        groups[_group_of(document, name)].append(entries[name])
    return [(heading, found) for heading, found in groups.items() if found]


def _sampled_rows(document: Document) -> dict[str, dict[str, Any]]:
    """The estimators that sample tokens and have a known variance."""
    rows = document["contexts"]["rows"].items()
    return {n: row for n, row in rows if "by_kl" in row and is_number(row["variance_ratio"])}


def _variance_chart(document: Document) -> Html | None:
    rows, entries = _sampled_rows(document), {}
    for name, row in rows.items():
        low, high = row.get("variance_ratio_interval") or (None, None)
        value = row["variance_ratio"]
        label, text = short(document, name), f"{significant(value)}×"
        entries[name] = Entry(label, is_pitfall(document, name), value, low, high, text=text)
    groups = _grouped(document, entries, lambda name: rows[name]["variance_ratio"])
    title = "Logits: variance of a sample, relative to opd"
    return audit_charts.ratios(title, "times opd, logarithmic", groups)


def _noise_of_plain(rows: dict[str, Any]) -> float | None:
    """The noise of opd, from the ratio of another estimator to it."""
    known = [row for row in rows.values() if is_number(row.get("noise_ratio"))]
    known = [row for row in known if row["noise_ratio"] and is_number(row["noise"])]
    unit = known[0]["noise"] / known[0]["noise_ratio"] if known else 0.0
    return unit if unit > 0 else None


def _positive(row: dict[str, Any]) -> dict[str, float]:
    """The parts of the noise; a part estimated below 0 counts as 0."""
    return {part: max(row[part] or 0.0, 0.0) for part in PARTS}


def _stack_chart(document: Document) -> Html | None:
    found = document["gradients"]
    rows, unit = found["rows"], _noise_of_plain(found["rows"])
    entries, widest = {}, 0.0
    for name, row in rows.items():
        parts = tuple(size / (unit or 1.0) for size in _positive(row).values())
        total, snr = row["noise"] / (unit or 1.0), row["signal_to_noise"]
        text = f"s/n {'–' if not is_number(snr) else f'{snr:.2f}' if snr else '0'}"
        label = short(document, name)
        entries[name] = Entry(label, is_pitfall(document, name), total, parts=parts, text=text)
        widest = max(widest, sum(parts), total)
    limit = 1.06 * (widest or 1.0)
    title = f"Parameters: noise of one rollout (s/n: of {found['batch']})"
    groups = _grouped(document, entries, lambda name: rows[name]["noise"])
    if not unit:
        return audit_charts.stacks(title, "squared gradient", groups, limit=limit, unit="")
    limit = min(limit, _MAX_STACK)
    return audit_charts.stacks(title, "times the noise of opd", groups, limit=limit, unit="×")


def noise_sentence(document: Document) -> str:
    """The least and most noisy of the estimators with opd's expected gradient, and opd's noise."""
    rows, sentences = _sampled_rows(document), []
    same = [
        (row["variance_ratio"], name)
        for name, row in rows.items()
        if _group_of(document, name) == _GROUPS[0] and name != PLAIN
        if not subject(document, name).get("options", {}).get("extra_draws")
    ]
    if same:
        (low, best), (high, worst) = min(same), max(same)
        interval = rows[best].get("variance_ratio_interval")
        text = (
            "Of the recipes that sample one token per context and have opd's expected gradient,"
            f" {short(document, best)} has the smallest variance in logits: {ratio(low, interval)}"
            " times opd's"
        )
        most = f"; {short(document, worst)} has the largest: {significant(high)} times"
        sentences.append(f"{text}{most if worst != best else ''}.")
    plain = document.get("gradients", {}).get("rows", {}).get(PLAIN)
    parts = _positive(plain) if plain else {}
    total = sum(parts.values())
    if total and plain["action"] is not None:
        shares = {part: percent(round(size / total, 2)) for part, size in parts.items()}
        negative = min(plain[part] or 0.0 for part in PARTS) < 0
        sentences.append(
            f"In the gradient of all parameters, sampled tokens cause {shares['action']} of opd's"
            " noise, the only part that a baseline can reduce; trajectories cause"
            f" {shares['trajectory']}, prompts {shares['prompt']}"
            f"{' (a part estimated below 0 counts as 0)' if negative else ''}."
        )
    return " ".join(sentences) or "No two recipes with the same expected gradient were measured."


def _gradient_table(document: Document) -> Html:
    head = ["estimator", "signal", "noise", "of prompts", "of trajectories", "of actions"]
    head += ["signal / noise", "noise / opd", "actions / opd (95 %)"]
    rows = []
    for name, row in document["gradients"]["rows"].items():
        smallest = EXACT * abs(row["noise"])
        values = [row[part] for part in ("signal", "noise", *PARTS)]
        sizes = ["0" if is_number(v) and abs(v) < smallest else number(v) for v in values]
        noise = [significant(row.get(key)) for key in ("signal_to_noise", "noise_ratio")]
        action, *interval = row.get("action_ratio") or (None, None, None)
        rows.append([named(document, name), *sizes, *noise, ratio(action, interval)])
    return table(head, rows, class_="dense")
