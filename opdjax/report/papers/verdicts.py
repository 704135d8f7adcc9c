"""Tests the claims of papers on runs: t intervals of differences paired by seed. No jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from opdjax.report.papers.tables import PaperClaim, PaperColumn, PaperTable, Value
from opdjax.runs.statistics import seed_interval

Status = Literal["reproduced", "contradicted", "inconclusive", "not run"]
Pairs = list[tuple[float, float]]  # (left, right) of the same seed


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number of the paper, and ours."""

    paper: Value | None
    by_seed: Mapping[int, float]  # in a run's own unit
    missing: tuple[str, ...]  # ids of points that are not done
    digest: str | None  # of the config without the seed; None: the sweep has no such point
    # Seeds that never reached the target of PaperColumn.until; their value is all that they spent.
    censored: frozenset[int] = frozenset()

    @property
    def ours(self) -> tuple[float, float] | None:
        """(mean, half width of its 95 % interval over seeds), in a run's own unit; None if nothing
        has been run.
        """
        return seed_interval(list(self.by_seed.values())) if self.by_seed else None

    def difference(self, column: PaperColumn) -> float | None:
        """Our mean minus the paper's number, in the paper's unit; None if either is missing.

        A column for other models than the paper's has no number of the paper, so numbers of
        different models are never subtracted.
        """
        if self.paper is None or self.ours is None:
            return None
        return self.ours[0] * column.scale - self.paper.number


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of a claim in one column."""

    claim: PaperClaim
    column: PaperColumn
    status: Status
    # (mean, half width of its 95 % interval over seeds) of left minus right; of the ratio or the
    # share of the gap for claims of that kind
    difference: tuple[float, float] | None
    n: int  # pairs


def verdicts_of(table: PaperTable, cells: Mapping[tuple[str, str], Cell]) -> list[Verdict]:
    """The verdicts of every claim, in all columns that read the same quantity (other benchmarks or
    pairs of models) and have runs; a single `not run` if none has.
    """
    return [verdict for claim in table.claims for verdict in _of_claim(claim, table, cells)]


def _of_claim(
    claim: PaperClaim, table: PaperTable, cells: Mapping[tuple[str, str], Cell]
) -> list[Verdict]:
    named = table.column(claim.column)
    alike = [column for column in table.columns if _kind(column) == _kind(named)]
    found = [_verdict(claim, column, cells) for column in alike]
    return [verdict for verdict in found if verdict.n] or [_not_run(claim, named)]


def _kind(column: PaperColumn) -> tuple[str, str, str]:
    """Columns of one kind read the same quantity; scores on all benchmarks are one kind."""
    read = column.read.partition(":")[0] if "@" in column.read else column.read
    return read, column.until, column.spent


def _not_run(claim: PaperClaim, column: PaperColumn) -> Verdict:
    return Verdict(claim, column, "not run", None, 0)


def _verdict(
    claim: PaperClaim, column: PaperColumn, cells: Mapping[tuple[str, str], Cell]
) -> Verdict:
    left, right = cells[claim.left, column.label], cells[claim.right, column.label]
    if claim.kind == "gap":
        return _gap(claim, column, left, cells[claim.base, column.label], right)
    shared = [seed for seed in left.by_seed if seed in right.by_seed]
    if not shared:
        return _not_run(claim, column)
    pairs = [(left.by_seed[seed], right.by_seed[seed]) for seed in shared]
    test = _ratio if claim.kind == "ratio" else _compared
    status, difference = test(claim, pairs)
    is_censored = [bool(cell.censored.intersection(shared)) for cell in (left, right)]
    return Verdict(
        claim, column, _bounded(status, claim.kind, *is_censored), difference, len(pairs)
    )


def _compared(claim: PaperClaim, pairs: Pairs) -> tuple[Status, tuple[float, float]]:
    mean, half = difference = seed_interval([a - b for a, b in pairs])
    if claim.kind == "equal":
        return _decide(claim.margin - abs(mean), half), difference
    return _decide((mean if claim.kind == "more" else -mean) - claim.margin, half), difference


def _ratio(claim: PaperClaim, pairs: Pairs) -> tuple[Status, tuple[float, float] | None]:
    """Decides on logarithms, whose interval is symmetric; returns the ratio and the larger of the
    two half widths.
    """
    if any(a <= 0 or b <= 0 for a, b in pairs):
        return "inconclusive", None
    mean, half = seed_interval([math.log(a / b) for a, b in pairs])
    width = math.exp(mean) * math.expm1(half) if half < 50 else math.inf
    return _decide(mean - math.log(claim.margin), half), (math.exp(mean), width)


def _gap(claim: PaperClaim, column: PaperColumn, left: Cell, base: Cell, right: Cell) -> Verdict:
    """A seed without its own start or goal takes the mean over the others: a teacher need not be
    measured once per seed.
    """
    if not (left.by_seed and base.ours and right.ours):
        return _not_run(claim, column)
    triples = [
        (a, base.by_seed.get(seed, base.ours[0]), right.by_seed.get(seed, right.ours[0]))
        for seed, a in left.by_seed.items()
    ]
    if any(goal <= start for _, start, goal in triples):
        return Verdict(claim, column, "inconclusive", None, len(triples))
    mean, half = seed_interval([(a - start) / (goal - start) for a, start, goal in triples])
    return Verdict(claim, column, _decide(mean - claim.margin, half), (mean, half), len(triples))


def _decide(excess: float, half: float) -> Status:
    """Reproduced if the whole interval is on the claim's side, contradicted if none of it is."""
    if excess > half:
        return "reproduced"
    return "contradicted" if excess < -half else "inconclusive"


def _bounded(status: Status, kind: str, is_left: bool, is_right: bool) -> Status:
    """The status where the left or right value is a lower bound, from a run that never reached its
    target: inconclusive if larger values could change it.
    """
    grows, shrinks = (is_left, is_right) if kind == "less" else (is_right, is_left)
    if status == "reproduced" and (grows or (kind == "equal" and shrinks)):
        return "inconclusive"
    return "inconclusive" if status == "contradicted" and shrinks else status
