"""In what arms of a sweep differ, and in what two runs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from opdjax.config.saved import upgrade
from opdjax.report import measures
from opdjax.report.markup import (
    Html,
    count,
    details,
    notice,
    plus_minus,
    section,
    shown,
    table,
    table_row,
    tag,
)
from opdjax.report.ranking import Ranked, label
from opdjax.runs.results import Run, is_number
from opdjax.runs.statistics import seed_interval

_ARMS = 3  # named one by one


def differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By field, by arm, the values of the fields in which arms differ."""
    names = dict.fromkeys(name for values in settings.values() for name in values)
    found = {name: {arm: values.get(name) for arm, values in settings.items()} for name in names}
    return {
        name: values
        for name, values in found.items()
        if len({json.dumps(value) for value in values.values()}) > 1
    }


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted field, as of today's fields, the seed aside."""
    return {
        name: value
        for name, value in measures.leaves(upgrade(dict(config))).items()
        if name != "seed"
    }


def arms_differ_section(entries: Sequence[Ranked]) -> Html | None:
    """The fields in which arms differ, and what each has; None where there is one arm."""
    named = _by_name(entries)
    found = differing(
        {name: settings_of(entry.group.points[0].config) for name, entry in named.items()}
    )
    if not found:
        return None
    rows = [_field_row(name, values) for name, values in found.items()]
    head = [
        tag("th", name, class_="text", scope="col")
        for name in ("setting", "most arms", "the others")
    ]
    note = f"{count(len(found), 'setting')} differ between {count(len(named), 'arm')}; all others (see the end) are the same."
    matrix = table(
        ["setting", *(tag("th", name, class_="text", scope="col") for name in named)],
        [
            [name, *(tag("td", _value(value), class_="text") for value in values.values())]
            for name, values in found.items()
        ],
        class_="dense pinned",
    )
    return section(
        "arms",
        "What the arms differ in",
        tag("p", note, class_="quiet"),
        table(head, rows, class_="words dense"),
        details("Every arm's values", matrix),
    )


def _by_name(entries: Sequence[Ranked]) -> dict[str, Ranked]:
    """Two arms may carry one name where overrides do not say all that differs; they still are two."""
    names = [label(entry) for entry in entries]
    return {
        f"{name} ({at})" if names.count(name) > 1 else name: entry
        for at, (name, entry) in enumerate(zip(names, entries), 1)
    }


def _field_row(name: str, values: Mapping[str, Any]) -> Html:
    arms: dict[str, list[str]] = {}
    for arm, value in values.items():
        arms.setdefault(_value(value), []).append(arm)
    (most, _), *others = sorted(arms.items(), key=lambda each: -len(each[1]))
    told = [tag("div", tag("b", value), f": {', '.join(who)}") for value, who in others]
    usual = tag(
        "td",
        tag("b", most),
        f" ({count(len(arms[most]), 'arm')})"
        if len(arms[most]) > _ARMS
        else f": {', '.join(arms[most])}",
    )
    return table_row([name, usual, tag("td", *told)])


def _value(value: Any) -> str:
    return shown(value) or "(empty)"


# Two runs


def against_page(run: Run, other: Run, names: tuple[str, str]) -> tuple[str, list[Html | None]]:
    """(title, parts of the page) of how two runs differ."""
    title = f"{names[0]} against {names[1]}"
    about = "Two runs side by side: what they were asked to do, on which data and machine, and what they scored."
    header = tag(
        "header",
        tag("h1", title),
        tag("p", _lead(run, other), class_="lead"),
        tag("p", about, class_="quiet"),
        *_warnings(run, other),
    )
    parts = [
        _scores(run, other, names),
        _facts(
            "settings",
            "Settings",
            settings_of(run.config),
            settings_of(other.config),
            names,
            "The seed: " + _seeds(run, other),
        ),
        _facts(
            "data",
            "Data and models",
            run.data,
            other.data,
            names,
            "Digests: the same one means the same prompts or weights.",
        ),
        _facts("environment", "Environment", run.environment, other.environment, names, None),
    ]
    return title, [header, *parts]


def _seeds(run: Run, other: Run) -> str:
    seeds = [each.config["seed"] for each in (run, other)]
    return f"{seeds[0]} in both." if seeds[0] == seeds[1] else f"{seeds[0]} against {seeds[1]}."


def _lead(run: Run, other: Run) -> str:
    found = differing({"a": settings_of(run.config), "b": settings_of(other.config)})
    return (
        f"They differ in {count(len(found), 'setting')}."
        if found
        else "Their settings are the same."
    )


def _warnings(run: Run, other: Run) -> list[Html]:
    found = []
    for each in (run, other):
        if each.result is None:
            found.append(
                notice(
                    f"{each.workdir.name} is not finished: it has no final scores.", kind="warning"
                )
            )
    if run.data.get("evaluation") != other.data.get("evaluation"):
        found.append(
            notice(
                "They answered other prompts in their evaluations: their scores do not compare.",
                kind="warning",
            )
        )
    return found


def _scores(run: Run, other: Run, names: tuple[str, str]) -> Html | None:
    rows = []
    for moment, part in (("before", "eval_before"), ("after", "eval_after")):
        one, two = ((each.result or {}).get(part, {}) for each in (run, other))
        for score in measures.SCORES:
            cells = [plus_minus(row.get(score), row.get(f"{score}_interval")) for row in (one, two)]
            if cells != ["–", "–"]:
                rows.append(
                    [f"{score} {moment} training", *cells, _paired(run, other, one, two, score)]
                )
    spent = [("seconds", run.seconds, other.seconds)] + [
        (axis, measures.total(run, axis), measures.total(other, axis)) for axis in _SPENT
    ]
    rows += [
        [name, shown(one), shown(two), ""]
        for name, one, two in spent
        if is_number(one) and is_number(two)
    ]
    if not rows:
        return None
    caption = (
        "± is half a 95 % interval over prompts, so it says nothing about other seeds. The difference is paired prompt by prompt, where "
        "both answered the same ones."
    )
    return section(
        "scores", "Scores and cost", table(["", *names, "difference"], rows, caption=caption)
    )


_SPENT = ("generated tokens", "trained tokens", "teacher tokens")
_HITS = {"avg@k": "per_prompt", "greedy": "per_prompt_greedy"}


def _paired(
    run: Run, other: Run, one: Mapping[str, Any], two: Mapping[str, Any], score: str
) -> str:
    """The first less the second, prompt by prompt."""
    hits = [row.get(_HITS.get(score, ""), []) for row in (one, two)]
    is_same = run.data.get("evaluation") == other.data.get("evaluation") and one.get(
        "n"
    ) == two.get("n")
    if not is_same or not hits[0] or len(hits[0]) != len(hits[1]):
        return ""
    trials = one["n"] if score == "avg@k" else 1
    return plus_minus(*seed_interval([(a - b) / trials for a, b in zip(*hits)]), signed=True)


def _facts(
    anchor: str,
    title: str,
    one: Mapping[str, Any],
    two: Mapping[str, Any],
    names: tuple[str, str],
    note: str | None,
) -> Html:
    found = differing({"a": one, "b": two})
    rows = [
        [name, *(tag("td", _value(value)) for value in values.values())]
        for name, values in found.items()
    ]
    same = len(one.keys() | two.keys()) - len(found)
    told = tag("p", f"{same} are the same in both.", f" {note}" if note else None, class_="quiet")
    return section(anchor, title, table(["", *names], rows, class_="words") if rows else None, told)
