"""Scores of repeated sampling, with intervals that take the prompt as the unit: samples of one prompt are not independent."""

from __future__ import annotations

import math

import numpy as np

# Two-sided 95 % normal quantile; evaluations have hundreds of prompts, where Student's t agrees to the third digit.
_Z95 = 1.959964


def avg_at_k(correct: np.ndarray) -> np.ndarray:
    """Share of right answers of each prompt, `[P]`, from `correct [P, n]`."""
    return correct.mean(axis=1)


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate, `[P]`, that at least one of k answers is right: `1 - C(n - c, k) / C(n, k)`.

    Chen et al. 2021 (arXiv 2107.03374), equation 1; c of the n answers in `correct [P, n]` are right. ValueError if k > n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a prompt, there are {n}")
    total = math.comb(n, k)
    return np.array([1.0 - math.comb(n - int(c), k) / total for c in correct.sum(axis=1)])


def mean_and_interval(per_prompt: np.ndarray) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) over prompts as clusters; the half width of one prompt alone is infinite."""
    if len(per_prompt) < 2:
        return float(per_prompt.mean()), math.inf
    return float(per_prompt.mean()), float(_Z95 * per_prompt.std(ddof=1) / math.sqrt(len(per_prompt)))


def paired_difference(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """(mean of after - before, half width of its 95 % interval), paired by prompt: both hold one score a prompt `[P]`."""
    if before.shape != after.shape:
        raise ValueError(f"scores of {before.shape[0]} and {after.shape[0]} prompts cannot be paired; evaluate the same prompts")
    return mean_and_interval(after - before)
