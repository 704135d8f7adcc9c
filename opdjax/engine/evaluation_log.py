"""Evaluates the student and records the scores in eval.jsonl."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

from opdjax.engine.evaluate import Evaluator
from opdjax.models.decoder import Params
from opdjax.ops.multihost import agreed, on_process_zero
from opdjax.ops.sharding import is_process_zero
from opdjax.runs.workdir import append_lines, read_lines

_SCORES = ("avg@k", "pass@k", "greedy")


def evaluate(
    evaluator: Evaluator | None, workdir: pathlib.Path, step: int, weights: Callable[[], Params]
) -> dict[str, float] | None:
    """Append this step's scores to eval.jsonl unless they are there; return them, or None without
    an evaluator. Step 0 is also evaluated at the other temperatures.

    `weights` is called only if something is missing.
    """
    if evaluator is None:
        return None
    file, config = workdir / "eval.jsonl", evaluator.config
    found = {(row["step"], row["temperature"]): row for row in read_lines(file)}
    wanted: list[tuple[float, Callable[[Params], dict[str, Any]]]]
    wanted = [(config.temperature, evaluator)]
    for temperature in config.temperatures[1:] if step == 0 else ():
        wanted.append((temperature, partial(evaluator.sampled, temperature=temperature)))
    missing = [(at, measure) for at, measure in wanted if agreed((step, at) not in found)]
    params = weights() if missing else None
    for temperature, measure in missing:
        row = found[step, temperature] = {"step": step, **measure(params)}
        on_process_zero(partial(append_lines, file, [row]))
        if temperature == config.temperature and is_process_zero():
            line = "  ".join(f"{name} {row[name]:.3f}" for name in _SCORES)
            print(f"evaluation at step {step}: {line}")
    return {name: found[step, config.temperature][name] for name in _SCORES}
