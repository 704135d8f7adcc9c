"""The page of an audit: where every estimator points, how noisy it is and where, what it costs, and
what looks right and is not.
"""

from __future__ import annotations

import statistics
from typing import Any

from opdjax.report import audit_charts as drawn
from opdjax.report.audit_charts import Entry
from opdjax.report.audit_gallery import gallery_section
from opdjax.report.audit_places import places_section
from opdjax.report.audit_words import (
    CLOSE,
    EXACT,
    KL,
    Document,
    aim_of,
    angles_of,
    degrees,
    is_lost,
    is_pitfall,
    listed,
    named,
    percent,
    ratio,
    short,
    three,
    told,
    verdict,
)
from opdjax.report.charts import swatches
from opdjax.report.markup import (
    Html,
    count,
    definitions,
    details,
    join,
    notice,
    number,
    section,
    table,
    tabs,
    tag,
)
from opdjax.report.measures import model_name
from opdjax.runs.results import is_number

_SAME = 0.01  # relative bias under which two expected gradients are told as one
_SAME_AIM = "Same expected gradient as opd"
_MAX_STACK = 3.0  # times the noise of opd that a chart of noise shows


def audit_page(document: Document, name: str) -> tuple[str, list[Html | None]]:
    """(title, parts of the page) of the document that `opdjax audit` writes."""
    title = f"Audit: {model_name(document['student'])} ← {model_name(document['teacher'])}"
    parts = [
        _directions(document),
        _noise(document),
        places_section(document),
        _tree(document),
        _costs(document),
        gallery_section(document),
    ]
    return title if name in ("", ".") else f"{title}, {name}", [_header(document, title), *parts]


# What was measured


def _header(document: Document, title: str) -> Html:
    contexts, how, environment = (
        document["contexts"],
        document.get("settings", document.get("how", {})),
        document.get("environment", {}),
    )
    recipes = sum(not about.get("is_pitfall") for about in document["subjects"].values())
    generations = (
        f", {count(how['num_generations'], 'answer')} each" if "num_generations" in how else ""
    )
    lead = (
        f"{count(recipes, 'estimator')} and {count(len(document['subjects']) - recipes, 'pitfall')} at {contexts['num_contexts']:,} "
        f"contexts that the student reached on {count(contexts['num_prompts'], 'prompt')}{generations}."
    )
    random = document["vocabulary"]
    about = (
        f"Student {model_name(document['student'])}, teacher {model_name(document['teacher'])}; {KL['reverse']} is "
        f"{three(contexts['kl_mean'])} nats a token on average. Beside this pair: {count(random['num_contexts'], 'random context')} of "
        f"{random['vocab']} tokens, and a tree of every sequence of {document['tree']['length']} tokens, in float64. An estimator is "
        "judged by its expected gradient and by how far single draws scatter around it, both computed and not sampled, except where all "
        "parameters are said to be meant."
    )
    devices = ", ".join(dict.fromkeys(environment.get("devices", [])))
    machine = (
        f"{environment.get('machine', '')}, {count(environment['cores'], 'core')}"
        if "cores" in environment
        else None
    )
    facts = {name: environment.get(name) for name in ("opdjax", "commit", "jax", "python")}
    facts = {
        name: str(value)[:12] if name == "commit" else value for name, value in facts.items()
    } | {"on": devices, "machine": machine}
    made = ", ".join(f"{name} {value}" for name, value in facts.items() if value)
    return tag(
        "header",
        tag("h1", title),
        tag("p", lead, class_="lead"),
        tag("p", about, class_="quiet"),
        tag("p", made, class_="quiet"),
    )


# Does it point where it says?


def _directions(document: Document) -> Html:
    sources = {
        f"{model_name(document['student'])}, {document['contexts']['num_contexts']:,} contexts": document[
            "contexts"
        ]["rows"],
        f"{document['vocabulary']['num_contexts']:,} random contexts": document["vocabulary"][
            "rows"
        ],
    }
    views = {
        view: join((_angle_charts(document, rows, view), _exactness(document, rows)))
        for view, rows in sources.items()
    }
    key = swatches(
        [
            ("recipe", drawn.dot(is_pitfall=False)),
            ("pitfall", drawn.dot(is_pitfall=True)),
            ("where it says it points", drawn.ring()),
        ]
    )
    words = {
        "angle": "between the estimator's expected gradient and the exact one, all contexts as one long vector; 90° is unrelated",
        "bias": "length of the difference between the two, over the length of the exact one; it sees the size too",
        "noise / signal": "spread of one draw a context over the length of the expected gradient",
        "worse": "share of contexts where one draw scatters more than one of opd",
    }
    return section(
        "direction",
        "Does it point where it says?",
        told(direction_sentence(document)),
        key,
        tabs("direction-of", views, "measured at"),
        definitions(words),
    )


