"""Delta-IFD: selects stored rollouts that are close enough to both policies to train on (NPD, arXiv
2605.05940). NumPy only.

IFD measures how much a prompt helps a model to predict an answer: near 0 much, at 1 not at all (Li
et al. 2023, arXiv 2308.12032). Delta-IFD is the teacher's IFD minus the student's, on an answer
sampled from the student. NLLs are means in nats per token, at T = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

Form = Literal["nll_ratio", "perplexity_ratio"]
# kept: low <= delta <= high. degenerate: below, the student is less sure of its own answer than the
# teacher. disconnected: above, the teacher finds the answer far less likely than the student.
# unscored: there is no delta, so the filter never keeps it.
ZONES = ("kept", "degenerate", "disconnected", "unscored")
# A mean NLL below this is rounding of float32 log-probs: dividing by it would give noise.
MIN_ALONE_NLL = 1e-6
# A float32 log-softmax may give a probability slightly over 1; an NLL further below 0 is an error.
_ROUNDING = 1e-3
FORM: Form = "nll_ratio"  # of runs: the published definition of IFD
_NUM_BINS = 40
_MARKS = {"right": True, "wrong": False}
# Random streams: words of the counter that are 0 for the order of prompts.
_STREAMS = {"control": 1, "examples": 2}


def ifd(conditional_nll: np.ndarray, alone_nll: np.ndarray, form: Form) -> np.ndarray:
    """IFD [B] of mean NLLs [B] with (`conditional_nll`) and without the prompt (`alone_nll`), in
    float64; NaN: unscored.

    nll_ratio is s(y|x) / s(y) (Li et al. 2023), perplexity_ratio exp(s(y|x) - s(y))
    (Superfiltering, arXiv 2402.00530). An answer without a finite ratio is unscored, such as an
    empty one, whose mean is NaN; under nll_ratio also one that the model predicts without the
    prompt (`MIN_ALONE_NLL`). ValueError if an NLL is negative beyond rounding: it is then a
    log-prob.
    """
    conditional, alone = (np.asarray(nll, np.float64) for nll in (conditional_nll, alone_nll))
    for nll in (conditional, alone):
        if np.any(np.isfinite(nll) & (nll < -_ROUNDING)):
            raise ValueError(
                f"a mean NLL is {np.nanmin(nll)}; expected at least 0, the negative of a mean "
                "log-prob"
            )
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if form == "nll_ratio":
            ratio = np.where(alone >= MIN_ALONE_NLL, conditional / alone, np.nan)
        elif form == "perplexity_ratio":
            ratio = np.exp(conditional - alone)
        else:
            raise ValueError(f"form is {form!r}; expected nll_ratio or perplexity_ratio")
    # exp(-inf) is 0, which is finite but carries no information.
    is_scored = np.isfinite(conditional) & np.isfinite(alone) & np.isfinite(ratio)
    return np.where(is_scored, ratio, np.nan)


def delta_ifd(teacher_ifd: np.ndarray, student_ifd: np.ndarray) -> np.ndarray:
    """Delta-IFD [B]: the teacher's IFD minus the student's; NaN if either is NaN."""
    return np.asarray(teacher_ifd, np.float64) - np.asarray(student_ifd, np.float64)


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
    arguments.
    """
    if not 0 <= num_kept <= num:
        raise ValueError(f"num_kept is {num_kept}; expected 0 to {num}, the number of samples")
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
    is_correct: Sequence[bool | None] | None,
    texts_of: Callable[[int], tuple[str, str]],
    seed: int,
    num_examples: int = 4,
) -> dict[str, Any]:
    """The filter's decision on samples [B] and its reasons, the content of `filter-NUMBER.json`.

    `facts`: version, number, filter (none, ifd or random), form, and the bounds ifd_min and ifd_max
    that were applied. `kept` is the decision; with `random` it is not the zone of that name.
    `samples`: their prompt_id, sample_id, student_ifd and teacher_ifd. `is_correct` is None for an
    ungraded sample. `texts_of(i)`, prompt and completion, is called only for the examples: up to
    `num_examples` of the kept, the degenerate and the disconnected samples, chosen by `seed`.
    """
    student_ifd, teacher_ifd, kept = (
        samples["student_ifd"],
        samples["teacher_ifd"],
        kept.astype(bool),
    )
    delta = delta_ifd(teacher_ifd, student_ifd)
    zone = zones(delta, facts["ifd_min"], facts["ifd_max"])
    draw = _generator("examples", seed, facts["version"], facts["number"])

    def example(i: int) -> dict[str, Any]:
        measures = {"delta": delta[i], "student_ifd": student_ifd[i], "teacher_ifd": teacher_ifd[i]}
        finite = lambda value: float(value) if np.isfinite(value) else None
        is_graded = is_correct is not None and is_correct[i] is not None
        return {
            "prompt_id": int(samples["prompt_id"][i]),
            "sample_id": int(samples["sample_id"][i]),
            **dict(zip(("prompt", "completion"), texts_of(i))),
            **{name: finite(value) for name, value in measures.items()},
            "is_correct": bool(is_correct[i]) if is_graded else None,
        }

    def examples(is_shown: np.ndarray) -> list[dict[str, Any]]:
        chosen = draw.permutation(np.flatnonzero(is_shown))[:num_examples]
        return [example(i) for i in sorted(chosen.tolist())]

    others = {name: zone == name for name in ZONES if name != "kept"}
    shown = {"kept": kept} | {name: others[name] for name in ("degenerate", "disconnected")}
    return {
        **facts,
        "num_samples": len(delta),
        "num_kept": int(kept.sum()),
        **{f"num_{name}": int(is_in.sum()) for name, is_in in others.items()},
        "histogram": histogram(delta),
        "by_correctness": None if is_correct is None else _by_correctness(is_correct, kept),
        "examples": {name: examples(is_in) for name, is_in in shown.items()},
        "kept": kept.astype(int).tolist(),
    }


def histogram(delta: np.ndarray) -> dict[str, list]:
    """`counts` of the scored deltas between `edges`. The outer bins also hold the values beyond
    them, so that outliers do not stretch the histogram.
    """
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


def _by_correctness(
    is_correct: Sequence[bool | None], kept: np.ndarray
) -> dict[str, dict[str, int]]:
    graded = {
        name: [i for i, mark in enumerate(is_correct) if mark is not None and mark == is_right]
        for name, is_right in _MARKS.items()
    }
    return {name: {"num": len(of), "kept": int(kept[of].sum())} for name, of in graded.items()}
