"""Numbers that the pages state about a run: scores, totals, KL by position."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from opdjax.runs.results import AXES, Run, mean

SCORES = ("avg@k", "greedy", "pass@k")
_POSITION = re.compile(r"kl/position/(\d+)-(\d+)")

Bucket = tuple[int, int]  # first and last completion token, both included


def totals(run: Run, axis: str, steps: Iterable[int]) -> list[float] | None:
    """The total spent up to each of the steps, in units of the axis; None if not recorded."""
    found = [run.total_at(axis, step) for step in steps]
    is_recorded = AXES[axis] is None or any(AXES[axis] in row for row in run.metrics)
    return found if is_recorded and all(map(math.isfinite, found)) else None


def spent(run: Run, axis: str) -> float | None:
    """The total cost in units of the axis, None if unknown; of seconds, that of the result."""
    if axis == "seconds" and run.seconds is not None:
        return run.seconds
    found = totals(run, axis, [run.metrics[-1]["step"]]) if run.metrics else None
    return found[0] if found else None


def end_length(num_steps: int) -> int:
    """Number of first and of last steps that are compared: a tenth, at least ten, at most half."""
    return max(1, min(max(10, num_steps // 10), num_steps // 2))


def end_mean(run: Run, name: str) -> float | None:
    """Mean of a metric over the last `end_length` steps; None if it was never finite there."""
    return mean(run.column(name)[-end_length(len(run.metrics)) :])


def kl_by_position(rows: list[dict[str, Any]]) -> dict[Bucket, float]:
    """KL(student || teacher), nats, in each range of completion tokens, mean over the rows."""
    matches = {name: _POSITION.fullmatch(name) for row in rows for name in row}
    means = {
        (int(match[1]), int(match[2])): mean(row.get(name) for row in rows)
        for name, match in matches.items()
        if match
    }
    return {bucket: value for bucket, value in sorted(means.items()) if value is not None}


def bucket_label(bucket: Bucket) -> str:
    """Such as 3–5, or 12 for a range of one token."""
    first, last = bucket
    return f"{first}" if first == last else f"{first}–{last}"


def skipped_steps(run: Run) -> int:
    """Updates that were skipped because the loss or gradient was not finite."""
    counted = [value for value in run.column("grad/skipped_steps") if value is not None]
    return int((run.result or {}).get("skipped_steps") or (counted[-1] if counted else 0))


def failure_texts(failure: Mapping[str, Any]) -> dict[str, str]:
    """The facts of a failure as texts; a list is one text of several lines."""
    text = lambda value: "\n".join(map(str, value)) if isinstance(value, list) else str(value)
    return {name: text(value).strip() for name, value in failure.items()}


def leaves(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A nested config as `section.field: value`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{path}{name}"
        found |= leaves(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return found


def model_name(path: str) -> str:
    """A hub id unchanged; the last two parts of a directory."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
    return path if len(parts) <= 2 and not path.startswith("/") else "/".join(parts[-2:])
