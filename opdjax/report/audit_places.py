"""Where the noise of an audit sits: by the KL of the contexts, which is mostly in few of them, and
by position.
"""

from __future__ import annotations

import math
from typing import Any

from opdjax.report import audit_charts as drawn
from opdjax.report.audit_charts import Share
from opdjax.report.audit_words import Document, percent, ratio, short, three, told
from opdjax.report.charts import SERIES, Chart, ChartLine, box, draw, legend, swatches
from opdjax.report.markup import Html, details, section, table, tag
from opdjax.report.measures import bucket_label
from opdjax.runs.results import is_number

_LITTLE = 0.005  # share of opd's noise under which a bin's ratio is not drawn
_BY_KL = "contexts by their KL, percentiles"


def places_section(document: Document) -> Html:
    """Shares and ratios by the KL of a context and by its position."""
    contexts = document["contexts"]
    kl = [f"{100 * b['from']:g}–{100 * b['to']:g}" for b in contexts["bins"]]
    position = [bucket_label((b["first"], b["last"])) for b in contexts["buckets"]]
    parameters = document.get("gradients", {}).get("by_kl", {})
    baselines = [
        n
        for n, row in contexts["rows"].items()
        if "by_kl" in row and document["subjects"].get(n, {}).get("recipe") == "vopd"
    ]
    logits = {name: contexts["rows"][name] for name in baselines}
    by_kl = [
        _share_chart(
            "the whole, by KL",
            "contexts by their KL, percentiles",
            kl,
            contexts["bins"],
            parameters.get("variance_share"),
        )
    ]
    bins, shares = (
        {n: r["by_kl"] for n, r in logits.items()},
        [b["variance_share"] for b in contexts["bins"]],
    )
    by_kl.append(_ratio_lines("Logits: variance / opd, by KL", _BY_KL, kl, bins, shares))
    if parameters.get("rows"):
        by_kl.append(
            _ratio_lines(
                "Parameters: action noise / opd, by KL",
                _BY_KL,
                kl,
                parameters["rows"],
                parameters["variance_share"],
            )
        )
    x_label, shares = (
        "position in the completion, tokens",
        [b["variance_share"] for b in contexts["buckets"]],
    )
    buckets = {n: r["by_position"] for n, r in logits.items()}
    by_place = [
        _share_chart("the whole, by position", x_label, position, contexts["buckets"], None),
        _ratio_lines("Logits: variance / opd, by position", x_label, position, buckets, shares),
    ]
    kinds = [
        (kind.name, box(kind.slot, kind.hatch))
        for kind in _kinds(contexts["bins"], parameters.get("variance_share"))
    ]
    lines = (
        legend([(short(document, name), slot) for slot, name in enumerate(baselines[:SERIES])])
        if baselines
        else None
    )
    note = (
        "Bars: shares of the whole, which add up to 100 % over the bins of one kind. Lines: a baseline's variance over that of opd in the "
        "same bin (1: no better), with its 95 % interval over prompts; a bin with less than "
        f"{percent(_LITTLE)} of opd's noise has no point."
    )
    return section(
        "places",
        "Where does the noise sit?",
        told(place_sentence(document)),
        tag("p", note, class_="quiet"),
        swatches(kinds),
        lines,
        tag("div", *filter(None, by_kl), class_="figures large"),
        details("Table: by KL", _bin_table(document, contexts["bins"], kl, "by_kl", parameters)),
        tag("div", *filter(None, by_place), class_="figures large"),
        details(
            "Table: by position",
            _bin_table(document, contexts["buckets"], position, "by_position", {}),
        ),
    )


def _kinds(bins: list[dict[str, Any]], parameters: list[float | None] | None) -> list[Share]:
    whole = sum(b["contexts"] for b in bins) or 1
    kinds = [
        Share("contexts", [b["contexts"] / whole for b in bins], 5, "////"),
        Share("their share of the KL", [b["kl_share"] for b in bins], 2),
        Share("of opd's variance, logits", [b["variance_share"] for b in bins], 1),
    ]
    return (
        [*kinds, Share("of opd's action noise, parameters", parameters, 3)] if parameters else kinds
    )


def _share_chart(
    title: str, x_label: str, categories: list[str], bins: list[dict[str, Any]], parameters
) -> Html:
    return drawn.shares(f"Shares of {title}", x_label, categories, _kinds(bins, parameters))


def _ratio_lines(
    title: str,
    x_label: str,
    categories: list[str],
    rows: dict[str, list],
    shares: list[float | None],
) -> Html | None:
    lines, nothing = [], [math.nan] * 3
    # A ratio to next to nothing is rounding.
    holds = [is_number(share) and share >= _LITTLE for share in shares]
    for slot, cells in enumerate(list(rows.values())[:SERIES]):
        kept = [
            cell if is_kept and all(map(is_number, cell)) else nothing
            for cell, is_kept in zip(cells, holds)
        ]
        value, low, high = zip(*kept)
        shift = 0.06 * (
            slot - (min(len(rows), SERIES) - 1) / 2
        )  # so that intervals do not hide one another
        x = [at + shift for at in range(len(categories))]
        if any(map(math.isfinite, value)):
            lines.append(ChartLine(x, value, low, high, slot=slot, has_markers=True, bars=True))
    chart = Chart(
        title, x_label, "times opd", categories=categories, reference=1.0, bounds=(0.0, None)
    )
    return draw(chart, lines) if lines else None


def place_sentence(document: Document) -> str:
    """What the few contexts with the highest KL hold, and at which positions it is highest."""
    contexts = document["contexts"]
    top = contexts["bins"][-1]
    text = (
        f"The {percent(top['to'] - top['from'])} of contexts with the highest KL hold {percent(top['kl_share'])} of the KL and "
        f"{percent(top['variance_share'])} of opd's variance"
    )
    half = [b for b in contexts["bins"] if b["to"] <= 0.5]
    if half:
        kl, variance = (
            percent(sum(b[share] for b in half)) for share in ("kl_share", "variance_share")
        )
        text += (
            f"; the half with the lowest KL {kl} of either"
            if kl == variance
            else f"; the half with the lowest KL {kl} and {variance}"
        )
    peak = max(contexts["buckets"], key=lambda b: b["kl_mean"])
    where = bucket_label((peak["first"], peak["last"]))
    nats = f"{three(peak['kl_mean'])} nats a token, {three(contexts['kl_mean'])} overall"
    return f"{text}. By position the KL is highest at tokens {where}: {nats}."


def _bin_table(
    document: Document,
    bins: list[dict[str, Any]],
    labels: list[str],
    key: str,
    parameters: dict[str, Any],
) -> Html:
    rows: list[list[Any]] = [
        ["contexts", *(f"{b['contexts']:,}" for b in bins)],
        ["mean KL, nats", *(three(b["kl_mean"]) for b in bins)],
        ["share of the KL", *(percent(b["kl_share"]) for b in bins)],
        ["share of opd's variance, logits", *(percent(b["variance_share"]) for b in bins)],
    ]
    if parameters.get("variance_share"):
        rows.append(
            [
                "share of opd's action noise, parameters",
                *(percent(share) for share in parameters["variance_share"]),
            ]
        )
    sources = {
        "logits": {n: row[key] for n, row in document["contexts"]["rows"].items() if row.get(key)}
    }
    sources["parameters"] = parameters.get("rows", {})
    for space, found in sources.items():
        for name, cells in found.items():
            head = tag("th", tag("code", name), f" / opd, {space}", scope="row", class_="long")
            rows.append([head, *(ratio(cell[0], cell[1:]) for cell in cells)])
    return table(["", *labels], rows, class_="dense")
