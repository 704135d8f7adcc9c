"""Work directories read back, finished or not: one run, or a sweep with a directory a point. No
jax: this runs anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from opdjax.config.saved import upgrade
from opdjax.runs.statistics import benchmark_lines
from opdjax.runs.workdir import WorkdirError, read_json, read_lines, read_run_config

POINT, FAILURE, RESULT = "point.json", "failure.json", "result.json"
# What a score can be plotted against: the name, and the per-step metric that adds up to it (None:
# the step itself).
AXES = {
    "steps": None,
    "generated tokens": "perf/generated_tokens",
    "trained tokens": "perf/trained_tokens",
    "teacher tokens": "perf/teacher_tokens",
    "seconds": "time/step",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One work directory; `result` is None until the run is complete."""

    workdir: pathlib.Path
    config: dict[str, Any]
    data: dict[str, Any]  # digests of prompts and models
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    result: dict[str, Any] | None

    def total_at(self, axis: str, step: int) -> float:
        """Steps, tokens or seconds spent up to and including `step`; NaN where the run did not
        record them.
        """
        name = AXES[axis]
        if name is None:
            return step
        return float(sum(row.get(name, math.nan) for row in self.metrics if row["step"] <= step))

    def score(self, name: str) -> float | None:
        """`avg@k`, `pass@k` or `greedy` after training."""
        return (self.result or {}).get("eval_after", {}).get(name)

    @property
    def gain(self) -> float | None:
        """avg@k after less before, on the same prompts."""
        return (self.result or {}).get("paired_difference", {}).get("avg@k")

    @property
    def seconds(self) -> float | None:
        """Of training."""
        return (self.result or {}).get("seconds")

    @property
    def draws_ahead(self) -> bool:
        """Whether rollouts are drawn ahead of their update (near-policy)."""
        return self.config.get("near_policy", {}).get("schedule", "none") != "none"

    @property
    def staleness(self) -> float | None:
        """KL(student || behaviour) of what was trained on, nats a token, mean over the last ten
        steps; None where on-policy.
        """
        return self.at_the_end("staleness/kl") if self.draws_ahead else None

    @property
    def keep_rate(self) -> float | None:
        """Share of the samples that the filter kept, mean over all steps; None where there is no
        filter.
        """
        is_filtered = (
            self.draws_ahead and self.config["near_policy"].get("filter", "none") != "none"
        )
        return mean(self.column("filter/keep_rate")) if is_filtered else None

    def column(self, name: str) -> list[float | None]:
        """A metric, one value a step; None where it was not finite or not written."""
        return [row[name] if is_number(row.get(name)) else None for row in self.metrics]

    def median(self, name: str) -> float | None:
        """Of a metric over all steps."""
        known = [value for value in self.column(name) if value is not None]
        return statistics.median(known) if known else None

    def at_the_end(self, name: str) -> float | None:
        """Mean of a metric over the last ten steps."""
        return mean(self.column(name)[-10:])


