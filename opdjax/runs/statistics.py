"""Scores of repeated sampling, with intervals that take the prompt as the unit: samples of one
prompt are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

# Two-sided 95 % normal quantile; evaluations have hundreds of prompts, where Student's t agrees to
# the third digit.
_Z95 = 1.959964


def avg_at_k(correct: np.ndarray) -> np.ndarray:
    """Share of right answers of each prompt, `[P]`, from `correct [P, n]`."""
    return correct.mean(axis=1)


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate, `[P]`, that at least one of k answers is right: `1 - C(n - c, k) / C(n,
    k)`.

    Chen et al. 2021 (arXiv 2107.03374), equation 1; c of the n answers in `correct [P, n]` are
    right. ValueError if k > n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a prompt, there are {n}")
    total = math.comb(n, k)
    return np.array([1.0 - math.comb(n - int(c), k) / total for c in correct.sum(axis=1)])


def mean_and_interval(per_prompt: np.ndarray) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) over prompts as clusters; the half width of one
    prompt alone is infinite.
    """
    if len(per_prompt) < 2:
        return float(per_prompt.mean()), math.inf
    return float(per_prompt.mean()), float(
        _Z95 * per_prompt.std(ddof=1) / math.sqrt(len(per_prompt))
    )


def by_benchmark(
    names: Sequence[str], scores: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """`{benchmark: {score: mean, score_interval: half width, num_prompts}}` from one score a prompt
    `[P]`, and `mean`, the macro mean.

    Every benchmark counts alike in `mean`, however many prompts it has; its interval is of the sum
    of independent means.
    """
    rows = {
        name: np.array([i for i, other in enumerate(names) if other == name])
        for name in dict.fromkeys(names)
    }
    found: dict[str, dict[str, float]] = {
        name: {"num_prompts": len(picked)} for name, picked in rows.items()
    }
    found["mean"] = {"num_prompts": len(names)}
    for score, per_prompt in scores.items():
        each = {name: mean_and_interval(per_prompt[picked]) for name, picked in rows.items()}
        means, halves = zip(*each.values())
        for name, (mean, half) in {
            **each,
            "mean": (float(np.mean(means)), math.hypot(*halves) / len(rows)),
        }.items():
            found[name] |= {score: mean, f"{score}_interval": half}
    return found


def benchmark_lines(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What `by_benchmark` found, a line each, as a person reads it."""
    lines = []
    for name, scores in found.items():
        cells = [
            f"{score} {scores[score]:.3f} ± {scores[f'{score}_interval']:.3f}"
            for score in ("avg@k", "pass@k", "greedy")
        ]
        lines.append(f"{name:24}{'   '.join(cells)}   {scores['num_prompts']} prompts")
    return lines


def paired_difference(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """(mean of after - before, half width of its 95 % interval), paired by prompt: both hold one
    score a prompt `[P]`.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"scores of {before.shape[0]} and {after.shape[0]} prompts cannot be paired; evaluate the same prompts"
        )
    return mean_and_interval(after - before)