def direction_sentence(document: Document) -> str:
    """Who points where it says, and who does not."""
    rows = document["contexts"]["rows"]
    claims = [
        name for name in rows if not is_pitfall(document, name) and aim_of(document, name) in KL
    ]
    off = {name: angles_of(rows[name])[aim_of(document, name)] for name in claims}
    missed = [
        f"{short(document, name)} ({degrees(value, 'no direction')})"
        for name, value in off.items()
        if value is None or value > CLOSE
    ]
    text = f"{len(claims) - len(missed)} of {count(len(claims), 'recipe')} that promise the gradient of a KL point along it within {CLOSE:g}°"
    text += f"; {listed(missed)} {'does' if len(missed) == 1 else 'do'} not." if missed else "."
    found = [
        f"{name} {verdict(document, rows[name], aim_of(document, name))}"
        for name in rows
        if is_pitfall(document, name)
    ]
    return f"{text} Of the pitfalls, {listed(found)}." if found else text


def _angle_charts(document: Document, rows: dict[str, Any], where: str) -> Html:
    widest = max(
        [
            60.0,
            *(
                value
                for row in rows.values()
                for value in angles_of(row).values()
                if value is not None
            ),
        ]
    )
    figures = []
    for direction in KL:
        groups: dict[str, list[Entry]] = {
            f"Recipes for {KL['reverse']}": [],
            f"Recipes for {KL['forward']}": [],
            "Recipes with an aim of their own": [],
            f"Pitfalls, taken for {KL['reverse']}": [],
            "No direction: the expected gradient is 0": [],
        }
        reverse, forward, own, pitfalls, lost = groups.values()
        # One order for both charts, so that a row of one is that of the other.
        for name, row in sorted(
            rows.items(), key=lambda item: round(angles_of(item[1])["reverse"] or 0.0, 1)
        ):
            value, aim, is_bad = (
                angles_of(row)[direction],
                aim_of(document, name),
                is_pitfall(document, name),
            )
            entry = Entry(
                short(document, name),
                is_bad,
                value,
                is_target=aim == direction,
                text=degrees(value, ""),
                note="no direction" if value is None else "",
            )
            (
                lost
                if is_lost(row)
                else pitfalls
                if is_bad
                else {"reverse": reverse, "forward": forward}.get(aim, own)
            ).append(entry)
        shown_groups = [(heading, found) for heading, found in groups.items() if found]
        figures.append(
            drawn.angles(
                f"Angle to the gradient of {KL[direction]}",
                "degrees; 0° is exact",
                shown_groups,
                widest=widest,
                where=where,
            )
        )
    return tag("div", *figures, class_="figures large")


def _exactness(document: Document, rows: dict[str, Any]) -> Html:
    head = ["estimator", tag("th", "promises", class_="text", scope="col")]
    head += [
        f"{what}, {which}" for what in ("cosine", "bias") for which in ("KL(s || t)", "KL(t || s)")
    ]
    head += ["noise / signal", "variance / opd", "worse"]
    lines = []
    for name, row in rows.items():
        aim = tag("td", KL.get(aim_of(document, name), "own"), class_="text")
        cosines = [
            "none" if row["cosine"][d] is None else f"{row['cosine'][d]:.4f}".replace("-", "−")
            for d in KL
        ]
        noise = "no signal" if row["noise_to_signal"] is None else three(row["noise_to_signal"])
        ratios = ratio(row["variance_ratio"], row.get("variance_ratio_interval"))
        lines.append(
            [
                named(document, name),
                aim,
                *cosines,
                *(percent(row["bias"][d]) for d in KL),
                noise,
                ratios,
                percent(row["worse"]),
            ]
        )
    return details(
        f"Table: cosine, bias and variance of all {len(lines)}", table(head, lines, class_="dense")
    )


# How noisy is it?


