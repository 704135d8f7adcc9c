"""What accuracy costs: one point an arm, against seconds and tokens, and the front that no other
arm beats on both.
"""

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
)
from opdjax.report.ranking import Interval, Ranked, final, label
from opdjax.report.scatter import Mark, scatter
from opdjax.runs.results import Run

_AXES = {
    "seconds": "of training, evaluations not counted, on the machine of the run: another machine, or other work beside it, changes them",
    "generated tokens": "tokens that the student sampled in training",
    "trained tokens": "tokens that carried a gradient",
    "teacher tokens": "tokens that the teacher read or wrote while the student was trained (tokens of a judge are not among them)",
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """An arm's score and what it took, each with its interval over seeds."""

    entry: Ranked
    score: Interval
    spent: Interval


def costs(entries: Sequence[Ranked], axis: str) -> list[Cost]:
    """Of every arm that has finished runs with a score, and that recorded this cost."""
    found = []
    for entry in entries:
        score, spent = (
            entry.over_seeds(final("avg@k")),
            entry.over_seeds(lambda run: _spent(run, axis)),
        )
        if score is not None and spent is not None:
            found.append(Cost(entry, score, spent))
    return found


def _spent(run: Run, axis: str) -> float | None:
    return (
        run.seconds if axis == "seconds" and run.seconds is not None else measures.total(run, axis)
    )


def front(points: Sequence[Cost]) -> list[Cost]:
    """Those that no other one beats: as cheap and better, or as good and cheaper. By rising cost."""

    def is_beaten(one: Cost) -> bool:
        at_most = (
            other
            for other in points
            if other.spent[0] <= one.spent[0] and other.score[0] >= one.score[0]
        )
        return any(
            (other.spent[0], other.score[0]) != (one.spent[0], one.score[0]) for other in at_most
        )

    return sorted((one for one in points if not is_beaten(one)), key=lambda one: one.spent[0])


def pareto_section(entries: Sequence[Ranked], k: int | None) -> Html | None:
    """A chart a cost, in tabs; None where fewer than two arms have a score."""
    views = {}
    for axis in _AXES:
        found = costs(entries, axis)
        if len(found) > 1 and any(one.spent[0] > 0 for one in found):
            views[axis] = _view(found, axis, k)
    if not views:
        return None
    score = measures.score_label("avg@k", k)
    about = (
        f"Each dot is an arm: up is better ({score} after training), left is cheaper. The line is the front: arms on it, filled and named, "
        "are beaten by no other arm on both. Bars are 95 % intervals over seeds; a front is drawn through means, so that arms whose bars "
        "overlap may change places with other seeds. Point at a dot to see its name."
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
    positive = [one.spent[0] for one in found if one.spent[0] > 0]
    is_log = len(positive) == len(found) and max(positive) > 5 * min(positive)
    marks = [
        Mark(one.spent, one.score, label(one.entry), _told(one, axis), is_best=one in best)
        for one in found
    ]
    score = measures.score_label("avg@k", k)
    names = ", ".join(label(one.entry) for one in best)
    drawn = scatter(
        marks,
        x_label=f"{axis}{' (logarithmic scale)' if is_log else ''}",
        y_label=f"{score} after training",
        is_log=is_log,
        described=f"{score} after training against {axis}, {count(len(found), 'arm')}; on the front: {names}",
    )
    told = tag("p", "On the front, the cheapest first: ", tag("strong", names), ".")
    every = details(
        f"All {count(len(found), 'arm')} in numbers", _numbers(found, best, axis, score)
    )
    return tag("div", tag("figure", drawn, class_="wide"), told, every)


def _told(one: Cost, axis: str) -> str:
    return f"{label(one.entry)}: {plus_minus(*one.score)}, {amount(*one.spent)} {axis}"


def _numbers(found: Sequence[Cost], best: Sequence[Cost], axis: str, score: str) -> Html:
    head = ["arm", score, axis, "seeds", tag("th", "front", class_="text", scope="col")]
    ordered = sorted(found, key=lambda one: one.spent[0])
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
        for one in ordered
    ]
    return table(head, rows, class_="dense")
