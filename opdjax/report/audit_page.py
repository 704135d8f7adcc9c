"""The page of an audit: direction, noise and cost of every estimator, and known pitfalls."""

from __future__ import annotations

from typing import Any

from opdjax.report import audit_charts
from opdjax.report.audit_charts import Entry
from opdjax.report.audit_costs import costs_section, tree_section
from opdjax.report.audit_gallery import gallery_section
from opdjax.report.audit_noise import noise_section
from opdjax.report.audit_places import places_section
from opdjax.report.audit_words import (
    CLOSE,
    KL,
    Document,
    aim_of,
    angles_of,
    degrees,
    is_lost,
    is_pitfall,
    named,
    ratio,
    short,
    verdict,
)
from opdjax.report.charts import grid, swatches
from opdjax.report.markup import (
    Html,
    count,
    definitions,
    details,
    join,
    listed,
    percent,
    quiet,
    section,
    significant,
    table,
    tabs,
    tag,
    text_head,
)
from opdjax.report.measures import model_name


def audit_page(document: Document, name: str) -> tuple[str, list[Html | None]]:
    """(title, parts of the page) of the document that `opdjax audit` writes."""
    title = f"Audit: {model_name(document['student'])} ← {model_name(document['teacher'])}"
    parts = [
        _header(document, title),
        _directions(document),
        noise_section(document),
        places_section(document),
        tree_section(document),
        costs_section(document),
        gallery_section(document),
    ]
    return title if name in ("", ".") else f"{title}, {name}", parts


# What was measured


def _header(document: Document, title: str) -> Html:
    contexts, random = document["contexts"], document["vocabulary"]
    # Earlier versions wrote the settings as "how".
    settings = document.get("settings", document.get("how", {}))
    answers = settings.get("num_generations")
    pitfalls = sum(is_pitfall(document, name) for name in document["subjects"])
    recipes = len(document["subjects"]) - pitfalls
    lead = (
        f"{count(recipes, 'estimator')} and {count(pitfalls, 'pitfall')} at"
        f" {contexts['num_contexts']:,} contexts that the student reached on"
        f" {count(contexts['num_prompts'], 'prompt')}"
    )
    lead += "." if answers is None else f", {count(answers, 'answer')} each."
    about = (
        f"Student {model_name(document['student'])}, teacher {model_name(document['teacher'])};"
        f" {KL['reverse']} is {significant(contexts['kl_mean'])} nats a token on average. Also"
        f" measured: {count(random['num_contexts'], 'random context')} of {random['vocab']} tokens,"
        f" and a tree of all sequences of {document['tree']['length']} tokens, in float64. The"
        " audit reports the expected gradient of each estimator and the spread of single samples"
        " around it. Both are computed exactly, except for the gradients of all parameters, which"
        " are sampled."
    )
    environment = document.get("environment", {})
    facts = {name: environment.get(name) for name in ("opdjax", "commit", "jax", "python")}
    facts["commit"] = str(facts["commit"] or "")[:12]
    facts["on"] = ", ".join(dict.fromkeys(environment.get("devices", [])))
    if "cores" in environment:
        cores = count(environment["cores"], "core")
        facts["machine"] = f"{environment.get('machine', '')}, {cores}"
    made = ", ".join(f"{name} {value}" for name, value in facts.items() if value)
    lead = tag("p", lead, class_="lead")
    return tag("header", tag("h1", title), lead, quiet(about), quiet(made))


# Direction


def _directions(document: Document) -> Html:
    contexts, random = document["contexts"], document["vocabulary"]
    rows_by_view = {
        f"{model_name(document['student'])}, {contexts['num_contexts']:,} contexts": contexts[
            "rows"
        ],
        f"{random['num_contexts']:,} random contexts": random["rows"],
    }
    views = {
        view: join((_angle_charts(document, rows, view), _direction_table(document, rows)))
        for view, rows in rows_by_view.items()
    }
    key = [
        ("recipe", audit_charts.dot(is_pitfall=False)),
        ("pitfall", audit_charts.dot(is_pitfall=True)),
        ("the direction that it claims", audit_charts.ring()),
    ]
    words = {
        "angle": "between the estimator's expected gradient and the exact one, all contexts as one"
        " vector; 90° is unrelated",
        "bias": "norm of the difference of the two, divided by the norm of the exact one; unlike"
        " the angle, it depends on the size too",
        "noise / signal": "spread of one sample per context, divided by the norm of the expected"
        " gradient",
        "worse": "share of contexts where a single sample varies more than one of opd",
    }
    return section(
        "direction",
        "Does it point where it claims?",
        swatches(key),
        tabs("direction-of", views, "measured at"),
        definitions(words),
        lead=direction_sentence(document),
    )


