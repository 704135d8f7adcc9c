"""Accuracy against cost: a dot per arm, and the Pareto front over seconds or tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from opdjax.report import measures
from opdjax.report.markup import (
    Html,
    amount,
    count,
    definitions,
    details,
    plus_minus,
    section,
    table,
    table_row,
    tabs,
    tag,
    text_head,
)
from opdjax.report.ranking import Interval, Ranked, final, label
from opdjax.report.scatter import Mark, scatter
from opdjax.runs.results import Run

_AXES = {
    "seconds": "training time without evaluations; it depends on the machine and its load",
    "generated tokens": "tokens that the student sampled in training",
    "trained tokens": "tokens that carried a gradient",
    "teacher tokens": "tokens that the teacher read or wrote during training, without a judge's",
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """An arm's score and cost, each with its interval over seeds."""

    entry: Ranked
    score: Interval
    spent: Interval


def costs(entries: Sequence[Ranked], axis: str) -> list[Cost]:
    """The costs of all arms that have a score and recorded this cost."""
    found = []
    for entry in entries:
        score = entry.over_seeds(final("avg@k"))
        spent = entry.over_seeds(lambda run: _spent(run, axis))
        if score is not None and spent is not None:
            found.append(Cost(entry, score, spent))
    return found


def _spent(run: Run, axis: str) -> float | None:
    if axis == "seconds" and run.seconds is not None:
        return run.seconds
    return measures.total(run, axis)


def front(points: Sequence[Cost]) -> list[Cost]:
    """The points that no other beats in one of cost and score and equals in the other, by rising
    cost.
    """

    def is_beaten(one: Cost) -> bool:
        place = one.spent[0], one.score[0]
        return any(
            other.spent[0] <= place[0]
            and other.score[0] >= place[1]
            and (other.spent[0], other.score[0]) != place
            for other in points
        )

    return sorted((one for one in points if not is_beaten(one)), key=lambda one: one.spent[0])


def pareto_section(entries: Sequence[Ranked], k: int | None) -> Html | None:
    """A chart per cost, in tabs; None if fewer than two arms have a score."""
    views = {}
    for axis in _AXES:
        found = costs(entries, axis)
        if len(found) > 1 and any(one.spent[0] > 0 for one in found):
            views[axis] = _view(found, axis, k)
    if not views:
        return None
    score = measures.score_label("avg@k", k)
    about = (
        f"A dot per arm: up is better ({score} after training), left is cheaper. The line is the "
        "front: no other arm beats the arms on it (filled, named) in both. Bars are 95 % intervals "
        "over seeds; the front goes through means, so arms with overlapping bars may swap with "
        "other seeds. Hover over a dot for its name."
    )
    words = details("What the axes count", definitions({axis: _AXES[axis] for axis in views}))
    return section(
        "pareto",
        "Accuracy against cost",
        tag("p", about, class_="quiet"),
        tabs("pareto", views, "Cost"),
        words,
    )


def _view(found: Sequence[Cost], axis: str, k: int | None) -> Html:
    best = front(found)
    cheapest, dearest = (pick(one.spent[0] for one in found) for pick in (min, max))
    is_log = cheapest > 0 and dearest > 5 * cheapest
    marks = [
        Mark(one.spent, one.score, label(one.entry), _title(one, axis), is_best=one in best)
        for one in found
    ]
    score, arms = measures.score_label("avg@k", k), count(len(found), "arm")
    names = ", ".join(label(one.entry) for one in best)
    drawn = scatter(
        marks,
        x_label=f"{axis}{' (logarithmic scale)' if is_log else ''}",
        y_label=f"{score} after training",
        is_log=is_log,
        described=f"{score} after training against {axis}, {arms}; on the front: {names}",
    )
    return tag(
        "div",
        tag("figure", drawn, class_="wide"),
        tag("p", "On the front, the cheapest first: ", tag("strong", names), "."),
        details(f"All {arms} in numbers", _numbers(found, best, axis, score)),
    )


def _title(one: Cost, axis: str) -> str:
    return f"{label(one.entry)}: {plus_minus(*one.score)}, {amount(*one.spent)} {axis}"


def _numbers(found: Sequence[Cost], best: Sequence[Cost], axis: str, score: str) -> Html:
    head = ["arm", score, axis, "seeds", text_head("front")]
    rows = [
        table_row(
            [
                label(one.entry),
                plus_minus(*one.score),
                amount(*one.spent),
                str(len(one.entry.runs)),
                tag("td", "on the front" if one in best else "", class_="text"),
            ]
        )
        for one in sorted(found, key=lambda one: one.spent[0])
    ]
    return table(head, rows, class_="dense")