def _noise(document: Document) -> Html:
    figures = [_variance_chart(document)]
    key = [("recipe", drawn.dot(is_pitfall=False)), ("pitfall", drawn.dot(is_pitfall=True))]
    rest: list[Html] = []
    if "gradients" in document:
        found = document["gradients"]
        figures.append(_stack_chart(document))
        words = {
            "prompt": "between prompts",
            "trajectory": "between answers to a prompt",
            "action": "between redraws of every token",
        }
        key += [
            *((f"noise {words[part]}", drawn.part_box(part)) for part in drawn.PARTS),
            ("all noise", drawn.bar()),
        ]
        note = (
            f"Parameters: gradient of one rollout, split by an analysis of variance with {count(found['num_redraws'], 'redraw')} of every "
            "token. Where a recipe couples the tokens of a sequence, its action noise is inside that of trajectories. Parts estimated "
            f"below 0 are drawn as 0, counted in all noise, and stand in the table as they are. s/n: signal over noise of a batch of "
            f"{found['batch']} rollouts."
        )
        rest = [
            tag("p", note, class_="quiet"),
            details("Table: signal, noise and its parts", _gradient_table(document)),
        ]
    else:
        rest = [notice("The gradients of all parameters were not measured (how.parameter_space).")]
    note = (
        "Logits: variance of one draw a context, as a multiple of opd's, with its 95 % bootstrap interval over prompts. Less is worth "
        "something only at the same expected gradient. Exact divergences draw no token and have none."
    )
    charts = tag("div", *figures, class_="figures large")
    return section(
        "noise",
        "How noisy is it?",
        told(noise_sentence(document)),
        swatches(key),
        charts,
        tag("p", note, class_="quiet"),
        *rest,
    )


def _kind(document: Document, name: str) -> str:
    row = document["contexts"]["rows"].get(name)
    if is_pitfall(document, name):
        return "Pitfalls"
    if row is None:
        return "Tokens of a sequence coupled"
    bias = row["bias"]["reverse"]
    return _SAME_AIM if bias is not None and bias < _SAME else "Another expected gradient"


def _grouped(document: Document, entries: dict[str, Entry], size) -> list[tuple[str, list[Entry]]]:
    """By what they estimate, each group from the quietest on."""
    first = [_SAME_AIM, "Another expected gradient", "Tokens of a sequence coupled", "Pitfalls"]
    groups: dict[str, list[Entry]] = {heading: [] for heading in first}
    for name in sorted(entries, key=size):
        groups[_kind(document, name)].append(entries[name])
    return [(heading, found) for heading, found in groups.items() if found]


def _variance_chart(document: Document) -> Html | None:
    rows = {
        name: row
        for name, row in document["contexts"]["rows"].items()
        if "by_kl" in row and is_number(row["variance_ratio"])
    }
    entries = {}
    for name, row in rows.items():
        low, high = row.get("variance_ratio_interval") or (None, None)
        value = row["variance_ratio"]
        entries[name] = Entry(
            short(document, name),
            is_pitfall(document, name),
            value,
            low,
            high,
            text=f"{three(value)}×",
        )
    groups = _grouped(document, entries, lambda name: rows[name]["variance_ratio"])
    return drawn.ratios(
        "Logits: variance of a draw, relative to opd", "times opd, logarithmic", groups
    )


def _unit(rows: dict[str, Any]) -> float | None:
    """The noise of opd, which was measured even where it was not asked for."""
    known = [
        row
        for row in rows.values()
        if is_number(row.get("noise_ratio")) and row["noise_ratio"] and is_number(row["noise"])
    ]
    unit = known[0]["noise"] / known[0]["noise_ratio"] if known else None
    return unit if unit is not None and unit > 0 else None


def _stack_chart(document: Document) -> Html | None:
    found = document["gradients"]
    rows, unit = found["rows"], _unit(found["rows"])
    entries, totals = {}, {}
    for name, row in rows.items():
        parts = tuple(max(row[part] or 0.0, 0.0) / (unit or 1.0) for part in drawn.PARTS)
        snr = row["signal_to_noise"]
        whole, text = (
            row["noise"] / (unit or 1.0),
            f"s/n {'–' if not is_number(snr) else f'{snr:.2f}' if snr else '0'}",
        )
        entries[name] = Entry(
            short(document, name), is_pitfall(document, name), whole, parts=parts, text=text
        )
        totals[name] = max(sum(parts), whole)
    widest = max(totals.values(), default=1.0) or 1.0
    limit = min(1.06 * widest, _MAX_STACK) if unit else 1.06 * widest
    label, title = (
        "times the noise of opd" if unit else "squared gradient",
        f"Parameters: noise of one rollout (s/n: of {found['batch']})",
    )
    groups = _grouped(document, entries, lambda name: rows[name]["noise"])
    return drawn.stacks(title, label, groups, limit=limit, unit="×" if unit else "")


