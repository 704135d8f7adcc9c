"""The groups of a sweep with their finished runs, in order of their score. Only seeds of one group
are ever averaged.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from opdjax.config.saved import upgrade
from opdjax.report import measures
from opdjax.report.charts import REST, SERIES
from opdjax.report.markup import shown
from opdjax.runs.results import Point, Run, SeedGroup, is_number, read_run, seed_groups
from opdjax.runs.statistics import seed_interval

Interval = tuple[float, float]  # mean over seeds, half width of its 95 % interval


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A group and its finished runs; `slot` is its colour in every chart, REST where there are too
    many groups for colours.
    """

    group: SeedGroup
    runs: tuple[Run, ...]
    settings: dict[str, str]  # the overrides that tell it from other seed_groups, as they are shown
    slot: int = REST
    is_reference: bool = False  # measures the teacher itself among students: a ceiling, not an arm

    def over_seeds(self, value: Callable[[Run], float | None]) -> Interval | None:
        """Mean and half width of the 95 % interval over seeds of what the runs have; None where
        none has it.
        """
        return interval(value(run) for run in self.runs)


def interval(values: Iterable[float | None]) -> Interval | None:
    """`seed_interval` of the values that are known."""
    known = [float(value) for value in values if is_number(value)]
    return seed_interval(known) if known else None


def ranked(points: list[Point]) -> list[Ranked]:
    """All seed_groups, the best avg@k first, those without a finished run after them, and last what
    measures the teacher itself.
    """
    together = seed_groups(points)
    names = telling([group.overrides for group in together])
    found = [
        Ranked(
            group,
            tuple(read_run(point.workdir) for point in group.done),
            {
                shown_as: override(group.overrides[name])
                for name, shown_as in names.items()
                if name in group.overrides
            },
        )
        for group in together
    ]
    found.sort(
        key=lambda entry: (
            -entry.over_seeds(final("avg@k"))[0] if entry.over_seeds(final("avg@k")) else math.inf
        )
    )
    students = {group.points[0].config["student"]["path"] for group in together}
    found = [
        dataclasses.replace(entry, is_reference=len(students) > 1 and _is_of_teacher(entry.group))
        for entry in found
    ]
    return [
        *coloured([entry for entry in found if not entry.is_reference]),
        *(entry for entry in found if entry.is_reference),
    ]


def _is_of_teacher(group: SeedGroup) -> bool:
    config = upgrade(group.points[0].config)
    return config["student"]["path"] == config["teacher"]["path"]


def coloured(entries: Sequence[Ranked]) -> list[Ranked]:
    """The same with colours of their own: the first have them where there are too many for all."""
    drawn = [entry for entry in entries if entry.runs]
    first = drawn if len(drawn) <= SERIES else drawn[: SERIES - 1]
    slots = {id(entry): slot for slot, entry in enumerate(first)}
    return [dataclasses.replace(entry, slot=slots.get(id(entry), REST)) for entry in entries]


def final(score: str) -> Callable[[Run], float | None]:
    """A score after training."""
    return lambda run: run.score(score)


def before(entries: list[Ranked], score: str) -> float | None:
    """The untrained student's score where it is one and the same for all runs."""
    found = {
        (run.result or {}).get("eval_before", {}).get(score)
        for entry in entries
        if not entry.is_reference
        for run in entry.runs
    }
    return found.pop() if len(found) == 1 else None


def common_k(entries: list[Ranked]) -> int | None:
    """The k of avg@k where all runs have the same."""
    found = {measures.samples_per_prompt(run) for entry in entries for run in entry.runs} - {None}
    return found.pop() if len(found) == 1 else None


def not_comparable(entries: list[Ranked]) -> list[tuple[str, str]]:
    """(kind of notice, text): what differs between finished runs although they stand side by side."""
    runs = [run for entry in entries for run in entry.runs]
    found = []
    for digest, part in (
        ("prompts", "data"),
        ("evaluation", "evaluation"),
        ("student", "student"),
        ("teacher", "teacher"),
    ):
        seen: dict[str, set] = {}
        for run in runs:
            if run.data.get(digest) is not None:  # a run that loads no teacher has no digest of one
                seen.setdefault(repr(run.config.get(part)), set()).add(run.data[digest])
        if any(len(digests) > 1 for digests in seen.values()):
            found.append(
                (
                    "warning",
                    f"The {digest} digest differs between points with the same {part} settings: their files changed in between.",
                )
            )
    if len({repr(_asked(run)) for run in runs}) > 1:
        found.append(
            (
                "warning",
                "The points were evaluated with different settings: compare scores only where those are the same.",
            )
        )
    mixed = [
        fact
        for fact in ("opdjax", "commit", "jax")
        if len({repr(run.environment.get(fact)) for run in runs}) > 1
    ]
    if mixed:
        found.append(
            ("note", f"The points were run under different versions ({', '.join(mixed)}).")
        )
    return found


def _asked(run: Run) -> dict[str, Any]:
    """What the final scores depend on; neither how often they are taken nor how many rows are drawn
    at a time is of it.
    """
    evaluation = upgrade(run.config)["evaluation"]
    return {
        name: value for name, value in evaluation.items() if name not in ("every", "batch_size")
    }


def label(entry: Ranked, *left_out: str) -> str:
    """What tells a group from the others, in words."""
    told = [
        (name, value)
        for name, value in entry.settings.items()
        if name.rpartition(".")[2] not in left_out
    ]
    return (
        ", ".join(value if name == "arm" else f"{name} {value}" for name, value in told) or "base"
    )


def telling(overrides: list[dict[str, Any]]) -> dict[str, str]:
    """The overrides in which some groups differ, each with the name it is shown by; all of them
    where there is one group.
    """
    names = dict.fromkeys(name for values in overrides for name in values)
    differing = [
        name
        for name in names
        if len(overrides) == 1
        or any(values.get(name) != overrides[0].get(name) for values in overrides)
    ]
    return dict(zip(differing, short_names(differing)))


def short_names(names: list[str]) -> list[str]:
    """Settings without their section, where that is enough to tell them apart."""
    fields = [name.rpartition(".")[2] for name in names]
    return [field if fields.count(field) == 1 else name for name, field in zip(names, fields)]


def override(value: Any) -> str:
    """An override as `shown` writes a setting, though sweeps keep its name as text."""
    if not isinstance(value, str) or value.isdecimal():
        return shown(value)
    try:
        return shown(float(value)) if is_number(float(value)) else value
    except ValueError:
        return value


def mean_steps(values: list[list[float]]) -> list[float]:
    """Position by position, over runs."""
    return [statistics.fmean(at) for at in zip(*values)]
