"""The pitfalls on the page of an audit: one card each, with what is known and what was measured."""

from __future__ import annotations

from opdjax.report.audit_words import (
    Document,
    aim_of,
    angle,
    degrees,
    is_lost,
    is_pitfall,
    pitfall_badge,
    ratio,
    verdict,
)
from opdjax.report.markup import (
    Html,
    count,
    definitions,
    join,
    listed,
    percent,
    quiet,
    section,
    significant,
    tag,
)
from opdjax.runs.results import is_number


def gallery_section(document: Document) -> Html | None:
    """Every known pitfall; None where the document has none."""
    about = {name: subject.get("about", "") for name, subject in document["subjects"].items()}
    measured = {name: text for name, text in about.items() if is_pitfall(document, name)}
    batches = dict.fromkeys(document.get("batch_pitfalls", {}), "")
    known = document.get("pitfalls") or measured | batches
    if not known:
        return None
    cards = [
        tag(
            "article",
            tag("h3", tag("code", name), " ", pitfall_badge()),
            tag("p", text) if text else None,
            _measured(document, name),
            class_="pitfall",
        )
        for name, text in known.items()
    ]
    lead = gallery_sentence(document, list(known))
    return section("pitfalls", "Pitfall gallery", tag("div", *cards, class_="cards"), lead=lead)


def _measured(document: Document, name: str) -> Html:
    """What this audit measured of a pitfall."""
    facts: dict[str, str] = {}
    for view, key in (("this pair", "contexts"), ("random contexts", "vocabulary")):
        row = document[key]["rows"].get(name)
        if row is not None:
            variance = ratio(row["variance_ratio"], row.get("variance_ratio_interval"))
            facts[f"direction, {view}"] = verdict(row, aim_of(document, name))
            facts[f"variance / opd, {view}"] = variance
    batch = document.get("batch_pitfalls", {}).get(name, {})
    if "bias" in batch:
        turned = degrees(angle(batch["cosine"]))
        facts["gradient of the exact KL"] = f"off by {percent(batch['bias'])}, turned by {turned}"
    for tokens, error in batch.get("error_by_tokens", {}).items():
        sign = "+" if error > 0 else ""
        facts[f"sum over {int(tokens):,} tokens"] = f"wrong by {sign}{percent(error)}"
    gradients = document.get("gradients", {})
    gradient = gradients.get("rows", {}).get(name)
    if gradient is not None and is_number(gradient["signal_to_noise"]):
        snr = significant(gradient["signal_to_noise"])
        facts[f"signal / noise of {gradients['batch']} rollouts"] = snr
    if not facts:
        return quiet("Not measured here.")
    return join((tag("h4", "Measured here"), definitions(facts)))


def gallery_sentence(document: Document, names: list[str]) -> str:
    """How many were measured, which have no direction, and the largest error of a batch."""
    rows, batches = document["contexts"]["rows"], document.get("batch_pitfalls", {})
    seen = [name for name in names if name in rows or name in batches]
    were = "was" if len(seen) == 1 else "were"
    text = f"{len(seen)} of {count(len(names), 'known pitfall')} {were} measured here"
    lost = [name for name in seen if name in rows and is_lost(rows[name])]
    if lost:
        text += f"; {listed(lost)} {'has' if len(lost) == 1 else 'have'} no direction"
    wrong = {name: row["bias"] for name, row in batches.items() if is_number(row.get("bias"))}
    if wrong:
        worst = max(wrong, key=wrong.get)
        change = f"change the gradient by up to {percent(wrong[worst])} ({worst})"
        text += f"; token weights that depend on the batch {change}"
    return text + "."
