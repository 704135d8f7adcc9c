"""The facts of near-policy rollouts: their staleness, and what the sample filter keeps."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from opdjax.report import measures
from opdjax.report.drawing import Bars, finite
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


def staleness_facts(run: Run) -> dict[str, Any] | None:
    """How far the student is from the policy that sampled: KL(student || behaviour) of the
    `trained` tokens and of `every` rollout, kept or not. None for on-policy runs.
    """
    if not run.is_near_policy or not finite(run.column("staleness/mean")):
        return None
    return {
        "trained": _crossing(run, "staleness/kl"),
        "every": _crossing(run, "staleness/kl_all"),
        "max_staleness": run.config["near_policy"].get("max_staleness", 0),
    }


def _crossing(run: Run, metric: str) -> dict[str, Any] | None:
    """When a distance exceeded ALARM: (step, value) of its peak and of each crossing."""
    pairs = zip(measures.steps_of(run), run.column(metric))
    known = [(step, value) for step, value in pairs if value is not None]
    if not known:
        return None
    peak = max(known, key=lambda pair: pair[1])
    above = [pair for pair in known if pair[1] > ALARM]
    return {"peak": peak, "above": above, "num_measured": len(known)}


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Numbers of samples between consecutive edges: one edge more than counts."""

    edges: np.ndarray
    counts: np.ndarray
    bounds: Bounds = (None, None)

    def bars(self) -> list[Bars]:
        """A kind of bars for each of ZONES; a bar with a bound inside is cut there."""
        low, high = (e if b is None else b for b, e in zip(self.bounds, (-np.inf, np.inf)))
        ends = {"kept": (low, high), "degenerate": (-np.inf, low), "disconnected": (high, np.inf)}
        found = []
        for zone, slot in ZONES.items():
            left, right = np.clip([self.edges[:-1], self.edges[1:]], *ends[zone])
            own = (left < right) & (self.counts > 0)
            width = 0.95 * (right[own] - left[own])
            sides = {"left": left[own].tolist(), "width": width.tolist()}
            found.append(Bars(self.counts[own].tolist(), slot, **sides))
        return found


def filter_facts(run: Run) -> dict[str, Any] | None:
    """What the Delta-IFD filter kept; None where no sample was scored."""
    found = read_filters(run.workdir) if run.is_near_policy else []
    scored = [f for f in found if f["filter"] != "none" or sum(f["histogram"].get("counts", ()))]
    if not scored:
        return None
    versions: dict[int, list[Filter]] = {}
    for one in scored:
        versions.setdefault(one["version"], []).append(one)
    is_apart, last = 1 < len(versions) <= _VERSIONS, scored[-1]
    pools = {key: pooled(own) for key, own in (versions if is_apart else {None: scored}).items()}
    histograms = {key: one for key, one in pools.items() if one is not None}
    whole = _counts(scored)
    ends = (("low", "ifd_min", "degenerate"), ("high", "ifd_max", "disconnected"))
    return {
        "kind": last["filter"],  # ifd, random or none
        "form": last.get("form", ""),
        "low": last.get("ifd_min"),
        # The distinct upper bounds, ascending: each a quantile of its file.
        "high": sorted(set(finite(one.get("ifd_max") for one in scored))),
        # The ends beyond which there is no sample.
        "idle": [
            end
            for end, key, zone in ends
            if is_number(last.get(key)) and not whole["amounts"][zone]
        ],
        "whole": whole,
        # By number of updates of the weights that sampled.
        "versions": {version: _counts(own) for version, own in versions.items()},
        "is_apart": is_apart,  # one histogram a version
        "histograms": histograms,  # by version; None: all samples
        "x_range": _x_range(list(histograms.values()), _bounds(scored)),
        "examples": _examples(scored),  # by zone, with their version
    }


def _counts(files: Sequence[Filter]) -> dict[str, Any]:
    """Numbers of samples by zone, and (kept, samples) of right and wrong answers where known.

    `often` is 1 if right answers were kept more often than wrong ones, -1: less often, 0: about as
    often (the 95 % intervals overlap), None: unknown.
    """
    amounts = {name: sum(one[f"num_{name}"] for one in files) for name in AMOUNTS}
    parts = [one.get("by_correctness") for one in files]
    sums = lambda kind: tuple(sum(part[kind][name] for part in parts) for name in ("kept", "num"))
    right, wrong = map(sums, ("right", "wrong")) if all(parts) else (None, None)
    often = None
    if right and wrong and right[1] and wrong[1]:
        (low, high), (least, most) = wilson_interval(*right), wilson_interval(*wrong)
        often = int(low > most) - int(least > high)
    return {"amounts": amounts, "right": right, "wrong": wrong, "often": often}


def _bounds(files: Sequence[Filter]) -> Bounds:
    """The bounds of the files; where they differ, their median."""
    known = [finite(one.get(key) for one in files) for key in ("ifd_min", "ifd_max")]
    return tuple(statistics.median(values) if values else None for values in known)


def pooled(files: Sequence[Filter]) -> Histogram | None:
    """The sum of the files' histograms, with their bounds; None where all are empty.

    Where edges differ, the samples of a bar are spread evenly over its width.
    """
    pairs = [[one["histogram"].get(name, ()) for name in ("edges", "counts")] for one in files]
    found = [[np.asarray(side, float) for side in pair] for pair in pairs if len(pair[1])]
    if not found:
        return None
    bounds, edges = _bounds(files), found[0][0]
    if any(not np.array_equal(own, edges) for own, _ in found):
        low, high = min(own[0] for own, _ in found), max(own[-1] for own, _ in found)
        edges = np.linspace(low, high, max(len(counts) for _, counts in found) + 1)
    below = lambda own, counts: np.interp(edges, own, np.concatenate(([0.0], np.cumsum(counts))))
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
