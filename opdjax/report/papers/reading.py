"""Reads the number of a column from a run. No jax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from opdjax.report.papers.tables import PaperColumn
from opdjax.runs.results import Run, is_number


def reader(read: str, when: Literal["after", "before"] = "after") -> Callable[[Run], float | None]:
    """A function that returns a column's number of a run, or None if the run has no such number.

    `avg@k`, `pass@k`, `greedy`: the score after (or before) training, over all prompts.
    `avg@k:NAME`: the same for one benchmark, or for `mean`, the mean over all benchmarks.
    `median:METRIC`: median of a metric over all steps. `last:METRIC`: its mean over the last ten.
    `seconds`: training time. Only scores exist before training. An empty `read` returns None for
    every run. ValueError for any other `read`.
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
        f"a column reads {read!r}; expected a score (avg@k:NAME), seconds, median:METRIC or "
        "last:METRIC"
    )


def score_in(scores: Mapping[str, Any], read: str) -> float | None:
    """`avg@k` or `avg@k:NAME` of one evaluation, a row of eval.jsonl or part of result.json."""
    kind, _, name = read.partition(":")
    value = scores.get("benchmarks", {}).get(name, {}).get(kind) if name else scores.get(kind)
    return value if is_number(value) else None


def best_score(run: Run, read: str) -> float | None:
    """The best score over all evaluations of a run."""
    return max((score for _, score in _curve(run, read)), default=None)


def spent_until(run: Run, column: PaperColumn, target: float) -> tuple[float, bool]:
    """(prompts or seconds spent, True) at the first evaluation that scores at least `target`;
    (all that the run spent, False) if there is none.
    """
    reached = [step for step, score in _curve(run, column.read) if score >= target]
    train = run.config["train"]
    step = reached[0] if reached else train["num_steps"]
    prompts = step * train["prompts_per_step"]
    spent = prompts if column.spent == "prompts" else run.total_at("seconds", step)
    return float(spent), bool(reached)


def _curve(run: Run, read: str) -> list[tuple[int, float]]:
    """(step, score) of the evaluations at the run's own temperature, by step."""
    temperature = run.config["evaluation"]["temperatures"][0]
    rows = [row for row in run.evaluations if row["temperature"] == temperature]
    scores = [(row["step"], score_in(row, read)) for row in rows]
    return sorted((step, score) for step, score in scores if score is not None)