def direction_sentence(document: Document) -> str:
    """Which estimators point where they claim, and what the pitfalls do."""
    rows = document["contexts"]["rows"]
    recipes = [name for name in rows if not is_pitfall(document, name)]
    claims = [name for name in recipes if aim_of(document, name) in KL]
    angles = {name: angles_of(rows[name])[aim_of(document, name)] for name in claims}
    missed = [
        f"{short(document, name)} ({degrees(value, 'no direction')})"
        for name, value in angles.items()
        if value is None or value > CLOSE
    ]
    text = (
        f"{len(claims) - len(missed)} of {count(len(claims), 'recipe')} that claim the gradient of"
        f" a KL point along it within {CLOSE:g}°"
    )
    text += f"; {listed(missed)} {'does' if len(missed) == 1 else 'do'} not." if missed else "."
    pitfalls = [name for name in rows if is_pitfall(document, name)]
    found = [f"{name} {verdict(rows[name], aim_of(document, name))}" for name in pitfalls]
    return f"{text} Of the pitfalls, {listed(found)}." if found else text


_OWN = "Recipes with a direction of their own"
_PITFALLS = f"Pitfalls, mistaken for {KL['reverse']}"
_LOST = "No direction: the expected gradient is 0"


def _group_of(document: Document, name: str, row: dict[str, Any]) -> str:
    """The heading that an estimator stands under."""
    if is_lost(row):
        return _LOST
    if is_pitfall(document, name):
        return _PITFALLS
    aim = aim_of(document, name)
    return f"Recipes for {KL[aim]}" if aim in KL else _OWN


def _angle_charts(document: Document, rows: dict[str, Any], where: str) -> Html:
    """One chart per KL, both with the rows in the same order."""
    found = [value for row in rows.values() for value in angles_of(row).values()]
    widest = max([60.0, *(value for value in found if value is not None)])
    headings = [*(f"Recipes for {kl}" for kl in KL.values()), _OWN, _PITFALLS, _LOST]
    order = sorted(rows, key=lambda name: round(angles_of(rows[name])["reverse"] or 0.0, 1))
    figures = []
    for direction, kl in KL.items():
        entries: dict[str, list[Entry]] = {heading: [] for heading in headings}
        for name in order:
            value = angles_of(rows[name])[direction]
            entry = Entry(
                short(document, name),
                is_pitfall(document, name),
                value,
                is_target=aim_of(document, name) == direction,
                text=degrees(value, ""),
                note="no direction" if value is None else "",
            )
            entries[_group_of(document, name, rows[name])].append(entry)
        groups = [(heading, group) for heading, group in entries.items() if group]
        title, scale = f"Angle to the gradient of {kl}", "degrees; 0° is exact"
        figures.append(audit_charts.angles(title, scale, groups, widest=widest, where=where))
    return grid(figures, is_large=True)


def _direction_table(document: Document, rows: dict[str, Any]) -> Html:
    head = ["estimator", text_head("claims")]
    head += [f"{what}, {kl}" for what in ("cosine", "bias") for kl in ("KL(s || t)", "KL(t || s)")]
    head += ["noise / signal", "variance / opd", "worse"]
    cosine = lambda value: "none" if value is None else f"{value:.4f}".replace("-", "−")
    lines = [
        [
            named(document, name),
            tag("td", KL.get(aim_of(document, name), "own"), class_="text"),
            *(cosine(row["cosine"][direction]) for direction in KL),
            *(percent(row["bias"][direction]) for direction in KL),
            "no signal" if row["noise_to_signal"] is None else significant(row["noise_to_signal"]),
            ratio(row["variance_ratio"], row.get("variance_ratio_interval")),
            percent(row["worse"]),
        ]
        for name, row in rows.items()
    ]
    title = f"Table: cosine, bias and variance of all {len(lines)}"
    return details(title, table(head, lines, class_="dense"))