def is_number(value: Any) -> bool:
    """Whether it is a finite number (JSON's null stands for one that is not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if is_number(value)]
    return statistics.fmean(known) if known else None


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of time that the learner or the generator spent on one thing."""

    # learner: wait, pack, teacher, update, publish; generator: admit, generate, annotate, store
    what: str
    start: float  # seconds since the epoch
    seconds: float
    step: int
    version: int  # updates of the weights that were drawn with

    @property
    def end(self) -> float:
        """When it was over."""
        return self.start + self.seconds


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a sweep: what was asked for, and what has come of it."""

    id: str
    workdir: pathlib.Path
    overrides: dict[str, Any]
    config: dict[str, Any]
    failure: dict[str, Any] | None

    @property
    def status(self) -> Literal["done", "failed", "begun", "waiting"]:
        """See `status_of`."""
        return status_of(self.workdir)


@dataclasses.dataclass(frozen=True)
class SeedGroup:
    """The points of a sweep that differ in nothing but their seed."""

    overrides: dict[str, Any]
    points: tuple[Point, ...]

    @property
    def done(self) -> tuple[Point, ...]:
        """The points whose runs are complete."""
        return tuple(point for point in self.points if point.status == "done")

    @property
    def missing(self) -> tuple[str, ...]:
        """Ids of those that are not."""
        return tuple(point.id for point in self.points if point.status != "done")


def status_of(directory: pathlib.Path) -> Literal["done", "failed", "begun", "waiting"]:
    """How far a point is; one that is `begun` is running or will be continued, and only its runner
    knows which.
    """
    for name, status in ((RESULT, "done"), (FAILURE, "failed"), ("config.json", "begun")):
        if (directory / name).exists():
            return status
    return "waiting"


def read_run(workdir: pathlib.Path) -> Run:
    """Everything a work directory holds; WorkdirError where it is not one."""
    found = read_run_config(workdir)
    result = workdir / RESULT
    return Run(
        workdir,
        found["config"],
        found["data"],
        found["environment"],
        metrics=read_lines(workdir / "metrics.jsonl"),
        evaluations=read_lines(workdir / "eval.jsonl"),
        samples=read_lines(workdir / "samples.jsonl"),
        result=read_result(workdir) if result.exists() else None,
    )


def read_result(workdir: pathlib.Path) -> dict[str, Any]:
    """The final numbers of a run; WorkdirError where they are damaged."""
    file = workdir / RESULT
    advice = "delete it, and opdjax train with this run's config writes it again from its last checkpoint"
    found = read_json(file, advice)
    scores = [found.get(name, {}) for name in ("eval_before", "eval_after", "paired_difference")]
    if "student" not in found or not all(isinstance(score, dict) for score in scores):
        raise WorkdirError(f"{file} is not the result of a run; {advice}")
    return found


def read_timeline(workdir: pathlib.Path, who: Literal["learner", "generator"]) -> list[Span]:
    """What one of the two spent its time on, by start; empty where it wrote nothing. WorkdirError
    where a row is damaged.
    """
    file = workdir / f"timeline-{who}.jsonl"
    spans = []
    for number, row in enumerate(read_lines(file), 1):
        counts = [row.get(name) for name in ("step", "version")]
        is_timed = (
            is_number(row.get("start")) and is_number(row.get("seconds")) and row["seconds"] >= 0
        )
        if not (
            isinstance(row.get("what"), str)
            and is_timed
            and all(isinstance(value, int) for value in counts)
        ):
            expected = "expected what, start, seconds (not below 0), step and version; the report alone reads this file, so it may be moved"
            raise WorkdirError(
                f"{file}, row {number} is no span of time: {json.dumps(row)[:80]}; {expected}"
            )
        spans.append(Span(row["what"], float(row["start"]), float(row["seconds"]), *counts))
    return sorted(spans, key=lambda span: span.start)


def read_filters(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What the filter decided of every batch of samples, in the order of their policies;
    WorkdirError where a file is damaged.
    """
    files = workdir.glob("rollouts/*/filter-*.json")
    return sorted(map(_read_filter, files), key=lambda found: (found["version"], found["number"]))


def _read_filter(file: pathlib.Path) -> dict[str, Any]:
    advice = "remove it: it follows from the samples beside it"
    found = read_json(file, advice)
    counts = (
        "version",
        "number",
        "num_samples",
        "num_kept",
        "num_degenerate",
        "num_disconnected",
        "num_unscored",
    )
    wrong = [name for name in counts if not isinstance(found.get(name), int)]
    wrong += [name for name in ("histogram", "examples") if not isinstance(found.get(name), dict)]
    wrong += [name for name in ("filter",) if not isinstance(found.get(name), str)]
    if not wrong:
        edges, bars = found["histogram"].get("edges"), found["histogram"].get("counts")
        if not (
            isinstance(edges, list)
            and isinstance(bars, list)
            and (len(edges) == len(bars) + 1 or not bars)
        ):
            wrong.append("histogram (one edge more than counts)")
    if wrong:
        raise WorkdirError(
            f"{file} is not what a filter decided: {', '.join(wrong)} missing or of another kind; {advice}"
        )
    return found


