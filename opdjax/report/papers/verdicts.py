"""What runs say of a paper's claims: differences paired by seed, and Student's t. No jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from opdjax.report.papers.tables import PaperClaim, PaperColumn, PaperTable, Value
from opdjax.runs.results import seed_interval

Status = Literal["reproduced", "contradicted", "inconclusive", "not run"]
Seeds = list[tuple[int, float, float]]  # of the left and the right row


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of the paper, and ours."""

    paper: Value | None
    by_seed: Mapping[int, float]  # in a run's own unit
    missing: tuple[str, ...]  # ids of points that are not done
    digest: str | None  # of the config, the seed aside; None where the sweep has no such point
    censored: frozenset[int] = (
        frozenset()
    )  # seeds that never scored as much (PaperColumn.until): theirs is all that they spent

    @property
    def ours(self) -> tuple[float, float] | None:
        """(mean, half of its 95 % interval over seeds), in a run's own unit; None where nothing has
        been run.
        """
        return seed_interval(list(self.by_seed.values())) if self.by_seed else None

    def difference(self, column: PaperColumn) -> float | None:
        """Our mean less the paper's number, in its unit; None where one of them is not there.

        A column of other models than the paper's has no number of the paper: what does not compare
        is never subtracted.
        """
        return (
            None
            if self.paper is None or self.ours is None
            else self.ours[0] * column.scale - self.paper.number
        )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What runs say of a claim in one column: left less right, paired by seed (a ratio: left over
    right; a gap: its share).
    """

    claim: PaperClaim
    column: PaperColumn
    status: Status
    difference: tuple[float, float] | None  # (mean, half of its 95 % interval over seeds)
    n: int  # pairs


def verdicts_of(table: PaperTable, cells: Mapping[tuple[str, str], Cell]) -> list[Verdict]:
    """Of every claim, in every column that reads the same, such as another pair of models; one
    where nothing has been run.
    """
    return [verdict for claim in table.claims for verdict in _of_claim(claim, table, cells)]


def _of_claim(
    claim: PaperClaim, table: PaperTable, cells: Mapping[tuple[str, str], Cell]
) -> list[Verdict]:
    named = table.column(claim.column)
    alike = [column for column in table.columns if _kind(column) == _kind(named)]
    found = [_verdict(claim, column, cells) for column in alike]
    return [verdict for verdict in found if verdict.n] or [
        Verdict(claim, named, "not run", None, 0)
    ]


def _kind(column: PaperColumn) -> tuple[str, str, str]:
    """Scores on whatever benchmark are alike, metrics only with themselves."""
    read = column.read.partition(":")[0] if "@" in column.read else column.read
    return read, column.until, column.spent


def _verdict(
    claim: PaperClaim, column: PaperColumn, cells: Mapping[tuple[str, str], Cell]
) -> Verdict:
    left, right = cells[claim.left, column.label], cells[claim.right, column.label]
    if claim.kind == "gap":
        return _gap(claim, column, left, cells[claim.base, column.label], right)
    pairs = [
        (seed, left.by_seed[seed], right.by_seed[seed])
        for seed in left.by_seed
        if seed in right.by_seed
    ]
    if not pairs:
        return Verdict(claim, column, "not run", None, 0)
    status, difference = (
        _ratio(claim.margin, pairs) if claim.kind == "ratio" else _compared(claim, pairs)
    )
    shared = {seed for seed, _, _ in pairs}
    return Verdict(
        claim,
        column,
        _bounded(status, claim.kind, left.censored & shared, right.censored & shared),
        difference,
        len(pairs),
    )


def _compared(claim: PaperClaim, pairs: Seeds) -> tuple[Status, tuple[float, float]]:
    mean, half = difference = seed_interval([a - b for _, a, b in pairs])
    if claim.kind == "equal":
        return _decide(claim.margin - abs(mean), half), difference
    return _decide((mean if claim.kind == "more" else -mean) - claim.margin, half), difference


def _ratio(margin: float, pairs: Seeds) -> tuple[Status, tuple[float, float] | None]:
    """Of logarithms, whose interval is even; told as a ratio with the larger of its two sides."""
    if any(a <= 0 or b <= 0 for _, a, b in pairs):
        return "inconclusive", None
    mean, half = seed_interval([math.log(a / b) for _, a, b in pairs])
    told = math.exp(mean), math.exp(mean) * math.expm1(half) if half < 50 else math.inf
    return _decide(mean - math.log(margin), half), told


def _gap(claim: PaperClaim, column: PaperColumn, left: Cell, base: Cell, right: Cell) -> Verdict:
    """The start and the goal are the same for every seed where they are of one: a teacher need not
    be measured five times.
    """
    if not (left.by_seed and base.ours and right.ours):
        return Verdict(claim, column, "not run", None, 0)
    triples = [
        (a, base.by_seed.get(seed, base.ours[0]), right.by_seed.get(seed, right.ours[0]))
        for seed, a in left.by_seed.items()
    ]
    if any(goal <= start for _, start, goal in triples):
        return Verdict(claim, column, "inconclusive", None, len(triples))
    mean, half = seed_interval([(a - start) / (goal - start) for a, start, goal in triples])
    return Verdict(claim, column, _decide(mean - claim.margin, half), (mean, half), len(triples))


def _decide(excess: float, half: float) -> Status:
    """Seen where the whole interval is on the claim's side, contradicted where none of it is."""
    return "reproduced" if excess > half else "contradicted" if excess < -half else "inconclusive"


def _bounded(status: Status, kind: str, left: frozenset[int], right: frozenset[int]) -> Status:
    """A run that never got there would have spent more: what it would take back of a verdict is
    undecided.
    """
    more, less = (right, left) if kind != "less" else (left, right)
    if (status == "reproduced" and (more or (kind == "equal" and less))) or (
        status == "contradicted" and less
    ):
        return "inconclusive"
    return status