def noise_sentence(document: Document) -> str:
    """The quietest and the noisiest of those that estimate the same, and what part of the noise
    they can change at all.
    """
    same = [
        (row["variance_ratio"], name)
        for name, row in document["contexts"]["rows"].items()
        if "by_kl" in row
        and is_number(row["variance_ratio"])
        and _kind(document, name).startswith(_SAME_AIM)
        and not document["subjects"].get(name, {}).get("options", {}).get("extra_draws")
    ]
    others = [pair for pair in same if pair[1] != "opd"]
    sentences = []
    if others:
        (low, best), (high, worst) = min(others), max(others)
        interval = document["contexts"]["rows"][best].get("variance_ratio_interval")
        text = "Of the recipes that draw one token a context and have opd's expected gradient, "
        text += f"{short(document, best)} scatters least in logits: {ratio(low, interval)} times opd's variance"
        sentences.append(
            text
            + (f"; {short(document, worst)} most: {three(high)} times." if worst != best else ".")
        )
    plain = document.get("gradients", {}).get("rows", {}).get("opd")
    if plain is not None:
        parts = {part: max(plain[part] or 0.0, 0.0) for part in drawn.PARTS}
        whole = sum(parts.values())
        if whole and plain["action"] is not None:
            split = {part: f"{size / whole:.0%}".replace("%", " %") for part, size in parts.items()}
            sentences.append(
                f"In the gradient of all parameters the drawn tokens make up {split['action']} of opd's noise, which is all that a "
                f"baseline can lower; trajectories {split['trajectory']}, prompts {split['prompt']}"
                + (
                    " (a part estimated below 0 counts as 0)."
                    if min(plain[part] or 0.0 for part in drawn.PARTS) < 0
                    else "."
                )
            )
    return " ".join(sentences) or "No two recipes with the same expected gradient were measured."


def _gradient_table(document: Document) -> Html:
    found = document["gradients"]
    head = [
        "estimator",
        "signal",
        "noise",
        "of prompts",
        "of trajectories",
        "of actions",
        "signal / noise",
        "noise / opd",
    ]
    head.append("actions / opd (95 %)")
    rows = []
    for name, row in found["rows"].items():
        is_zero = lambda value: is_number(value) and abs(value) < EXACT * abs(row["noise"])  # noqa: B023
        cells = [
            "0" if is_zero(row[part]) else number(row[part])
            for part in ("signal", "noise", *drawn.PARTS)
        ]
        action, *interval = row.get("action_ratio") or (None, None, None)
        noise = [
            three(row[key]) if is_number(row.get(key)) else "–"
            for key in ("signal_to_noise", "noise_ratio")
        ]
        rows.append([named(document, name), *cells, *noise, ratio(action, interval)])
    return table(head, rows, class_="dense")


# Credit and stale data


def _tree(document: Document) -> Html:
    found = document["tree"]
    groups: dict[str, list[dict[str, Any]]] = {
        "One sequence a batch": [],
        "Two sequences a batch": [],
        "Stale data": [],
    }
    for row in found["rows"]:
        kind = (
            "Stale data"
            if row["title"].startswith("stale")
            else "Two sequences a batch"
            if row["title"].startswith("two")
            else None
        )
        groups[kind or "One sequence a batch"].append(row)
    lines: list[Any] = []
    for heading, rows in groups.items():
        if rows:
            lines.append(
                tag("tr", tag("th", heading, scope="rowgroup", colspan=6), class_="section")
            )
        for row in rows:
            biases = (
                _bias(row[name], "0" if name == "baseline" else "exact")
                for name in ("frozen", "sequence", "baseline")
            )
            lines.append(
                [
                    row["title"],
                    *biases,
                    number(row["variance"]),
                    tag("td", tag("code", row["name"]), class_="wrap text"),
                ]
            )
    head = [
        "case",
        "bias, contexts held fixed",
        "bias, sequence KL",
        "added by the baseline",
        "variance / signal²",
    ]
    caption = (
        f"Every sequence of {found['length']} tokens over {found['vocab']} ids, in float64: relative bias of the expected gradient against "
        "that of the summed KL with the distribution of contexts held fixed, and against that of the KL of whole sequences. Under a batch "
        "mean the size is fitted and the direction judged."
    )
    box = table(
        [*head, tag("th", "recipe", class_="text", scope="col")],
        lines,
        caption=caption,
        class_="dense",
    )
    return section("tree", "Credit and stale data", told(tree_sentence(found["rows"])), box)


