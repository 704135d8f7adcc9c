"""How the number of a column is read from a run. No jax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from opdjax.report.papers.tables import PaperColumn
from opdjax.runs.results import Run, is_number

Moment = Literal["after", "before"]


def reader(read: str, when: Moment = "after") -> Callable[[Run], float | None]:
    """How a column's number is read from a run; None where the run has no such number.

    `avg@k`, `pass@k`, `greedy`: the score after (or before) training, over all prompts.
    `avg@k:NAME`: that of one benchmark, or `mean`, that over all benchmarks. `median:METRIC`,
    `last:METRIC`: of a metric over all steps, or its mean over the last ten. `seconds`: of
    training. What is no score is None before training; an empty `read` is None of any run.
    """
    kind, _, name = read.partition(":")
    if "@" in kind or kind == "greedy":
        return lambda run: score_in((run.result or {}).get(f"eval_{when}", {}), read)
    if when == "before" or not read:
        return lambda run: None
    if kind == "seconds":
        return lambda run: run.seconds
    if kind == "median":
        return lambda run: run.median(name)
    if kind == "last":
        return lambda run: run.last_mean(name)
    raise ValueError(
        f"a column reads {read!r}; expected a score (avg@k:NAME), seconds, median:METRIC or last:METRIC"
    )


def score_in(scores: Mapping[str, Any], read: str) -> float | None:
    """`avg@k` or `avg@k:NAME` of one evaluation, as eval.jsonl and result.json hold it."""
    kind, _, name = read.partition(":")
    value = scores.get("benchmarks", {}).get(name, {}).get(kind) if name else scores.get(kind)
    return value if is_number(value) else None


def best_score(run: Run, read: str) -> float | None:
    """The best of all evaluations of a run."""
    return max((score for _, score in _curve(run, read)), default=None)


def spent_until(run: Run, column: PaperColumn, target: float) -> tuple[float, bool]:
    """What the run had spent at its first evaluation that scores at least `target`, and whether
    there is one; else all that it spent.
    """
    reached = [step for step, score in _curve(run, column.read) if score >= target]
    step = reached[0] if reached else run.config["train"]["num_steps"]
    spent = (
        step * run.config["train"]["prompts_per_step"]
        if column.spent == "prompts"
        else run.total_at("seconds", step)
    )
    return float(spent), bool(reached)


def _curve(run: Run, read: str) -> list[tuple[int, float]]:
    """(step, score) of the evaluations at the run's own temperature."""
    temperature = run.config["evaluation"]["temperature"]
    rows = sorted(
        (row for row in run.evaluations if row["temperature"] == temperature),
        key=lambda row: row["step"],
    )
    return [(row["step"], score) for row in rows if (score := score_in(row, read)) is not None]
