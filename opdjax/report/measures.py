"""What the pages say of a run, as numbers: its scores, its last steps, its KL by position."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from opdjax.runs.results import AXES, Run, Span, mean

SCORES = ("avg@k", "greedy", "pass@k")
_POSITION = "kl/position/"

Bucket = tuple[int, int]  # first and last completion token, both inside


def score_label(name: str, k: int | None) -> str:
    """`avg@8` for `avg@k` where k is known."""
    return name if k is None else name.replace("@k", f"@{k}")


def evaluated(run: Run) -> list[dict[str, Any]]:
    """The evaluations at the temperature of the config, by step; extra temperatures are another
    quantity.
    """
    temperature = run.config.get("evaluation", {}).get("temperature")
    by_step = {
        row["step"]: row
        for row in run.evaluations
        if row.get("temperature") == temperature and "avg@k" in row
    }
    return [by_step[step] for step in sorted(by_step)]


def samples_per_prompt(run: Run) -> int | None:
    """The k of avg@k and pass@k."""
    rows = evaluated(run)
    return rows[0].get("k") if rows else None


def totals(run: Run, axis: str, steps: Iterable[int]) -> list[float] | None:
    """What had been spent at each of the steps, in the units of the axis; None where the run did
    not record it.
    """
    found = [run.total_at(axis, step) for step in steps]
    is_recorded = AXES[axis] is None or any(AXES[axis] in row for row in run.metrics)
    return found if is_recorded and all(map(math.isfinite, found)) else None


def total(run: Run, axis: str) -> float | None:
    """What the whole run has spent."""
    found = totals(run, axis, [run.metrics[-1]["step"]]) if run.metrics else None
    return found[0] if found else None


def steps_of(run: Run) -> list[int]:
    """The steps of `column`."""
    return [row["step"] for row in run.metrics]


def smoothing_window(num_steps: int) -> int:
    """Steps that a smoothed line averages over."""
    return max(1, num_steps // 12)


def end_length(num_steps: int) -> int:
    """Steps that a profile at the start or the end of training is averaged over: a tenth, at least
    ten.
    """
    return min(num_steps, max(10, num_steps // 10))


def kl_by_position(rows: list[dict[str, Any]]) -> dict[Bucket, float]:
    """Mean over the steps of KL(student || teacher) in each range of completion tokens that any of
    them reached.
    """
    buckets = sorted(
        {bucket for row in rows for name in row if (bucket := _bucket(name)) is not None}
    )
    means = {
        bucket: mean(row.get(f"{_POSITION}{_name(bucket, rows)}") for row in rows)
        for bucket in buckets
    }
    return {bucket: value for bucket, value in means.items() if value is not None}


def _bucket(name: str) -> Bucket | None:
    first, _, last = name.removeprefix(_POSITION).partition("-")
    return (
        (int(first), int(last))
        if name.startswith(_POSITION) and first.isdecimal() and last.isdecimal()
        else None
    )


def _name(bucket: Bucket, rows: list[dict[str, Any]]) -> str:
    """The ranges are written with leading zeros, as many as the longest needs."""
    return next(
        name.removeprefix(_POSITION) for row in rows for name in row if _bucket(name) == bucket
    )


def bucket_label(bucket: Bucket) -> str:
    """Such as 3–5, or 12 for a range of one token."""
    first, last = bucket
    return f"{first}" if first == last else f"{first}–{last}"


def covered(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """The stretches of time that lie in any of the spans, apart from each other and in order."""
    found: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda span: span.start):
        if found and span.start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], span.end)
        else:
            found.append((span.start, span.end))
    return found


def leaves(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A nested config as `section.field: value`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            leaves(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
        )
    return found


def model_name(path: str) -> str:
    """A hub id as it is; of a directory the last two parts."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
    return path if len(parts) <= 2 and not path.startswith("/") else "/".join(parts[-2:])
