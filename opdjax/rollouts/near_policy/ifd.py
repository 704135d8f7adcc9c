"""Delta-IFD: selects stored rollouts that are close enough to both policies to train on (NPD, arXiv
2605.05940). NumPy only.

IFD measures how much a prompt helps a model to predict an answer: near 0 much, at 1 not at all (Li
et al. 2023, arXiv 2308.12032). Delta-IFD is the teacher's IFD minus the student's, on an answer
sampled from the student. NLLs are means in nats per token, at T = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# kept: low <= delta <= high. degenerate: below, the student is less sure of its own answer than the
# teacher. disconnected: above, the teacher finds the answer far less likely than the student.
# unscored: there is no delta, so the filter never keeps it.
ZONES = ("kept", "degenerate", "disconnected", "unscored")
# A mean NLL below this is rounding of float32 log-probs: dividing by it would give noise.
MIN_ALONE_NLL = 1e-6
# A float32 log-softmax may give a probability slightly over 1; an NLL further below 0 is an error.
_ROUNDING = 1e-3
FORM = "nll_ratio"  # the published definition of IFD, named in the stored documents
_NUM_BINS, _NUM_EXAMPLES = 40, 4
# Random streams: words of the counter that are 0 for the order of prompts.
_STREAMS = {"control": 1, "examples": 2}


def ifd(conditional_nll: np.ndarray, alone_nll: np.ndarray) -> np.ndarray:
    """IFD [B] of mean NLLs [B], s(y|x) / s(y) (Li et al. 2023): with the prompt over without it, in
    float64; NaN: unscored.

    An answer without a finite ratio is unscored, such as an empty one, whose mean is NaN, and one
    that the model predicts without the prompt (`MIN_ALONE_NLL`). ValueError if an NLL is negative
    beyond rounding: it is then a log-prob.
    """
    conditional, alone = (np.asarray(nll, np.float64) for nll in (conditional_nll, alone_nll))
    for nll in (conditional, alone):
        if np.any(np.isfinite(nll) & (nll < -_ROUNDING)):
            raise ValueError(
                f"a mean NLL is {np.nanmin(nll)}; expected at least 0, the negative of a mean "
                "log-prob"
            )
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        ratio = np.where(alone >= MIN_ALONE_NLL, conditional / alone, np.nan)
    # A finite NLL over an infinite one is 0, which is finite but carries no information.
    is_scored = np.isfinite(conditional) & np.isfinite(alone) & np.isfinite(ratio)
    return np.where(is_scored, ratio, np.nan)


def zones(delta: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    """The zone [B] of every delta [B], one of ZONES. The bounds are inclusive; None: no bound."""
    delta = np.asarray(delta, np.float64)
    conditions = {
        "unscored": ~np.isfinite(delta),
        "degenerate": delta < (-np.inf if low is None else low),
        "disconnected": delta > (np.inf if high is None else high),
    }
    return np.select(list(conditions.values()), list(conditions), "kept")


def quantile_bound(delta: np.ndarray, low: float | None, quantile: float) -> float | None:
    """The smallest delta d such that at least this share of the deltas that are not below `low` are
    <= d; None if there are no such deltas.
    """
    eligible = np.asarray(delta, np.float64)[zones(delta, low, None) == "kept"]
    return float(np.quantile(eligible, quantile, method="inverted_cdf")) if eligible.size else None


def random_control(num_kept: int, num: int, *, seed: int, version: int, number: int) -> np.ndarray:
    """Which of `num` samples to keep [num], bool: `num_kept` of them, at random; a function of its
    arguments. ValueError if there are fewer.
    """
    chosen = np.zeros(num, bool)
    chosen[_generator("control", seed, version, number).choice(num, num_kept, replace=False)] = True
    return chosen


def _generator(stream: str, seed: int, version: int, number: int) -> np.random.Generator:
    return np.random.Generator(
        np.random.Philox(key=seed, counter=[0, _STREAMS[stream], version, number])
    )


def document(
    facts: dict[str, Any],
    kept: np.ndarray,
    samples: dict[str, np.ndarray],
    is_correct: np.ndarray | None,
    texts_of: Callable[[int], tuple[str, str]],
    seed: int,
) -> dict[str, Any]:
    """The filter's decision on samples [B] and its reasons, the content of `filter-NUMBER.json`.

    `facts`: version, number, filter (none, ifd or random), form, and the bounds ifd_min and ifd_max
    that were applied. `kept` is the decision; with `random` it is not the zone of that name.
    `samples`: their prompt_id, sample_id, student_ifd and teacher_ifd. `is_correct` [B], bool; None
    if they are not graded. `texts_of(i)`, prompt and completion, is called only for the examples: a
    few of the kept, the degenerate and the disconnected samples, chosen by `seed`.
    """
    measures = {"delta": samples["teacher_ifd"] - samples["student_ifd"]}
    measures |= {name: samples[name] for name in ("student_ifd", "teacher_ifd")}
    delta = measures["delta"]
    zone = zones(delta, facts["ifd_min"], facts["ifd_max"])
    draw = _generator("examples", seed, facts["version"], facts["number"])

    def example(i: int) -> dict[str, Any]:
        finite = lambda value: float(value) if np.isfinite(value) else None
        return {
            "prompt_id": int(samples["prompt_id"][i]),
            "sample_id": int(samples["sample_id"][i]),
            **dict(zip(("prompt", "completion"), texts_of(i))),
            **{name: finite(values[i]) for name, values in measures.items()},
            "is_correct": None if is_correct is None else bool(is_correct[i]),
        }

    def examples(is_shown: np.ndarray) -> list[dict[str, Any]]:
        chosen = draw.permutation(np.flatnonzero(is_shown))[:_NUM_EXAMPLES]
        return [example(i) for i in sorted(chosen.tolist())]

    others = {name: zone == name for name in ZONES if name != "kept"}
    shown = {"kept": kept} | {name: others[name] for name in ("degenerate", "disconnected")}
    graded = {} if is_correct is None else {"right": is_correct, "wrong": ~is_correct}
    by_correctness = {
        name: {"num": int(of.sum()), "kept": int(kept[of].sum())} for name, of in graded.items()
    }
    return {
        **facts,
        "num_samples": len(delta),
        "num_kept": int(kept.sum()),
        **{f"num_{name}": int(is_in.sum()) for name, is_in in others.items()},
        "histogram": histogram(delta),
        "by_correctness": by_correctness or None,
        "examples": {name: examples(is_in) for name, is_in in shown.items()},
        "kept": kept.astype(int).tolist(),
    }


def histogram(delta: np.ndarray) -> dict[str, list]:
    """`counts` of scored deltas between `edges`; the outer bins hold the values beyond them too."""
    scored = np.asarray(delta, np.float64)
    scored = scored[np.isfinite(scored)]
    if not scored.size:
        return {"edges": [], "counts": []}
    first, last = np.quantile(scored, [0.01, 0.99])
    edges = np.array([first - 0.5, first + 0.5])
    if first < last:
        edges = np.linspace(first, last, _NUM_BINS + 1)
    counts, _ = np.histogram(np.clip(scored, edges[0], edges[-1]), edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
