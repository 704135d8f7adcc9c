"""Differences between the settings of a sweep's arms, and between two runs."""

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
    listed,
    notice,
    plus_minus,
    section,
    shown,
    table,
    table_row,
    tag,
    text_head,
)
from opdjax.report.ranking import Ranked, distinct, label
from opdjax.runs.results import Run, is_number
from opdjax.runs.statistics import seed_interval

_ARMS = 3  # named one by one; more are counted


def differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """field -> arm -> value, for the fields in which arms differ."""
    names = dict.fromkeys(name for values in settings.values() for name in values)
    found = {name: {arm: values.get(name) for arm, values in settings.items()} for name in names}
    return {
        name: values
        for name, values in found.items()
        if len({json.dumps(value) for value in values.values()}) > 1
    }


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by dotted field under today's names, without the seed."""
    settings = measures.leaves(upgrade(dict(config)))
    settings.pop("seed")
    return settings


def arms_differ_section(entries: Sequence[Ranked]) -> Html | None:
    """The fields in which arms differ, with each arm's value; None if there is one arm."""
    names = distinct([label(entry) for entry in entries])
    settings = [settings_of(entry.group.points[0].config) for entry in entries]
    found = differing(dict(zip(names, settings)))
    if not found:
        return None
    head = [text_head(name) for name in ("setting", "most arms", "the others")]
    rows = [_field_row(name, values) for name, values in found.items()]
    note = (
        f"{count(len(found), 'setting')} differ between {count(len(names), 'arm')}; all others "
        "(see the end) are the same."
    )
    matrix = table(
        ["setting", *map(text_head, names)],
        [
            [name, *(tag("td", _value(value), class_="text") for value in values.values())]
            for name, values in found.items()
        ],
        class_="dense pinned",
    )
    return section(
        "arms",
        "How the arms differ",
        tag("p", note, class_="quiet"),
        table(head, rows, class_="words dense"),
        details("Every arm's values", matrix),
    )


def _field_row(name: str, values: Mapping[str, Any]) -> Html:
    arms: dict[str, list[str]] = {}
    for arm, value in values.items():
        arms.setdefault(_value(value), []).append(arm)
    (most, same), *others = sorted(arms.items(), key=lambda each: -len(each[1]))
    who = f" ({count(len(same), 'arm')})" if len(same) > _ARMS else f": {', '.join(same)}"
    rest = [tag("div", tag("b", value), f": {', '.join(named)}") for value, named in others]
    return table_row([name, tag("td", tag("b", most), who), tag("td", *rest)])


def _value(value: Any) -> str:
    return shown(value) or "(empty)"


# Two runs


def against_page(run: Run, other: Run, names: tuple[str, str]) -> tuple[str, list[Html | None]]:
    """(title, parts of the page) of the differences between two runs."""
    title = f"{names[0]} against {names[1]}"
    about = "Two runs side by side: settings, data, machine and scores."
    configs = settings_of(run.config), settings_of(other.config)
    num_differing = len(differing(dict(zip("ab", configs))))
    lead = "Their settings are the same."
    if num_differing:
        lead = f"They differ in {count(num_differing, 'setting')}."
    seeds = [each.config["seed"] for each in (run, other)]
    seed = f"{seeds[0]} in both" if seeds[0] == seeds[1] else f"{seeds[0]} against {seeds[1]}"
    digests = "Digests: equal digests mean the same prompts or weights."
    header = tag(
        "header",
        tag("h1", title),
        tag("p", lead, class_="lead"),
        tag("p", about, class_="quiet"),
        *_warnings(run, other),
    )
    return title, [
        header,
        _scores(run, other, names),
        _facts("settings", "Settings", *configs, names, f"The seed: {seed}."),
        _facts("data", "Data and models", run.data, other.data, names, digests),
        _facts("environment", "Environment", run.environment, other.environment, names, None),
    ]


def _warnings(run: Run, other: Run) -> list[Html]:
    texts = [
        f"{each.workdir.name} is not finished: it has no final scores."
        for each in (run, other)
        if each.result is None
    ]
    evaluated = [each.data.get("evaluation") for each in (run, other)]
    without = [each.workdir.name for each, digest in zip((run, other), evaluated) if digest is None]
    if without:
        texts.append(f"{listed(without)} had no evaluation: there are no scores to compare.")
    elif evaluated[0] != evaluated[1]:
        texts.append("They were evaluated on different prompts: their scores do not compare.")
    return [notice(text, kind="warning") for text in texts]


def _scores(run: Run, other: Run, names: tuple[str, str]) -> Html | None:
    rows = []
    for moment in ("before", "after"):
        one, two = ((each.result or {}).get(f"eval_{moment}", {}) for each in (run, other))
        for score in measures.SCORES:
            cells = [plus_minus(row.get(score), row.get(f"{score}_interval")) for row in (one, two)]
            if cells != ["–", "–"]:
                paired = _paired(run, other, one, two, score)
                rows.append([f"{score} {moment} training", *cells, paired])
    spent = {"seconds": (run.seconds, other.seconds)}
    for axis in ("generated tokens", "trained tokens", "teacher tokens"):
        spent[axis] = measures.total(run, axis), measures.total(other, axis)
    rows += [
        [name, *map(shown, values), ""]
        for name, values in spent.items()
        if all(map(is_number, values))
    ]
    if not rows:
        return None
    caption = (
        "± is half a 95 % interval over prompts; it says nothing about other seeds. The difference "
        "is paired by prompt, if both runs answered the same ones."
    )
    head = ["", *names, "difference"]
    return section("scores", "Scores and cost", table(head, rows, caption=caption))


_HITS = {"avg@k": "per_prompt", "greedy": "per_prompt_greedy"}


def _paired(
    run: Run, other: Run, one: Mapping[str, Any], two: Mapping[str, Any], score: str
) -> str:
    """The first run's score minus the second's, paired by prompt."""
    first, second = (row.get(_HITS.get(score, ""), []) for row in (one, two))
    is_same = run.data.get("evaluation") == other.data.get("evaluation")
    if not is_same or one.get("n") != two.get("n") or not first or len(first) != len(second):
        return ""
    trials = one["n"] if score == "avg@k" else 1
    return plus_minus(
        *seed_interval([(a - b) / trials for a, b in zip(first, second)]), signed=True
    )


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
    same = f"{len(one.keys() | two.keys()) - len(found)} are the same in both."
    return section(
        anchor,
        title,
        table(["", *names], rows, class_="words") if rows else None,
        tag("p", same, f" {note}" if note else None, class_="quiet"),
    )
