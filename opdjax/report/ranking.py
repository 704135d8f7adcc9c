"""The groups of a sweep with their finished runs, ordered by score. Only the seeds of one group are
averaged.
"""

from __future__ import annotations

import dataclasses
import math
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
    """A group and its finished runs."""

    group: SeedGroup
    runs: tuple[Run, ...]
    settings: dict[str, str]  # overrides in which groups differ: shown name -> shown value
    slot: int = REST  # colour in every chart; REST if there are more groups than colours
    is_reference: bool = False  # scores the teacher itself among students: a ceiling, not an arm

    def over_seeds(self, value: Callable[[Run], float | None]) -> Interval | None:
        """Mean and half width of the 95 % interval of a number of the runs; None if none has it."""
        return interval(value(run) for run in self.runs)


def interval(values: Iterable[float | None]) -> Interval | None:
    """`seed_interval` of the finite values; None if there are none."""
    known = [float(value) for value in values if is_number(value)]
    return seed_interval(known) if known else None


def ranked(points: list[Point]) -> list[Ranked]:
    """All groups: by falling avg@k, then those without a finished run, then those that score the
    teacher itself.
    """
    groups = seed_groups(points)
    names = differing_overrides([group.overrides for group in groups])
    students = {group.points[0].config["student"]["path"] for group in groups}
    found = []
    for group in groups:
        overrides = group.overrides
        settings = {
            name: shown_override(overrides[field])
            for field, name in names.items()
            if field in overrides
        }
        runs = tuple(read_run(point.workdir) for point in group.done)
        is_reference = len(students) > 1 and _scores_teacher(group)
        found.append(Ranked(group, runs, settings, is_reference=is_reference))
    found.sort(key=lambda entry: -(entry.over_seeds(final("avg@k")) or (-math.inf,))[0])
    arms = [entry for entry in found if not entry.is_reference]
    return [*coloured(arms), *(entry for entry in found if entry.is_reference)]


def _scores_teacher(group: SeedGroup) -> bool:
    config = upgrade(group.points[0].config)
    return config["student"]["path"] == config["teacher"]["path"]


def coloured(entries: Sequence[Ranked]) -> list[Ranked]:
    """The entries with a colour each; if there are too many, only the first have one."""
    finished = [entry for entry in entries if entry.runs]
    first = finished if len(finished) <= SERIES else finished[: SERIES - 1]
    slots = {id(entry): slot for slot, entry in enumerate(first)}
    return [dataclasses.replace(entry, slot=slots.get(id(entry), REST)) for entry in entries]


def final(score: str) -> Callable[[Run], float | None]:
    """A function that returns a run's score after training."""
    return lambda run: run.score(score)


def score_before(entries: list[Ranked], score: str) -> float | None:
    """The untrained student's score; None if runs differ in it."""
    runs = (run for entry in entries if not entry.is_reference for run in entry.runs)
    found = {(run.result or {}).get("eval_before", {}).get(score) for run in runs}
    return found.pop() if len(found) == 1 else None


def common_k(entries: list[Ranked]) -> int | None:
    """The k of avg@k; None if runs differ in it."""
    found = {measures.samples_per_prompt(run) for entry in entries for run in entry.runs} - {None}
    return found.pop() if len(found) == 1 else None


def comparison_notices(entries: list[Ranked]) -> list[tuple[str, str]]:
    """(kind of notice, text) for each difference that makes finished runs hard to compare."""
    runs = [run for entry in entries for run in entry.runs]
    parts = {"prompts": "data", "evaluation": "evaluation", "student": "student"}
    found = []
    for digest, part in (parts | {"teacher": "teacher"}).items():
        digests: dict[str, set] = {}
        for run in runs:
            if run.data.get(digest) is not None:  # a run without a teacher has no digest of one
                digests.setdefault(repr(run.config.get(part)), set()).add(run.data[digest])
        if any(len(same) > 1 for same in digests.values()):
            text = (
                f"The {digest} digest differs between points with the same {part} settings: their "
                "files changed in between."
            )
            found.append(("warning", text))
    if len({repr(_score_settings(run)) for run in runs}) > 1:
        text = (
            "The points were evaluated with different settings: compare scores only where these "
            "are the same."
        )
        found.append(("warning", text))
    mixed = [
        fact
        for fact in ("opdjax", "commit", "jax")
        if len({repr(run.environment.get(fact)) for run in runs}) > 1
    ]
    if mixed:
        text = f"The points were run under different versions ({', '.join(mixed)})."
        found.append(("note", text))
    return found


def _score_settings(run: Run) -> dict[str, Any]:
    """The evaluation settings that final scores depend on."""
    evaluation = upgrade(run.config)["evaluation"]
    return {name: value for name, value in evaluation.items() if name != "every"}


def label(entry: Ranked, *left_out: str) -> str:
    """The group's name: the settings in which it differs from others."""
    kept = [
        value if name == "arm" else f"{name} {value}"
        for name, value in entry.settings.items()
        if name.rpartition(".")[2] not in left_out
    ]
    return ", ".join(kept) or "base"


def distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered by position where several are equal: overrides may not tell groups
    apart.
    """
    return [f"{name} ({at})" if names.count(name) > 1 else name for at, name in enumerate(names, 1)]


def differing_overrides(overrides: list[dict[str, Any]]) -> dict[str, str]:
    """The overrides in which groups differ, each with its shown name; all overrides if there is one
    group.
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
    """Settings without their section, where that is unique."""
    fields = [name.rpartition(".")[2] for name in names]
    return [field if fields.count(field) == 1 else name for name, field in zip(names, fields)]


def shown_override(value: Any) -> str:
    """The override in the form in which `shown` writes a setting; sweeps store it as text."""
    if not isinstance(value, str) or value.isdecimal():
        return shown(value)
    try:
        return shown(float(value)) if is_number(float(value)) else value
    except ValueError:
        return value