def _bias(value: float | None, nothing: str) -> Html:
    if is_number(value) and abs(value) < EXACT:
        return tag("td", nothing, class_="exact")
    return tag("td", percent(value))


def tree_sentence(rows: list[dict[str, Any]]) -> str:
    """How many cases have an exact gradient, and how wrong the others are."""
    off = {row["title"]: min(row["frozen"], row["sequence"]) for row in rows}
    exact = sum(value < EXACT for value in off.values())
    text = f"{exact} of {count(len(rows), 'case')} have one of the two exact gradients on average"
    worst = max(off, key=off.get)
    if off[worst] >= EXACT:
        text += f"; the farthest from both is “{worst}” ({percent(off[worst])})"
    added = {row["title"]: row["baseline"] for row in rows if is_number(row["baseline"])}
    moved = {title: value for title, value in added.items() if value >= EXACT}
    if moved:
        most = max(moved, key=moved.get)
        text += f". A baseline changes the expectation in {len(moved)} of {len(added)} cases, most in “{most}” ({percent(moved[most])})"
    return text + "."


# What it costs


def _costs(document: Document) -> Html | None:
    rows = document.get("costs") or {}
    if not rows:
        return None
    plain = rows.get("opd", {})
    figures, relative = (
        [],
        {
            name: {key: _over(row.get(key), plain.get(key)) for key, *_ in _COSTS}
            for name, row in rows.items()
        },
    )
    for key, title, unit, scale in _COSTS:
        known = {name: row[key] for name, row in rows.items() if is_number(row.get(key))}
        if not known or not is_number(plain.get(key)) or _is_even(known):
            continue
        entries = [
            Entry(
                short(document, name),
                value=relative[name][key],
                text=f"{three(scale * known[name])} {unit}",
            )
            for name in sorted(known, key=known.get)
        ]
        figures.append(
            drawn.ratios(f"{title}, relative to opd", "times opd, logarithmic", [("", entries)])
        )
    head = [
        "recipe",
        *(cell for _, title, unit, _ in _COSTS for cell in (f"{title}, {unit}", "over opd")),
    ]
    lines = [
        [
            named(document, name),
            *(
                cell
                for key, _, _, scale in _COSTS
                for cell in (_scaled(row.get(key), scale), ratio(relative[name][key]))
            ),
        ]
        for name, row in rows.items()
    ]
    note = (
        "What differs between recipes: from hidden states to the loss and its gradients for hidden states and head, the teacher's "
        "log-probs included. The layers of both models below that are left out. Time: median of alternating runs on the machine named "
        "above. Memory: the largest working memory of the compiled program over the tokens."
    )
    charts = tag("div", *figures, class_="figures large") if figures else None
    box = details("Table: seconds and bytes", table(head, lines, class_="dense"), open=not figures)
    return section(
        "costs",
        "What it costs",
        told(cost_sentence(document)),
        charts,
        tag("p", note, class_="quiet"),
        box,
    )


_COSTS = (
    ("seconds_per_token", "Time a token", "µs", 1e6),
    ("bytes_per_token", "Memory a token", "kB", 1e-3),
)


def _scaled(value: float | None, scale: float) -> str:
    return three(scale * value) if is_number(value) else "–"


def _is_even(known: dict[str, float]) -> bool:
    """Whether there is nothing to compare."""
    return max(known.values()) <= 1.01 * min(known.values())


def _over(value: float | None, plain: float | None) -> float | None:
    return value / plain if is_number(value) and is_number(plain) and plain else None


def cost_sentence(document: Document) -> str:
    """The cheapest and the dearest, in time and in memory."""
    parts = []
    for key, title, unit, scale in _COSTS:
        known = {
            name: row[key] for name, row in document["costs"].items() if is_number(row.get(key))
        }
        if known and _is_even(known):
            parts.append(
                f"{title} is {three(scale * statistics.median(known.values()))} {unit} for all."
            )
        elif known:
            ends = []
            for name in (min(known, key=known.get), max(known, key=known.get)):
                over = _over(known[name], document["costs"].get("opd", {}).get(key))
                times = "" if over is None or name == "opd" else f", {three(over)} times opd"
                ends.append(f"{three(scale * known[name])} {unit} ({short(document, name)}{times})")
            parts.append(f"{title} goes from {ends[0]} to {ends[1]}.")
    return " ".join(parts) or "No costs were measured."
