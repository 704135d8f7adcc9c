"""What runs say of a paper's claims, from differences paired by seed and by prompt. No jax."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from opdjax.config.grid import SCORED_ON
from opdjax.report.papers import testable
from opdjax.report.papers.cells import Cells, Found, Interval, finite, reader
from opdjax.report.papers.tables import PaperClaim, PaperColumn, PaperTable, Row
from opdjax.report.papers.tuning import unequal
from opdjax.runs import statistics
from opdjax.runs.results import Run, SeedGroup, read_group

Status = Literal[
    "reproduced",
    "contradicted",
    "inconclusive",
    "not testable here",  # computed: testable.py
    "not judged",  # computed: tuning.py
    "not run",
]
DECIDED = ("reproduced", "contradicted", "inconclusive")  # what runs say: the family of the tests
_WILD = math.log(10)  # seeds whose ratios spread over more than this are summed up by their median
Bounds = tuple[float | None, float | None]  # None: no bound


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of a claim in one column, in a run's own unit."""

    claim: PaperClaim
    column: PaperColumn
    status: Status
    # Left minus right; the ratio or the share of the gap for claims of that kind. The interval of a
    # ratio is symmetric in its logarithm, and `difference` has the larger half.
    difference: Interval | None = None
    interval: Bounds | None = None  # both ends; None: one seed, or a median of fewer than six
    claimed: Bounds = (None, None)  # the range where the claim holds
    n: int = 0  # pairs
    reason: str = ""  # why it is not judged or not testable
    over: Literal["seeds", "seeds and prompts", "median of seeds"] = "seeds"  # the interval
    greedy: Interval | None = None  # left minus right of greedy answers
    detectable: float | None = None  # Estimate.detectable; of a ratio, as a factor
    p_value: float | None = None  # that an end of the claimed range is the true value
    adjusted: float | None = None  # the p-value after Holm's correction within the table


@dataclasses.dataclass(frozen=True)
class Study:
    """The points and runs behind a table."""

    table: PaperTable
    groups: Sequence[SeedGroup]
    found: Found
    cells: Cells
    reading: Callable[..., Run]

    def runs(self, label: str, column: PaperColumn) -> dict[int, Run]:
        """The runs of a cell by seed."""
        own = self.found[label, column.label]
        return own[1] if own else {}

    def row(self, label: str) -> Row:
        """The row with this label."""
        return next(row for row in self.table.rows if row.label == label)


def verdicts_on(claim: PaperClaim, study: Study) -> list[Verdict]:
    """In all columns of the same quantity that have runs; a single `not run` if none has."""
    columns = study.table.columns
    named = next(column for column in columns if column.label == claim.column)
    alike = [column for column in columns if _kind(column) == _kind(named)]
    found = [_verdict(claim, column, study) for column in alike]
    return [each for each in found if each.n] or [each for each in found if each.column is named]


