"""The pitfalls on the page of an audit: a card each, what is known of it apart from what was
measured.
"""

from __future__ import annotations

from opdjax.report.audit_words import (
    Document,
    aim_of,
    angle,
    degrees,
    is_lost,
    is_pitfall,
    listed,
    percent,
    ratio,
    three,
    told,
    verdict,
)
from opdjax.report.markup import Html, count, definitions, join, section, tag
from opdjax.runs.results import is_number


def gallery_section(document: Document) -> Html | None:
    """Every known pitfall: what it looks like, what happens, and what was measured of it."""
    batches = document.get("batch_pitfalls", {})
    of_tokens = {
        name: about.get("about", "")
        for name, about in document["subjects"].items()
        if is_pitfall(document, name)
    }
    known = document.get("pitfalls") or of_tokens | dict.fromkeys(batches, "")
    if not known:
        return None
    cards = [
        tag(
            "article",
            tag("h3", tag("code", name), " ", tag("span", "pitfall", class_="badge")),
            tag("p", about) if about else None,
            _measured(document, name),
            class_="pitfall",
        )
        for name, about in known.items()
    ]
    return section(
        "pitfalls",
        "Pitfall gallery",
        told(gallery_sentence(document, list(known))),
        tag("div", *cards, class_="cards"),
    )


def _measured(document: Document, name: str) -> Html:
    """What this audit found of a pitfall, under a heading of its own."""
    facts: dict[str, str] = {}
    for view, rows in (
        ("this pair", document["contexts"]["rows"]),
        ("random contexts", document["vocabulary"]["rows"]),
    ):
        if name in rows:
            row = rows[name]
            facts[f"direction, {view}"] = verdict(document, row, aim_of(document, name))
            facts[f"variance / opd, {view}"] = ratio(
                row["variance_ratio"], row.get("variance_ratio_interval")
            )
    batch = document.get("batch_pitfalls", {}).get(name, {})
    if "bias" in batch:
        facts["gradient of the exact KL"] = (
            f"off by {percent(batch['bias'])}, turned by {degrees(angle(batch['cosine']))}"
        )
    for tokens, error in batch.get("error_by_tokens", {}).items():
        facts[f"sum over {int(tokens):,} tokens"] = (
            f"wrong by {'+' if error > 0 else ''}{percent(error)}"
        )
    gradient = document.get("gradients", {}).get("rows", {}).get(name)
    if gradient is not None and is_number(gradient["signal_to_noise"]):
        facts[f"signal / noise of {document['gradients']['batch']} rollouts"] = three(
            gradient["signal_to_noise"]
        )
    if not facts:
        return tag("p", "Not measured here.", class_="quiet")
    return join((tag("h4", "Measured here"), definitions(facts)))


def gallery_sentence(document: Document, names: list[str]) -> str:
    """How many were measured, how many of them have no direction at all, how far a batch's go
    wrong.
    """
    rows, batches = document["contexts"]["rows"], document.get("batch_pitfalls", {})
    seen = [name for name in names if name in rows or name in batches]
    text = f"{len(seen)} of {count(len(names), 'known pitfall')} {'was' if len(seen) == 1 else 'were'} measured here"
    lost = [name for name in seen if name in rows and is_lost(rows[name])]
    if lost:
        text += f"; {listed(lost)} {'has' if len(lost) == 1 else 'have'} no direction at all"
    wrong = {name: row["bias"] for name, row in batches.items() if is_number(row.get("bias"))}
    if wrong:
        worst = max(wrong, key=wrong.get)
        text += f"; the weights that a batch gives its tokens change the gradient by up to {percent(wrong[worst])} ({worst})"
    return text + "."
