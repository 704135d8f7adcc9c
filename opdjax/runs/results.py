"""Reads work directories, of finished and unfinished runs and of sweeps (one directory per point).
No jax: this runs on any machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from opdjax.config.run import Config
from opdjax.config.saved import lost_settings, upgrade
from opdjax.config.train import TrainConfig
from opdjax.config.validation import ConfigError, differences
from opdjax.runs.statistics import (
    NO_RIGHT_ANSWER,
    benchmark_lines,
    has_right_answer,
    paired_difference,
    score_label,
)
from opdjax.runs.workdir import (
    NUMBER,
    WorkdirError,
    damaged,
    read_json,
    read_lines,
    read_run_config,
    refuse_if,
    require,
)

POINT, FAILURE, RESULT = "point.json", "failure.json", "result.json"
_MAX_FILTER_BYTES = 2**28
# X-axes of plots: name, and the per-step metric whose sum it is (None: the step itself).
AXES = {
    "steps": None,
    "generated tokens": "perf/generated_tokens",
    "trained tokens": "perf/trained_tokens",
    "teacher tokens": "perf/teacher_tokens",
    "seconds": "time/step",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Content of one work directory; `result` is None until the run is complete."""

    workdir: pathlib.Path
    config: dict[str, Any]
    data: dict[str, Any]  # digests of prompts and models
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    divergences: list[dict[str, Any]]  # rows of divergence.jsonl
    samples: list[dict[str, Any]]
    result: dict[str, Any] | None

    def total_at(self, axis: str, step: int) -> float:
        """Steps, tokens or seconds up to and with `step`; NaN if they were not recorded."""
        name = AXES[axis]
        if name is None:
            return step
        return float(sum(row.get(name, math.nan) for row in self.metrics if row["step"] <= step))

    def score(self, name: str, when: Literal["after", "before"] = "after") -> float | None:
        """`avg@k`, `pass@k` or `greedy` after (or before) training. `avg@k:NAME` is the score of
        one benchmark, or of `mean`, the mean over all benchmarks.
        """
        return _score((self.result or {}).get(f"eval_{when}", {}), name)

    def per_prompt(self, name: str, when: Literal["after", "before"] = "after") -> Any:
        """The score `avg@k` or `greedy` of each prompt, `[P]`; None if it was not kept."""
        found = (self.result or {}).get(f"eval_{when}", {})
        field, k = {
            "avg@k": ("per_prompt", found.get("k")),
            "greedy": ("per_prompt_greedy", 1),
        }.get(name, ("", None))
        return np.array(found[field]) / k if field in found else None

    def divergence(
        self, name: str, writer: Literal["student", "teacher"] = "student", when: str = "after"
    ) -> float | None:
        """One of `DIVERGENCES` after (or before) training, on the answers of the writer."""
        found = (self.result or {}).get(f"divergence_{when}", {}).get(writer, {}).get(name)
        return found if is_number(found) else None

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, score) of all evaluations at the temperature of the config, by step."""
        scores = ((row["step"], _score(row, name)) for row in self.evaluated)
        return [(step, score) for step, score in scores if score is not None]

    @property
    def evaluated(self) -> list[dict[str, Any]]:
        """The evaluations at the temperature of the config, by step."""
        temperature = next(iter(self.config.get("evaluation", {}).get("temperatures", ())), None)
        rows = (row for row in self.evaluations if row.get("temperature") == temperature)
        by_step = {row["step"]: row for row in rows if "avg@k" in row}
        return [by_step[step] for step in sorted(by_step)]

    @property
    def gain(self) -> float | None:
        """avg@k after training minus before, on the same prompts."""
        return (self.result or {}).get("paired_difference", {}).get("avg@k")

    @property
    def change_in_kl(self) -> float | None:
        """KL(student || teacher) on held-out prompts after training minus before."""
        before, after = (self.divergence("reverse_kl", when=when) for when in ("before", "after"))
        return None if before is None or after is None else after - before

    @property
    def seconds(self) -> float | None:
        """Duration of the training."""
        return (self.result or {}).get("seconds")

    @property
    def planned_steps(self) -> int:
        """Updates that the run has, unless it stops early."""
        train = self.config["train"]
        if not (epochs := train.get("num_epochs")):
            return train["num_steps"]
        passes = TrainConfig(num_epochs=epochs, prompts_per_step=train["prompts_per_step"])
        return passes.steps_over(self.data["num_prompts"])

    @property
    def is_near_policy(self) -> bool:
        """Whether rollouts are sampled ahead of their update."""
        return self.config.get("near_policy", {}).get("schedule", "none") != "none"

    @property
    def staleness(self) -> float | None:
        """KL(student || behaviour), nats a token, over the last ten steps; None on-policy."""
        return self.last_mean("staleness/kl") if self.is_near_policy else None

    @property
    def keep_rate(self) -> float | None:
        """Share of the samples that the filter kept, mean over all steps; None without a filter."""
        near_policy = self.config.get("near_policy", {})
        is_filtered = self.is_near_policy and near_policy.get("filter", "none") != "none"
        return mean(self.column("filter/keep_rate")) if is_filtered else None

    def column(self, name: str) -> list[float | None]:
        """A metric, one value per step; None where it was not finite or not written."""
        return [row[name] if is_number(row.get(name)) else None for row in self.metrics]

    def median(self, name: str) -> float | None:
        """Median of a metric over all steps; None if it was never finite."""
        known = [value for value in self.column(name) if value is not None]
        return statistics.median(known) if known else None

    def last_mean(self, name: str) -> float | None:
        """Mean of a metric over the last ten steps; None if it was never finite there."""
        return mean(self.column(name)[-10:])


def _score(scores: Mapping[str, Any], name: str) -> float | None:
    kind, _, benchmark = name.partition(":")
    found = scores.get("benchmarks", {}).get(benchmark, {}) if benchmark else scores
    return found[kind] if is_number(found.get(kind)) else None


def is_number(value: Any) -> bool:
    """Whether it is a finite number; in JSON, null stands for one that is not finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the finite values; None if there are none."""
    known = [value for value in values if is_number(value)]
    return statistics.fmean(known) if known else None


@dataclasses.dataclass(frozen=True)
class Span:
    """A period that the learner or the generator spent on one activity."""

    # learner: wait, pack, teacher, update, publish; generator: admit, generate, annotate, store
    what: str
    start: float  # seconds since the epoch
    seconds: float
    step: int
    version: int  # updates of the weights that sampled

    @property
    def end(self) -> float:
        """Seconds since the epoch."""
        return self.start + self.seconds


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a sweep: its requested config and its state."""

    id: str
    workdir: pathlib.Path
    overrides: dict[str, Any]
    config: dict[str, Any]
    failure: dict[str, Any] | None

    @property
    def status(self) -> Literal["done", "failed", "begun", "waiting"]:
        """As `status_of` returns it."""
        return status_of(self.workdir)


