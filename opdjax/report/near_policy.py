"""The facts of near-policy rollouts: their staleness, and what the sample filter keeps."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from opdjax.report import measures
from opdjax.report.drawing import Bars
from opdjax.report.text import spread
from opdjax.runs.results import Run, is_number, read_filters
from opdjax.runs.statistics import wilson_interval

ALARM = 0.10  # nats a token: the limit of what NPD calls near-policy
ZONES = {"kept": 2, "degenerate": 1, "disconnected": 3}  # with their colours
_VERSIONS = 6  # histograms side by side; more versions are pooled
_EXAMPLES = 4  # of each zone
AMOUNTS = ("samples", "kept", "degenerate", "disconnected", "unscored")

Filter = dict[str, Any]  # one filter file: counts, bounds, histogram and examples of its samples
Bounds = tuple[float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Crossing:
    """When a distance exceeded ALARM: (step, value) of its peak, first and last crossing."""

    peak: tuple[int, float]
    above: tuple[tuple[int, float], ...]
    num_measured: int


@dataclasses.dataclass(frozen=True)
class StalenessFacts:
    """How far the student is from the policy that sampled; None where not measured."""

    trained: Crossing | None  # KL(student || behaviour) of the trained tokens
    every: Crossing | None  # of all rollouts, kept or not
    max_staleness: int


def staleness_facts(run: Run) -> StalenessFacts | None:
    """None for on-policy runs."""
    if not run.is_near_policy or all(value is None for value in run.column("staleness/mean")):
        return None
    found = (_crossing(run, f"staleness/{name}") for name in ("kl", "kl_all"))
    return StalenessFacts(*found, run.config["near_policy"].get("max_staleness", 0))


def _crossing(run: Run, metric: str) -> Crossing | None:
    pairs = zip(measures.steps_of(run), run.column(metric))
    known = [(step, value) for step, value in pairs if value is not None]
    if not known:
        return None
    above = tuple(pair for pair in known if pair[1] > ALARM)
    return Crossing(max(known, key=lambda pair: pair[1]), above, len(known))


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Numbers of samples between consecutive edges: one edge more than counts."""

    edges: np.ndarray
    counts: np.ndarray
    bounds: Bounds = (None, None)

    def pieces(self) -> Iterator[tuple[str, float, float, float]]:
        """(zone, left, right, height) of every bar; a bar with a bound inside gives two pieces."""
        low, high = (e if b is None else b for b, e in zip(self.bounds, (-np.inf, np.inf)))
        zones = {"degenerate": (-np.inf, low), "kept": (low, high), "disconnected": (high, np.inf)}
        for left, right, height in zip(self.edges, self.edges[1:], self.counts):
            for zone, (start, end) in zones.items():
                start, end = max(left, start), min(right, end)
                if start < end and height > 0:
                    yield zone, float(start), float(end), float(height)

    def bars(self) -> list[Bars]:
        """The pieces as bars, a kind for each zone."""
        found = []
        for zone, slot in ZONES.items():
            own = [piece[1:] for piece in self.pieces() if piece[0] == zone]
            left = [start + 0.04 * (end - start) for start, end, _ in own]
            width = [0.92 * (end - start) for start, end, _ in own]
            found.append(Bars([height for _, _, height in own], slot, False, left, width))
        return found


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of samples by zone, and (kept, samples) of right and wrong answers where known."""

    amounts: dict[str, int]
    right: tuple[int, int] | None
    wrong: tuple[int, int] | None

    @property
    def rates(self) -> tuple[tuple[int, int] | None, ...]:
        """(kept, samples) of all, right and wrong answers."""
        return (self.amounts["kept"], self.amounts["samples"]), self.right, self.wrong

    @property
    def often(self) -> int | None:
        """1: right answers were kept more often than wrong ones, -1: less often, 0: about as often
        (the 95 % intervals overlap); None where unknown.
        """
        if not (self.right and self.wrong and self.right[1] and self.wrong[1]):
            return None
        (low, high), (other_low, other_high) = (
            wilson_interval(*each) for each in (self.right, self.wrong)
        )
        return 1 if low > other_high else -1 if other_low > high else 0


@dataclasses.dataclass(frozen=True)
class FilterFacts:
    """What the Delta-IFD filter kept."""

    kind: str  # ifd, random or none
    form: str
    low: float | None
    high: tuple[float, ...]  # the distinct upper bounds, ascending: each a quantile of its file
    idle: tuple[str, ...]  # zones beyond a bound that no sample exceeded
    whole: Counts
    versions: dict[int, Counts]  # by number of updates of the weights that sampled
    is_apart: bool  # one histogram a version
    histograms: dict[int | None, Histogram]  # by version; None: all samples
    x_range: tuple[float, float]
    examples: dict[str, list[dict[str, Any]]]  # by zone, with their version
    schedule: str


def filter_facts(run: Run) -> FilterFacts | None:
    """None where no sample was scored."""
    found = read_filters(run.workdir) if run.is_near_policy else []
    scored = [f for f in found if f["filter"] != "none" or sum(f["histogram"].get("counts", ()))]
    if not scored:
        return None
    versions: dict[int, list[Filter]] = {}
    for one in scored:
        versions.setdefault(one["version"], []).append(one)
    is_apart, last = 1 < len(versions) <= _VERSIONS, scored[-1]
    parts = versions if is_apart else {None: scored}
    histograms = {key: pooled(files) for key, files in parts.items()}
    histograms = {key: one for key, one in histograms.items() if one is not None}
    whole = _counts(scored)
    ends = (("low", "ifd_min", "degenerate"), ("high", "ifd_max", "disconnected"))
    return FilterFacts(
        last["filter"],
        last.get("form", ""),
        last.get("ifd_min"),
        tuple(sorted({one["ifd_max"] for one in scored if is_number(one.get("ifd_max"))})),
        tuple(
            end for end, key, zone in ends if is_number(last.get(key)) and not whole.amounts[zone]
        ),
        whole,
        {version: _counts(files) for version, files in versions.items()},
        is_apart,
        histograms,
        _x_range(list(histograms.values()), _bounds(scored)),
        _examples(scored),
        run.config["near_policy"]["schedule"],
    )


def _counts(files: Sequence[Filter]) -> Counts:
    parts = [one.get("by_correctness") for one in files]
    sums = lambda kind: tuple(sum(part[kind][name] for part in parts) for name in ("kept", "num"))
    right, wrong = map(sums, ("right", "wrong")) if all(parts) else (None, None)
    return Counts({n: sum(f[f"num_{n}"] for f in files) for n in AMOUNTS}, right, wrong)


def _bounds(files: Sequence[Filter]) -> Bounds:
    """The bounds of the files; where they differ, their median."""
    ends = [[one.get(f"ifd_{end}") for one in files] for end in ("min", "max")]
    known = [[value for value in values if is_number(value)] for values in ends]
    return tuple(statistics.median(values) if values else None for values in known)


def pooled(files: Sequence[Filter]) -> Histogram | None:
    """The sum of the files' histograms, with their bounds; None where all are empty.

    Where edges differ, the samples of a bar are spread evenly over its width.
    """
    pairs = [[one["histogram"].get(name, ()) for name in ("edges", "counts")] for one in files]
    found = [[np.asarray(side, float) for side in pair] for pair in pairs if len(pair[1])]
    if not found:
        return None
    bounds, first = _bounds(files), found[0][0]
    if all(np.array_equal(edges, first) for edges, _ in found):
        return Histogram(first, sum(counts for _, counts in found), bounds)
    low, high = min(edges[0] for edges, _ in found), max(edges[-1] for edges, _ in found)
    edges = np.linspace(low, high, max(len(counts) for _, counts in found) + 1)
    below = lambda own, counts: np.interp(edges, own, np.concatenate(([0], np.cumsum(counts))))
    return Histogram(edges, sum(np.diff(below(*each)) for each in found), bounds)


def _x_range(pools: Sequence[Histogram], bounds: Bounds) -> tuple[float, float]:
    """The range that has samples, and the bounds that are near it."""
    bars = [(one.edges, at) for one in pools for at in np.flatnonzero(one.counts)]
    filled = [float(edge) for edges, at in bars for edge in edges[at : at + 2]]
    low, high = (min(filled), max(filled)) if filled else (0.0, 1.0)
    width = high - low
    near = [bound for bound in bounds if bound is not None and low - width < bound < high + width]
    low, high = min([low, *near]), max([high, *near])
    return low - 0.03 * (high - low), high + 0.03 * (high - low)


def _examples(files: Sequence[Filter]) -> dict[str, list[dict[str, Any]]]:
    own = lambda f, zone: [row | {"version": f["version"]} for row in f["examples"].get(zone, ())]
    rows = {zone: [row for f in files for row in own(f, zone)] for zone in ZONES}
    return {zone: list(spread(found, _EXAMPLES)) for zone, found in rows.items() if found}