def read_point(file: pathlib.Path) -> dict[str, Any]:
    """What a point of a sweep was asked for; WorkdirError where its file is damaged."""
    advice = "delete it, and the command that made the sweep writes it again"
    asked = read_json(file, advice)
    if not isinstance(asked.get("id"), str) or not all(
        isinstance(asked.get(name), dict) for name in ("overrides", "config")
    ):
        raise WorkdirError(
            f"{file} is not a point of a sweep: expected id, overrides and config; {advice}"
        )
    return asked


def is_sweep(directory: pathlib.Path) -> bool:
    """Whether the directory holds points of a sweep rather than a run."""
    return any(directory.glob(f"*/{POINT}"))


def read_points(directory: pathlib.Path) -> list[Point]:
    """Every point that was ever asked for in this directory, by id."""
    points = []
    for file in sorted(directory.glob(f"*/{POINT}")):
        asked, failure = read_point(file), file.with_name(FAILURE)
        failed = (
            read_json(failure, "delete it to have the point run again")
            if failure.exists()
            else None
        )
        points.append(Point(asked["id"], file.parent, asked["overrides"], asked["config"], failed))
    if not points:
        raise WorkdirError(
            f"{directory} holds no points of a sweep; expected a directory given to opdjax sweep --workdir"
        )
    return points


def groups(points: Sequence[Point]) -> list[SeedGroup]:
    """Points by config, the seed aside: two runs are averaged only where every other setting is the
    same, and no run twice.
    """
    found: dict[str, list[Point]] = {}
    for point in points:
        # As of today: points that were asked for before a field came are those that leave it as it
        # is.
        config = {name: value for name, value in upgrade(point.config).items() if name != "seed"}
        same = found.setdefault(json.dumps(config, sort_keys=True), [])
        if point.config["seed"] not in [other.config["seed"] for other in same]:
            same.append(point)
    return [
        SeedGroup(
            {name: value for name, value in same[0].overrides.items() if name != "seed"},
            tuple(same),
        )
        for same in found.values()
    ]


def result_table(result: dict[str, Any]) -> str:
    """Before and after, as a person reads it."""
    before, after, change = result["eval_before"], result["eval_after"], result["paired_difference"]
    k = before["k"]
    lines = [f"{'':32}{f'avg@{k}':>15}{f'pass@{k}':>15}{'greedy':>15}"]

    def row(title, scores):
        cells = [
            f"{scores[n]:.3f} ± {scores[n + '_interval']:.3f}" if n in scores else ""
            for n in ("avg@k", "pass@k", "greedy")
        ]
        lines.append(f"{title:32}" + "".join(f"{cell:>15}" for cell in cells))

    row(f"student before, T = {before['temperature']:g}", before)
    for scores in result["eval_before_sharpened"]:
        row(f"student before, T = {scores['temperature']:g}", scores)
    row(f"student after, T = {after['temperature']:g}", after)
    gains = {
        name: f"{change[name]:+.3f} ± {change[name + '_interval']:.3f}"
        for name in ("avg@k", "greedy")
    }
    lines.append(f"{'gain, paired by prompt':32}{gains['avg@k']:>15}{'':>15}{gains['greedy']:>15}")
    if "benchmarks" in after:
        lines += [
            "after, by benchmark; mean: of them, each counting alike",
            *benchmark_lines(after["benchmarks"]),
        ]
    lines.append(
        f"{before['num_prompts']} held-out prompts; ± is half a 95 % interval over prompts"
    )
    return "\n".join(lines)