def adjusted(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """With the p-values of all decided claims of a table adjusted by Holm."""
    values = [each.p_value for each in verdicts if each.status in DECIDED]
    adjusted = iter(statistics.holm([1.0 if p is None else p for p in values]))
    return [
        dataclasses.replace(each, adjusted=next(adjusted)) if each.status in DECIDED else each
        for each in verdicts
    ]


def _kind(column: PaperColumn) -> tuple[str, str, str]:
    """Columns of one kind read the same quantity; scores on all benchmarks are one kind."""
    read = column.read.partition(":")[0] if "@" in column.read else column.read
    return read, column.until, column.spent


def _verdict(claim: PaperClaim, column: PaperColumn, study: Study) -> Verdict:
    left, right = (study.cells[label][column.label] for label in (claim.left, claim.right))
    values = _by_seed(claim, column, study)
    margin = study.table.equivalence if claim.kind == "equal" else claim.margin
    claimed = {"less": (None, 0 - margin), "equal": (-margin, margin)}
    low, high = claimed.get(claim.kind, (margin, None))
    verdict = functools.partial(Verdict, claim, column, claimed=(low, high), n=len(values))
    if not values:
        return verdict("not run")
    greedy = _crossed(claim, "greedy", study, column) if column.read == "avg@k" else None
    verdict = functools.partial(
        verdict, greedy=finite(greedy.value, greedy.half) if greedy and not column.until else None
    )
    if reason := _untestable(claim, column, study, values):
        return verdict("not testable here", reason=reason)
    # The first step comes before any update, so no rate changes it.
    tuned = {claim.left: left.tuning, claim.right: right.tuning}
    if not column.read.startswith("first:") and (reason := unequal(tuned)):
        return verdict("not judged", reason=f"unequal tuning: {reason}")
    if any(map(math.isnan, values.values())):
        return verdict("inconclusive")
    found, over = _estimate(claim, column, study, list(values.values()))
    # A number of a run that never reached its target is a lower bound.
    reach = (
        -math.inf if values.keys() & set(right.censored) else found.interval[0],
        math.inf if values.keys() & set(left.censored) else found.interval[1],
    )
    asked = (math.log(margin), None) if claim.kind == "ratio" else (low, high)
    is_within = statistics.lies_within(reach, asked)
    status = "inconclusive" if is_within is None else "reproduced" if is_within else "contradicted"
    p_value = max(found.p_value(bound) for bound in asked if bound is not None)  # of the nearest
    shown = (found.value, found.half, *found.interval)
    detectable = found.detectable
    if claim.kind == "ratio":
        mean, half, *_ = statistics.ratio_of_logarithm(found.value, found.half)
        shown = (mean, half, *(math.exp(min(end, 700)) for end in found.interval))
        detectable = detectable and math.exp(min(detectable, 700))
    return verdict(
        status,
        finite(*shown[:2]),
        shown[2:] if math.isfinite(found.half) else None,
        over=over,
        detectable=detectable if status == "inconclusive" else None,
        # A bound on the ratio decides on one side only.
        p_value=1.0 if is_within is None and (left.censored or right.censored) else p_value,
    )


def _by_seed(claim: PaperClaim, column: PaperColumn, study: Study) -> dict[int, float]:
    """The difference, logarithm of the ratio or share of the gap of each seed."""
    left, right = (study.cells[label][column.label] for label in (claim.left, claim.right))
    if claim.kind == "gap":
        start = study.cells[claim.base][column.label]
        return statistics.shares_of_gap(left.by_seed, start.by_seed, right.by_seed)
    is_ratio = claim.kind == "ratio"
    return statistics.paired_by_seed(left.by_seed, right.by_seed, is_ratio=is_ratio)


def _untestable(
    claim: PaperClaim, column: PaperColumn, study: Study, values: Mapping[int, float]
) -> str:
    """The first reason for which the runs cannot test the claim; empty if they can."""
    left, right = (study.runs(label, column) for label in (claim.left, claim.right))
    reasons = []
    if column.until and claim.kind == "ratio":
        reasons.append(testable.bounded_ratio(left, right, column.read, column.spent, claim.margin))
    if claim.kind == "gap":
        reasons.append(testable.out_of_reach(_shares(claim, column, study), claim.margin))
    if column.is_timed:
        directories = [point.workdir for group in study.groups for point in group.points]
        runs = [run for each in (left, right) for run in each.values()]
        return next(filter(None, [*reasons, testable.loaded_machine(runs, directories)]), "")
    if "before" not in (study.row(label).when for label in (claim.left, claim.right)):
        reasons.append(testable.never_binds(left, right))
    reasons.append(testable.other_rollouts(left, right, column.read))
    if not any(values.values()) and claim.kind != "gap":
        reasons.append("every seed's difference is exactly 0")
    return next(filter(None, reasons), "")


def _shares(claim: PaperClaim, column: PaperColumn, study: Study) -> dict[str, float]:
    """The share of the claim's gap that each arm of the column's pair closes, by arm."""
    goal, start = (study.cells[x][column.label].by_seed for x in (claim.right, claim.base))
    read, shares = reader(column.read), {}
    for group in study.groups:
        arm, pair = (group.overrides.get(name) for name in ("arm", "pair"))
        if SCORED_ON in group.overrides or arm == study.row(claim.right).arm:
            continue
        if arm and column.pair in ("", pair):
            runs = read_group(group, study.reading)
            known = {run.config["seed"]: x for run in runs if (x := read(run)) is not None}
            if found := statistics.shares_of_gap(known, start, goal):
                shares[arm] = math.fsum(found.values()) / len(found)
    return shares


def _estimate(
    claim: PaperClaim, column: PaperColumn, study: Study, values: Sequence[float]
) -> tuple[statistics.Estimate, str]:
    """The estimate over seeds, and if prompts' scores were kept over both; what it is over."""
    if claim.kind == "ratio" and (column.until or max(values) - min(values) > _WILD):
        return statistics.median_estimate(values), "median of seeds"
    if found := _crossed(claim, column.read, study, column):
        return found, "seeds and prompts"
    return statistics.seed_estimate(values), "seeds"


def _crossed(
    claim: PaperClaim, read: str, study: Study, column: PaperColumn
) -> statistics.Estimate | None:
    """Over seeds and prompts; None without the score of each prompt, or for another kind of number.
    The error of a share of a gap is that of left - start - share * (goal - start), linearised.
    """
    if claim.kind == "ratio" or column.until:
        return None
    labels = (claim.left, claim.right, *filter(None, [claim.base]))
    runs = [study.runs(label, column) for label in labels]
    seeds = sorted(runs[0] if claim.kind == "gap" else runs[0].keys() & runs[1].keys())
    scores = []
    for label, own in zip(labels, runs):
        when = study.row(label).when
        # A teacher need not be measured once per seed.
        per_prompt = [own.get(seed, next(iter(own.values()), None)) for seed in seeds]
        per_prompt = [run and run.per_prompt(read, when) for run in per_prompt]
        scores.append([each for each in per_prompt if each is not None])
    counts = {len(each) for own in scores for each in own}
    if len(seeds) < 2 or len(counts) != 1 or any(len(own) < len(seeds) for own in scores):
        return None
    left, right, *start = map(np.stack, scores)
    if left.shape[1] < 2:
        return None
    if claim.kind != "gap":
        return statistics.crossed_estimate(left - right)
    gap = right - start[0]
    if gap.mean() <= 0:
        return None
    share = (left - start[0]).mean() / gap.mean()
    return statistics.crossed_estimate(share + (left - start[0] - share * gap) / gap.mean())
