"""Scores of repeated sampling, and 95 % intervals over prompts, seeds and trials.

The unit is the prompt (`mean_and_interval`, `paired_difference`) or the seed (`seed_interval`):
samples of one prompt are not independent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

# Two-sided 95 % quantile of the normal distribution. Evaluations have hundreds of prompts, where
# Student's t agrees to the third digit.
_Z95 = 1.959964
_RESAMPLES = 1000  # of the bootstrap


def avg_at_k(correct: np.ndarray) -> np.ndarray:
    """Share of correct answers per prompt, `[P]`, from `correct [P, n]`."""
    return correct.mean(axis=1)


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate per prompt, `[P]`, that at least one of k answers is correct:
    `1 - C(n - c, k) / C(n, k)` with c of the n answers in `correct [P, n]` correct.

    Chen et al. 2021 (arXiv 2107.03374), equation 1. ValueError unless 1 <= k <= n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a prompt, there are {n}")
    total = math.comb(n, k)
    return np.array([1.0 - math.comb(n - int(c), k) / total for c in correct.sum(axis=1)])


def mean_and_interval(per_prompt: np.ndarray) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) over prompts as clusters; the half width is infinite
    for a single prompt.
    """
    mean = float(per_prompt.mean())
    if len(per_prompt) < 2:
        return mean, math.inf
    return mean, float(_Z95 * per_prompt.std(ddof=1) / math.sqrt(len(per_prompt)))


def paired_difference(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """(mean of after - before, half width of its 95 % interval), paired by prompt.

    Both arguments hold one score per prompt, `[P]`; ValueError if their lengths differ.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"scores of {before.shape[0]} and {after.shape[0]} prompts cannot be paired; evaluate "
            "the same prompts"
        )
    return mean_and_interval(after - before)


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) over seeds, by Student's t; the half width is
    infinite for a single seed.
    """
    if len(values) < 2:
        return float(values[0]), math.inf
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(stdtrit(len(values) - 1, 0.975)) * error


def ratio_with_interval(
    ours: np.ndarray, plain: np.ndarray
) -> tuple[float | None, float | None, float | None]:
    """Return (sum of ours / sum of plain, low, high) from values per prompt.

    `low` and `high` bound the 95 % bootstrap interval; prompts are resampled together for both.
    All are None if `plain` sums to 0.
    """
    if not plain.sum():
        return None, None, None
    chosen = np.random.default_rng(0).integers(0, len(ours), (_RESAMPLES, len(ours)))
    below = plain[chosen].sum(axis=1)
    ratios = ours[chosen].sum(axis=1)[below > 0] / below[below > 0]
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(ours.sum() / plain.sum()), float(low), float(high)


def wilson_interval(hits: int, trials: int) -> tuple[float, float]:
    """(low, high) end of the 95 % interval of a share after independent trials (Wilson 1927);
    (0, 1) without trials.
    """
    if trials == 0:
        return 0.0, 1.0
    z, share = _Z95, hits / trials
    middle = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def by_benchmark(
    names: Sequence[str], scores: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """`{benchmark: {score: mean, score_interval: half width, num_prompts}}`, and the macro mean as
    the benchmark `mean`.

    `names` gives the benchmark of each prompt and `scores` one value per prompt, `[P]`. Every
    benchmark has the same weight in `mean`, whatever its number of prompts; the interval of `mean`
    is that of a sum of independent means.
    """
    rows = {
        name: np.array([i for i, other in enumerate(names) if other == name])
        for name in dict.fromkeys(names)
    }
    table: dict[str, dict[str, float]] = {
        name: {"num_prompts": len(picked)} for name, picked in rows.items()
    }
    table["mean"] = {"num_prompts": len(names)}
    for score, per_prompt in scores.items():
        each = {name: mean_and_interval(per_prompt[picked]) for name, picked in rows.items()}
        means, halves = zip(*each.values())
        each["mean"] = float(np.mean(means)), math.hypot(*halves) / len(rows)
        for name, (mean, half) in each.items():
            table[name] |= {score: mean, f"{score}_interval": half}
    return table


def benchmark_lines(table: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The result of `by_benchmark` as printed lines, one per benchmark."""
    lines = []
    for name, scores in table.items():
        cells = [
            f"{score} {scores[score]:.3f} ± {scores[f'{score}_interval']:.3f}"
            for score in ("avg@k", "pass@k", "greedy")
        ]
        lines.append(f"{name:24}{'   '.join(cells)}   {scores['num_prompts']} prompts")
    return lines
