"""The checks of the doctor as functions of measured values; doctor.py measures.

The checks that `train` runs too are in rollouts/checks.py. All log-probabilities and tolerances are
in nats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from opdjax.rollouts.checks import SHIFTS, tolerance
from opdjax.rollouts.findings import Finding, fault, finding, warning


def check_padded_vocabulary(
    sampled: np.ndarray,
    width: int,
    valid_vocab: int | None,
    rows: dict[str, int],
    mass: dict[str, float],
) -> Finding:
    """Check that embedding rows beyond the tokenizer are never sampled and have probability 0.

    `sampled`: the sampled ids; `width`: the number of ids of the tokenizer; `valid_vocab`: the
    first id that the run masks. By role, `rows`: the rows of the embedding, and `mass`: the largest
    probability of all ids >= `width` together.
    """
    problems = []
    if beyond := int((sampled >= width).sum()):
        found = f"{beyond} of {sampled.size} sampled tokens are ids from {width} on"
        problems.append(fault(f"{found}, which stand for no token"))
    for role, probability in mass.items():
        if probability != 0:
            found = f"the {role} gives its padded ids {width} to {rows[role] - 1} a probability"
            cause = f"expected 0: the run masks ids from {valid_vocab} on"
            advice = f"set valid_vocab to {width}"
            problems.append(fault(f"{found} of up to {probability:.3g}", cause, advice))
    padding = ", ".join(f"{role} {count - width}" for role, count in rows.items())
    otherwise = f"{width} tokens; embedding rows beyond them ({padding}) have probability 0"
    return finding("padded_vocabulary", problems, otherwise)


def check_sampler_matches_scorer(
    sampled: np.ndarray,
    mask: np.ndarray,
    score_at: Callable[[float], np.ndarray],
    temperature: float,
    dtype: str,
    backend: str,
) -> Finding:
    """Check that the sampler's unfiltered log-probs `[B, T]` are the scorer's where `mask` is 1.

    `score_at(temperature)` returns the scorer's log-probs `[B, T]`, also one column left and right
    of the mask. They tell whether a mismatch comes from a shifted mask, shifted log-probs or
    another temperature.
    """
    name = "sampler_matches_scorer"
    allowed = tolerance(backend, dtype)
    scores = score_at(temperature)

    def gap(mask, sampled=sampled, scores=scores) -> tuple[float, float]:
        difference = np.abs(sampled - scores)[mask]
        return float(difference.mean()), float(difference.max())

    def agrees(mean: float, largest: float) -> bool:
        return mean <= allowed.mean and largest <= allowed.largest

    if not mask.any():
        return Finding(name, "fault", "the mask is empty; expected 1 on the sampled tokens")
    mean, largest = gap(mask)
    found = f"log-probs differ by at most {largest:.2g}, on average by {mean:.2g}"
    found += f" over {int(mask.sum())} tokens"
    if agrees(mean, largest):
        return Finding(name, "ok", f"{found} ({dtype})")
    causes = []
    for side, step in SHIFTS:
        if agrees(*gap(np.roll(mask, -step, axis=1))):
            causes.append(f"the mask is shifted by one column to the {side}")
        if agrees(*gap(mask, sampled=np.roll(sampled, -step, axis=1))):
            causes.append(f"the sampler's log-probs are shifted by one column to the {side}")
    if not causes and temperature != 1 and agrees(*gap(mask, scores=score_at(1.0))):
        other = f"the scorer's of {temperature:g}"
        causes.append(f"the sampler's log-probs are those of temperature 1, {other}")
    is_fault = causes or not mean <= allowed.mean
    if not causes:
        causes = ["the cause is neither a shift nor a temperature: compare weights and dtypes"]
    expected = f"expected at most {allowed.largest:g}, on average {allowed.mean:g} in {dtype}"
    return Finding(name, *(fault if is_fault else warning)(found, expected, *causes))


@dataclasses.dataclass(frozen=True)
class FirstUpdate:
    """What a first update would do: means over the sampled tokens, and the gradient's norm."""

    log_ratio: float  # mean |teacher log-prob - student log-prob|
    kl: float
    loss: float
    gradient_norm: float

    def __str__(self) -> str:
        return (
            f"mean |log-ratio| {self.log_ratio:.2g}, KL {self.kl:.2g}, loss {self.loss:.2g}, "
            f"gradient norm {self.gradient_norm:.2g}"
        )


def check_self_distillation(
    from_itself: FirstUpdate,
    from_teacher: FirstUpdate,
    recipe: str,
    is_zero: bool,
    dtype: str,
    backend: str,
) -> Finding:
    """Check that a student which is its own teacher learns nothing.

    `is_zero`: whether the recipe's loss and gradient are 0 at student = teacher; `dtype`: of both.
    """
    allowed = tolerance(backend, dtype)
    # The norm against the teacher is the scale of "small", unless it is infinite or NaN.
    scale = from_teacher.gradient_norm if np.isfinite(from_teacher.gradient_norm) else 0.0
    largest_norm = max(allowed.gradient * scale, 10 * allowed.mean)
    is_same = from_itself.log_ratio <= allowed.mean and abs(from_itself.kl) <= allowed.mean
    is_still = abs(from_itself.loss) <= allowed.mean and from_itself.gradient_norm <= largest_norm
    problems = []
    if not is_same:
        found = f"a student that is its own teacher disagrees with itself: {from_itself}"
        advice = "give both the same vocabulary mask"
        problems.append(fault(found, "expected 0", advice))
    elif is_zero and not is_still:
        found = f"recipe {recipe!r} updates a student that is its own teacher: {from_itself}"
        problems.append(fault(found, "expected 0", "check its options"))
    otherwise = f"a student that is its own teacher has nothing to learn: {from_itself}"
    if not is_zero:
        otherwise = f"a student that is its own teacher agrees with itself: {from_itself}"
        otherwise += f" (recipe {recipe!r} may have another loss and gradient there)"
    details = [f"against the teacher: {from_teacher}"]
    return finding("self_distillation", problems, otherwise, details)