@dataclasses.dataclass(frozen=True)
class SeedGroup:
    """The points of a sweep that differ only in their seed."""

    overrides: dict[str, Any]
    points: tuple[Point, ...]

    @property
    def done(self) -> tuple[Point, ...]:
        """Points whose runs are complete."""
        return tuple(point for point in self.points if point.status == "done")

    @property
    def missing(self) -> tuple[str, ...]:
        """Ids of points whose runs are not complete."""
        return tuple(point.id for point in self.points if point.status != "done")

    @property
    def digest(self) -> str:
        """The first eight characters of the hash of the config without its seed."""
        config = {k: v for k, v in upgrade(self.points[0].config).items() if k != "seed"}
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def status_of(directory: pathlib.Path) -> Literal["done", "failed", "begun", "waiting"]:
    """State of a point. `begun`: it is running or was interrupted; only its runner knows which."""
    for name, status in ((RESULT, "done"), (FAILURE, "failed"), ("config.json", "begun")):
        if (directory / name).exists():
            return status
    return "waiting"


def read_run(workdir: pathlib.Path) -> Run:
    """The run in a work directory; WorkdirError if there is none or a file is damaged."""
    found = read_run_config(workdir)
    # Under today's names. A config of a later version, or a damaged one, is shown as it is.
    with contextlib.suppress(ConfigError):
        found["config"] = upgrade(found["config"])
    result = workdir / RESULT
    return Run(
        workdir,
        found["config"],
        found["data"],
        found["environment"],
        metrics=read_lines(workdir / "metrics.jsonl"),
        evaluations=read_lines(workdir / "eval.jsonl"),
        divergences=read_lines(workdir / "divergence.jsonl"),
        samples=read_lines(workdir / "samples.jsonl"),
        result=read_result(workdir) if result.exists() else None,
    )


def read_result(workdir: pathlib.Path) -> dict[str, Any]:
    """The final numbers of a run; WorkdirError if the file is damaged."""
    advice = "delete it, and opdjax train with this run's config writes it again from its last"
    return read_json(workdir / RESULT, f"{advice} checkpoint", "the result of a run", student=str)


def read_timeline(workdir: pathlib.Path, who: Literal["learner", "generator"]) -> list[Span]:
    """The activities of the learner or the generator, sorted by start; empty if none were recorded.
    WorkdirError if a row is damaged.
    """
    file = workdir / f"timeline-{who}.jsonl"
    types = {"what": str, "start": NUMBER, "seconds": NUMBER, "step": int, "version": int}
    spans = [Span(*(row[name] for name in types)) for row in read_lines(file, **types)]
    if wrong := [span for span in spans if span.seconds < 0]:
        raise damaged(str(file), str(wrong[0]), "seconds of 0 or more")
    return sorted(spans, key=lambda span: span.start)


