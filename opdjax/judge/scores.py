"""Scores from single verdicts. A total that a judge declares is never read."""

from __future__ import annotations

from collections.abc import Sequence

from opdjax.judge.schema import Criterion, Rubric


def score(criteria: Sequence[Criterion], verdicts: Sequence[int]) -> float:
    """`sum_k w_k u_k / sum_k w_k` in [0, 1], u the earned share (ROPD, arXiv 2605.07396, 2.2).

    Verdicts are 0 or 1; of graded criteria 0, 1 or 2, where 1 counts half. A negative criterion
    earns points for an absent flaw (RubricEM, arXiv 2605.10899, appendix C). No criteria: 0.
    """
    total = sum(criterion.weight for criterion in criteria)
    if not total:
        return 0.0
    pairs = zip(criteria, verdicts)
    return sum(criterion.weight * share(criterion, verdict) for criterion, verdict in pairs) / total


def share(criterion: Criterion, verdict: int) -> float:
    """The share of a criterion's weight that a verdict earns, from 0 to 1."""
    met = verdict / 2 if criterion.grade == "graded" else float(verdict)
    return 1 - met if criterion.polarity == "negative" else met


def stage_scores(
    rubric: Rubric, verdicts: Sequence[int], stages: Sequence[str]
) -> tuple[float, ...]:
    """The score of each stage by its own criteria; 0 for a stage without criteria.

    Such a stage has one score in all rollouts of the group, so its advantage is 0.
    """
    pairs = list(zip(rubric.criteria, verdicts))
    of_stage = ([(c, v) for c, v in pairs if c.stage == stage] for stage in stages)
    return tuple(score([c for c, _ in chosen], [v for _, v in chosen]) for chosen in of_stage)
