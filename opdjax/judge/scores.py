"""From verdicts to numbers. A score is always made of the single verdicts; no total of a judge's is
ever read.
"""

from __future__ import annotations

from collections.abc import Sequence

from opdjax.judge.schema import Criterion, Rubric


def score(criteria: Sequence[Criterion], verdicts: Sequence[int]) -> float:
    """`sum_k w_k u_k / sum_k w_k` in [0, 1], u the share of a criterion that is met (ROPD, arXiv
    2605.07396, section 2.2).

    A verdict is 0 or 1, of a graded criterion 0, 1 or 2, which counts half; a negative criterion
    counts what is not there (RubricEM, arXiv 2605.10899, appendix C). No criteria: 0.
    """
    total = sum(criterion.weight for criterion in criteria)
    return (
        sum(
            criterion.weight * share(criterion, verdict)
            for criterion, verdict in zip(criteria, verdicts)
        )
        / total
        if total
        else 0.0
    )


def share(criterion: Criterion, verdict: int) -> float:
    """How much of a criterion's weight a verdict earns, from 0 to 1."""
    met = verdict / 2 if criterion.grade == "graded" else float(verdict)
    return 1 - met if criterion.polarity == "negative" else met


def stage_scores(
    rubric: Rubric, verdicts: Sequence[int], stages: Sequence[str]
) -> tuple[float, ...]:
    """The score of each stage by its own criteria; 0 for a stage without any.

    A stage that no criterion looks at has then the same score in every rollout of the group, which
    no advantage can see.
    """
    pairs = list(zip(rubric.criteria, verdicts))
    of_stage = ([(c, v) for c, v in pairs if c.stage == stage] for stage in stages)
    return tuple(score([c for c, _ in chosen], [v for _, v in chosen]) for chosen in of_stage)
