"""The section of an audit's page on where noise occurs: by KL of the context, and by position."""

from __future__ import annotations

import math
from typing import Any

from opdjax.report.audit_charts import Share, shares
from opdjax.report.audit_words import Document, has_baseline, ratio, short
from opdjax.report.charts import SERIES, Chart, ChartLine, box, draw, grid, legend, swatches
from opdjax.report.markup import Html, details, percent, section, significant, table, tag
from opdjax.report.measures import bucket_label
from opdjax.runs.results import is_number

_LITTLE = 0.005  # a bin with a smaller share of opd's noise has no point: its ratio is rounding
_BY_KL, _BY_POSITION = "contexts by their KL, percentiles", "position in the completion, tokens"

Bins = list[dict[str, Any]]


def places_section(document: Document) -> Html:
    """Shares and ratios by the KL of a context and by its position."""
    contexts = document["contexts"]
    bins, buckets = contexts["bins"], contexts["buckets"]
    kl = [f"{100 * each['from']:g}–{100 * each['to']:g}" for each in bins]
    position = [bucket_label((each["first"], each["last"])) for each in buckets]
    parameters = document.get("gradients", {}).get("by_kl", {})
    actions = parameters.get("variance_share")
    rows = {
        name: row
        for name, row in contexts["rows"].items()
        if "by_kl" in row and has_baseline(document, name)
    }
    by_kl = {name: row["by_kl"] for name, row in rows.items()}
    by_position = {name: row["by_position"] for name, row in rows.items()}
    kinds, places = _kinds(bins, actions), _kinds(buckets, None)
    title = "Logits: variance / opd, by"
    kl_figures = [
        shares("Shares of the whole, by KL", _BY_KL, kl, kinds),
        _ratio_chart(f"{title} KL", _BY_KL, kl, by_kl, _variance(bins)),
    ]
    if parameters.get("rows"):
        name = "Parameters: action noise / opd, by KL"
        kl_figures.append(_ratio_chart(name, _BY_KL, kl, parameters["rows"], actions))
    position_figures = [
        shares("Shares of the whole, by position", _BY_POSITION, position, places),
        _ratio_chart(f"{title} position", _BY_POSITION, position, by_position, _variance(buckets)),
    ]
    names = [(short(document, name), slot) for slot, name in enumerate([*rows][:SERIES])]
    about = (
        "Bars: shares of the whole; those of one kind add up to 100 %. Lines: variance of a"
        " baseline divided by that of opd in the same bin (1: no better), with its 95 % interval"
        f" over prompts. A bin with less than {percent(_LITTLE)} of opd's noise has no point."
    )
    return section(
        "places",
        "Where is the noise?",
        swatches([(kind.name, box(kind.slot, kind.hatch)) for kind in kinds]),
        legend(names) if names else None,
        grid(kl_figures, is_large=True),
        details("Table: by KL", _bin_table(document, bins, kl, "by_kl", parameters)),
        grid(position_figures, is_large=True),
        details("Table: by position", _bin_table(document, buckets, position, "by_position", {})),
        lead=place_sentence(document),
        about=about,
    )


def _variance(bins: Bins) -> list[float | None]:
    return [each["variance_share"] for each in bins]


def _kinds(bins: Bins, actions: list[float | None] | None) -> list[Share]:
    whole = sum(each["contexts"] for each in bins) or 1
    kinds = [
        Share("contexts", [each["contexts"] / whole for each in bins], 5, "////"),
        Share("their share of the KL", [each["kl_share"] for each in bins], 2),
        Share("of opd's variance, logits", _variance(bins), 1),
    ]
    return [*kinds, Share("of opd's action noise, parameters", actions, 3)] if actions else kinds


def _ratio_chart(
    title: str,
    x_label: str,
    categories: list[str],
    rows: dict[str, list],
    noise: list[float | None],
) -> Html | None:
    lines = []
    is_kept = [is_number(share) and share >= _LITTLE for share in noise]
    for slot, cells in enumerate(list(rows.values())[:SERIES]):
        kept = [
            cell if keep and all(map(is_number, cell)) else [math.nan] * 3
            for cell, keep in zip(cells, is_kept)
        ]
        value, low, high = zip(*kept)
        # Shifted, so that intervals do not hide one another.
        shift = 0.06 * (slot - (min(len(rows), SERIES) - 1) / 2)
        x = [at + shift for at in range(len(categories))]
        if any(map(math.isfinite, value)):
            lines.append(ChartLine(x, value, low, high, slot=slot, has_markers=True, bars=True))
    limits = {"reference": 1.0, "bounds": (0.0, None)}
    chart = Chart(title, x_label, "times opd", categories=categories, **limits)
    return draw(chart, lines) if lines else None


def place_sentence(document: Document) -> str:
    """The share of KL and variance in the contexts with the highest KL, and the position of it."""
    contexts = document["contexts"]
    top = contexts["bins"][-1]
    size, kl, variance = map(
        percent, (top["to"] - top["from"], top["kl_share"], top["variance_share"])
    )
    text = (
        f"The {size} of contexts with the highest KL have {kl} of the KL and {variance} of opd's"
        " variance"
    )
    half = [each for each in contexts["bins"] if each["to"] <= 0.5]
    if half:
        sums = (sum(each[share] for each in half) for share in ("kl_share", "variance_share"))
        text += f"; the half with the lowest KL has {' and '.join(map(percent, sums))}"
    peak = max(contexts["buckets"], key=lambda each: each["kl_mean"])
    where = bucket_label((peak["first"], peak["last"]))
    highest, overall = significant(peak["kl_mean"]), significant(contexts["kl_mean"])
    position = f"tokens {where}: {highest} nats a token, {overall} overall"
    return f"{text}. By position, the KL is highest at {position}."


def _bin_table(
    document: Document, bins: Bins, labels: list[str], key: str, parameters: dict[str, Any]
) -> Html:
    rows: list[list[Any]] = [
        ["contexts", *(f"{each['contexts']:,}" for each in bins)],
        ["mean KL, nats", *(significant(each["kl_mean"]) for each in bins)],
        ["share of the KL", *(percent(each["kl_share"]) for each in bins)],
        ["share of opd's variance, logits", *map(percent, _variance(bins))],
    ]
    actions = parameters.get("variance_share")
    if actions:
        rows.append(["share of opd's action noise, parameters", *map(percent, actions)])
    contexts = document["contexts"]["rows"].items()
    spaces = {
        "logits": {name: row[key] for name, row in contexts if row.get(key)},
        "parameters": parameters.get("rows", {}),
    }
    for space, found in spaces.items():
        for name, cells in found.items():
            head = tag("th", tag("code", name), f" / opd, {space}", scope="row", class_="long")
            rows.append([head, *(ratio(cell[0], cell[1:]) for cell in cells)])
    return table(["", *labels], rows, class_="dense")
