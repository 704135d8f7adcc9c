"""The facts of near-policy rollouts: their staleness, and what the sample filter keeps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from opdjax.report import measures
from opdjax.report.drawing import Line, finite, outline
from opdjax.report.text import spread
from opdjax.runs.results import Run, read_filters
from opdjax.runs.statistics import wilson_interval

ALARM = 0.10  # nats a token: the limit of what NPD calls near-policy
ZONES = ("kept", "degenerate", "disconnected")
AMOUNTS = ("samples", *ZONES, "unscored")
_VERSIONS = 6  # histograms side by side; more versions are pooled
_EXAMPLES = 4  # of each zone

Filter = dict[str, Any]  # one filter file: counts, bounds, histogram and examples of its samples


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
    return {
        "kind": last["filter"],  # ifd, random or none
        "form": last.get("form", ""),
        "low": last.get("ifd_min"),
        # The distinct upper bounds, ascending: each a quantile of its file.
        "high": sorted(set(finite(one.get("ifd_max") for one in scored))),
        "whole": _counts(scored),
        # By number of updates of the weights that sampled.
        "versions": {version: _counts(own) for version, own in versions.items()},
        "histograms": {key: one for key, one in pools.items() if one},  # by version; None: all
        "examples": _examples(scored),  # by zone, with their version
    }


def _counts(files: Sequence[Filter]) -> dict[str, Any]:
    """Numbers of samples by zone, and (kept, samples) of right and wrong answers where known.

    `often` is 1 if right answers were kept more often than wrong ones, -1: less often, 0: about as
    often (the 95 % intervals overlap), None: unknown.
    """
    amounts = {f"num_{name}": sum(one[f"num_{name}"] for one in files) for name in AMOUNTS}
    parts = [one.get("by_correctness") for one in files]
    sums = lambda kind: tuple(sum(part[kind][name] for part in parts) for name in ("kept", "num"))
    right, wrong = map(sums, ("right", "wrong")) if all(parts) else (None, None)
    often = None
    if right and wrong and right[1] and wrong[1]:
        (low, high), (least, most) = wilson_interval(*right), wilson_interval(*wrong)
        often = int(low > most) - int(least > high)
    return amounts | {"right": right, "wrong": wrong, "often": often}


def pooled(files: Sequence[Filter]) -> dict[str, list[float]] | None:
    """The sum of the files' histograms, and the lower and upper `bounds`, each the median over the
    files. None where all histograms are empty.

    Where edges differ, the samples of a bar are spread evenly over its width.
    """
    pairs = [[one["histogram"].get(name, ()) for name in ("edges", "counts")] for one in files]
    found = [[np.asarray(side, float) for side in pair] for pair in pairs if len(pair[1])]
    if not found:
        return None
    known = [finite(one.get(key) for one in files) for key in ("ifd_min", "ifd_max")]
    edges = found[0][0]
    if any(not np.array_equal(own, edges) for own, _ in found):
        low, high = min(own[0] for own, _ in found), max(own[-1] for own, _ in found)
        edges = np.linspace(low, high, max(len(counts) for _, counts in found) + 1)
    below = lambda own, counts: np.interp(edges, own, np.concatenate(([0.0], np.cumsum(counts))))
    return {
        "edges": edges.tolist(),
        "counts": sum(np.diff(below(*each)) for each in found).tolist(),
        "bounds": [statistics.median(values) for values in known if values],
    }


def histogram_lines(
    edges: Sequence[float], counts: Sequence[float], bounds: Sequence[float]
) -> list[Line]:
    """The filled outline of a histogram, where it has samples, and a line at each bound nearby."""
    filled = np.flatnonzero(counts)
    if not filled.size:
        return []
    edges, counts = edges[filled[0] : filled[-1] + 2], counts[filled[0] : filled[-1] + 1]
    width, middle = edges[-1] - edges[0], (edges[0] + edges[-1]) / 2
    near = [bound for bound in bounds if abs(bound - middle) < 1.5 * width]
    lines = [Line([bound, bound], [0.0, max(counts)], slot=1) for bound in near]
    return [*lines, outline(edges, counts)]


def _examples(files: Sequence[Filter]) -> dict[str, list[dict[str, Any]]]:
    own = lambda f, zone: [row | {"version": f["version"]} for row in f["examples"].get(zone, ())]
    rows = {zone: [row for f in files for row in own(f, zone)] for zone in ZONES}
    return {zone: list(spread(found, _EXAMPLES)) for zone, found in rows.items() if found}