def check_teacher_dtype(difference: np.ndarray, dtype: str, stored: str, backend: str) -> Finding:
    """Check that the teacher gives the same log-probs in its configured type and in float32.

    `difference`: between the two, of the sampled tokens; then the types of the forward pass and of
    the checkpoint.
    """
    name = "teacher_dtype"
    if dtype == "float32":
        return Finding(name, "ok", f"the teacher computes in float32 (stored as {stored})")
    mean, allowed = float(difference.mean()), tolerance(backend, dtype).mean
    found = f"the teacher computes in {dtype} (stored as {stored}), on average {mean:.2g}"
    found += f" a token and at most {difference.max():.2g} from float32"
    if stored == "float32" or not mean <= allowed:
        advice = "--train.dtype float32 keeps the checkpoint's precision, at twice the memory"
        return Finding(name, *warning(found, advice))
    return Finding(name, "ok", found)


def check_repeated_scores(
    first: np.ndarray,
    again: np.ndarray,
    regrouped: np.ndarray,
    layout: str,
    dtype: str,
    backend: str,
) -> Finding:
    """Check that scoring a batch twice gives the same bits, and another layout the same values.

    `regrouped`: the scores with other micro-batches and the layout that `layout` names.
    """
    allowed = tolerance(backend, dtype).largest

    def largest_difference(other: np.ndarray) -> float:
        # Other checks judge infinities and NaNs; equal ones are no difference here.
        is_same = (first == other) | (np.isnan(first) & np.isnan(other))
        return float(np.max(np.abs(np.where(is_same, 0, first - other)), initial=0))

    repeated, moved = largest_difference(again), largest_difference(regrouped)
    problems = []
    if repeated != 0:
        found = f"two teacher scorings of one batch differ by up to {repeated:.2g}"
        cause = "expected the same bits: a run will not repeat, look for nondeterministic kernels"
        problems.append((warning if repeated <= allowed else fault)(found, cause))
    if not moved <= allowed:
        found = f"with {layout} the teacher's log-probs change by up to {moved:.2g}"
        cause = f"expected at most {allowed:g}: the teacher reads tokens outside the rollout"
        problems.append(fault(found, cause, "check its segment ids"))
    otherwise = f"two scorings give the same bits; with {layout} they differ by {moved:.2g}"
    return finding("repeated_scores", problems, otherwise)


def check_teacher_is_better(
    student: np.ndarray,
    teacher: np.ndarray,
    text: str,
    vocab: int,
    correct: tuple[int, int] | None = None,
    *,
    is_student: bool = False,
) -> Finding:
    """Check that the teacher predicts the text, and predicts it better than the student.

    `student` and `teacher`: NLL a token of each text `[P]`; `text`: `reference answers` or
    `prompts`; `correct`: the number of correct greedy answers of student and teacher, if they can
    be graded; `is_student`: both are one model, and the teacher's prompts show it more.
    """
    name, is_reference = "teacher_is_better", text == "reference answers"
    found = f"NLL a token of the {text}: teacher {teacher.mean():.3g}, student {student.mean():.3g}"
    if correct is not None:
        found += f"; correct greedy answers: teacher {correct[1]}, student {correct[0]}"
        found += f" of {len(teacher)}"
    if not teacher.mean() < np.log(vocab) / 2:
        expected = f"expected less than ln(V)/2 = {np.log(vocab) / 2:.2f}"
        advice = "check the teacher's weights, its tokenizer and its prompt format"
        is_fault = is_reference or np.isnan(teacher).any()
        return Finding(name, *(fault if is_fault else warning)(found, expected, advice))
    if not is_reference:
        note = "without reference answers this does not rank the models"
        return Finding(name, "ok", f"{found} ({note})")
    behind = teacher - student
    if behind.mean() <= 0:
        return Finding(name, "ok", found)
    # A post-trained teacher may phrase answers unlike the references: then its grades count.
    if correct is not None and correct[1] > correct[0]:
        note = "the teacher phrases answers unlike the references, but more of them are correct"
        return Finding(name, "ok", f"{found}: {note}")
    if is_student:
        advice = "the model makes no use of what data.teacher_prompt_format shows it; reword that"
    else:
        advice = "student and teacher look swapped (check --student.path and --teacher.path), or "
        advice += "the teacher does not know its prompt format"
    # Clear: by more than two standard errors over the prompts.
    is_clear = behind.mean() > 2 * behind.std() / np.sqrt(max(len(behind) - 1, 1))
    severity = fault if is_clear and correct is not None else warning
    return Finding(name, *severity(found, f"expected a lower NLL of the teacher: {advice}"))