def read_filters(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The filter's decisions on all samples, by policy version; WorkdirError at a damaged file."""
    files = workdir.glob("rollouts/*/filter-*.json")
    return sorted(map(read_filter, files), key=lambda found: (found["version"], found["number"]))


def read_filter(file: pathlib.Path) -> dict[str, Any]:
    """The filter's decision on a batch of samples; WorkdirError if the file is damaged."""
    advice = "delete it: it is computed from the samples beside it"
    if file.exists() and file.stat().st_size > _MAX_FILTER_BYTES:
        raise WorkdirError(f"{file} has more than {_MAX_FILTER_BYTES} bytes; {advice}")
    counts = ("version", "number", "num_samples", "num_kept")
    counts += ("num_degenerate", "num_disconnected", "num_unscored")
    types = dict.fromkeys(counts, int) | {"histogram": dict, "examples": dict, "filter": str}
    found = read_json(file, advice, "the record of a filter", **types)
    edges, bars = found["histogram"].get("edges"), found["histogram"].get("counts")
    are_lists = isinstance(edges, list) and isinstance(bars, list)
    if not (are_lists and (len(edges) == len(bars) + 1 or not bars)):
        expected = "expected edges and counts in histogram, one edge more than counts"
        raise WorkdirError(f"{file} is not the record of a filter: {expected}; {advice}")
    return found


def read_point(file: pathlib.Path) -> dict[str, Any]:
    """The `id`, `overrides` and `config` of a point; WorkdirError if the file is damaged."""
    advice = "delete it, and the command that made the sweep writes it again"
    return read_json(file, advice, "a point of a sweep", id=str, overrides=dict, config=dict)


def is_sweep(directory: pathlib.Path) -> bool:
    """Whether the directory holds points of a sweep rather than a run."""
    return any(directory.glob(f"*/{POINT}"))


def read_points(directory: pathlib.Path) -> list[Point]:
    """All points in the directory of a sweep, sorted by id; WorkdirError if there are none."""
    points = []
    for file in sorted(directory.glob(f"*/{POINT}")):
        found, path = read_point(file), file.with_name(FAILURE)
        advice = "delete it, and the point runs again"
        failure = read_json(path, advice) if path.exists() else None
        point = Point(found["id"], file.parent, found["overrides"], found["config"], failure)
        points.append(point)
    if not points:
        raise WorkdirError(
            f"{directory} holds no points of a sweep; expected a directory given to opdjax sweep "
            "--workdir"
        )
    return points


def seed_groups(points: Sequence[Point]) -> list[SeedGroup]:
    """Points that differ only in their seed in one group, each seed once."""
    found: dict[str, list[Point]] = {}
    for point in points:
        # Upgraded, so that a point written before a field existed equals one with its default.
        config = {name: value for name, value in upgrade(point.config).items() if name != "seed"}
        key = [config, lost_settings(point.config)]
        same = found.setdefault(json.dumps(key, sort_keys=True), [])
        if point.config["seed"] not in [other.config["seed"] for other in same]:
            same.append(point)
    shared = lambda point: {k: v for k, v in point.overrides.items() if k != "seed"}
    return [SeedGroup(shared(same[0]), tuple(same)) for same in found.values()]


def read_group(group: SeedGroup, reading: Callable[[pathlib.Path], Run] = read_run) -> list[Run]:
    """The completed runs of a group. WorkdirError if a run's config differs from its point's, or
    its data and models from those of the first run.
    """
    runs = [reading(point.workdir) for point in group.done]
    for point, run in zip(group.done, runs):
        changed = differences(upgrade(point.config), upgrade(run.config))
        changed += differences(runs[0].data, run.data)
        other = "holds another run than its point asks for, or one with other data"
        refuse_if(changed, f"{run.workdir} {other}; move it away")
    return runs


def make_result(
    config: Config, workdir: pathlib.Path, counts: dict[str, int], student: str
) -> dict[str, Any]:
    """The content of result.json, from the logs of a finished run.

    `counts`: `num_steps`, those that were done, skipped steps and prompts. `student`: the exported
    student, relative to the workdir.
    """
    steps = read_lines(workdir / "metrics.jsonl", **{"time/step": NUMBER})
    seconds = sum(row["time/step"] for row in steps)
    result: dict[str, Any] = {
        "recipe": config.estimator.recipe,
        "rows_per_step": config.rows_per_step,
        **counts,
        "student": student,
        "seconds": seconds,
    }
    evaluation = config.evaluation
    if evaluation.measures:
        rows = {row["step"]: row for row in read_lines(workdir / "divergence.jsonl")}
        before, after = (rows[step] for step in (0, counts["num_steps"]))
        result |= {"divergence_before": before, "divergence_after": after}
    if not evaluation.grades:
        return result
    found = {(row["step"], row["temperature"]): row for row in read_lines(workdir / "eval.jsonl")}
    before, after = (found[step, evaluation.temperature] for step in (0, counts["num_steps"]))
    change = {}
    counted = ("avg@k", "per_prompt", before["k"]), ("greedy", "per_prompt_greedy", 1)
    for name, field, k in counted:
        shares = (np.array(row[field]) / k for row in (before, after))
        change[name], change[f"{name}_interval"] = paired_difference(*shares)
    result |= {"eval_before": before, "eval_after": after, "paired_difference": change}
    result["eval_before_sharpened"] = [found[0, t] for t in evaluation.temperatures[1:]]
    return result


def evaluations_since_best(workdir: pathlib.Path, config: Config, step: int) -> int:
    """Evaluations after the best one, the first of equals, up to and with `step`: by avg@k, or if
    no answers are graded by KL(student || teacher).
    """
    if config.evaluation.grades:
        rows = read_lines(workdir / "eval.jsonl", **{"avg@k": NUMBER})
        rows = [row for row in rows if row["temperature"] == config.evaluation.temperature]
        score = lambda row: row["avg@k"]
    else:
        rows = read_lines(file := workdir / "divergence.jsonl")
        place = lambda row: f"{file}, student of step {row['step']},"
        score = lambda row: -require(row["student"], place(row), reverse_kl=float)["reverse_kl"]
    rows = sorted((row for row in rows if row["step"] <= step), key=lambda row: row["step"])
    scores = [score(row) for row in rows]
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0


def result_table(result: dict[str, Any]) -> str:
    """The scores before and after training, as printed tables."""
    tables = [_score_table(result)] if "eval_after" in result else []
    tables += [_divergence_table(result)] if "divergence_after" in result else []
    return "\n\n".join(tables)


# What engine/divergence.py measures, and the heads of its columns.
DIVERGENCES = {
    "reverse_kl": "KL(S || T)",
    "forward_kl": "KL(T || S)",
    "jsd": "JSD",
    "agreement": "same top",
    "student_entropy": "entropy S",
    "teacher_entropy": "entropy T",
    "length": "tokens",
}


def _divergence_table(result: dict[str, Any]) -> str:
    before, after = result["divergence_before"], result["divergence_after"]
    lines = [f"{'':32}" + "".join(f"{name:>16}" for name in DIVERGENCES.values())]
    for writer in ("student", "teacher"):
        for moment, row in (("before", before), ("after", after)):
            found = row[writer]
            cells = (f"{found[name]:.3f} ± {found[name + '_interval']:.3f}" for name in DIVERGENCES)
            title = f"{moment}, on the {writer}'s answers"
            lines.append(f"{title:32}" + "".join(f"{cell:>16}" for cell in cells))
    lines.append(
        f"{after['num_prompts']} held-out prompts, {after['n']} answers each, T = "
        f"{after['temperature']:g}; S: student, T: teacher; nats a token; ± is half a 95 % "
        "interval over prompts"
    )
    return "\n".join(lines)


def _score_table(result: dict[str, Any]) -> str:
    before, after, change = result["eval_before"], result["eval_after"], result["paired_difference"]
    names, k = ("avg@k", "pass@k", "greedy"), before["k"]

    def row(title: str, scores: dict[str, Any], sign: str = "") -> str:
        text = lambda name: f"{scores[name]:{sign}.3f} ± {scores[name + '_interval']:.3f}"
        cells = (text(name) if name in scores else "" for name in names)
        return f"{title:32}" + "".join(f"{cell:>15}" for cell in cells)

    lines = [f"{'':32}" + "".join(f"{score_label(name, k):>15}" for name in names)]
    for scores in (before, *result["eval_before_sharpened"]):
        lines.append(row(f"student before, T = {scores['temperature']:g}", scores))
    lines.append(row(f"student after, T = {after['temperature']:g}", after))
    lines.append(row("gain, paired by prompt", change, "+"))
    if "benchmarks" in after:
        lines.append("after, by benchmark; mean: over benchmarks, equally weighted")
        lines += benchmark_lines(after["benchmarks"], k)
    count = before["num_prompts"]
    lines.append(f"{count} held-out prompts; ± is half a 95 % interval over prompts")
    if not has_right_answer([before, *result["eval_before_sharpened"], after]):
        lines.append(NO_RIGHT_ANSWER)
    return "\n".join(lines)
