"""The facts of near-policy rollouts: their staleness, what the filter keeps, and their time."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from opdjax.report.drawing import REST, Line, Shares, finite
from opdjax.report.text import spread
from opdjax.runs.results import Run, Span, read_filters, read_timeline
from opdjax.runs.statistics import wilson_interval

ALARM = 0.10  # nats a token: the limit of what NPD calls near-policy
ZONES = ("kept", "degenerate", "disconnected")
AMOUNTS = ("samples", *ZONES, "unscored")
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
    pairs = zip(run.column("step"), run.column(metric))
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
    last = scored[-1]
    return {
        "kind": last["filter"],  # ifd, random or none
        "form": last.get("form", ""),
        "low": last.get("ifd_min"),
        # The distinct upper bounds, ascending: each a quantile of its file.
        "high": sorted(set(finite(one.get("ifd_max") for one in scored))),
        "whole": _counts(scored),
        # By number of updates of the weights that sampled.
        "versions": {version: _counts(own) for version, own in versions.items()},
        "histogram": pooled(scored),
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
    y = [0.0, *np.repeat(counts, 2), 0.0]
    bars = Line(np.repeat(edges, 2), y, np.zeros(len(y)), y)
    return [*(Line([bound, bound], [0.0, max(counts)], slot=1) for bound in near), bars]


def _examples(files: Sequence[Filter]) -> dict[str, list[dict[str, Any]]]:
    own = lambda f, zone: [row | {"version": f["version"]} for row in f["examples"].get(zone, ())]
    rows = {zone: [row for f in files for row in own(f, zone)] for zone in ZONES}
    return {zone: list(spread(found, _EXAMPLES)) for zone, found in rows.items() if found}


# Time: what learner and generator did

WARM = 0.05  # a step is warm if the learner waited for less than this share of its time
_PAUSE = 0.1  # gaps longer than this share of all recorded time are cut out of the axis
_MANY_EDGES, _BINS = 600, 240  # more spans are drawn as shares of time, in at most 240 bins
# The colour of each kind of span: grey for waiting, and one colour for all work of the teacher.
KINDS = {"wait": REST, "admit": REST, "generate": 1, "annotate": 3, "teacher": 3}
KINDS |= {"store": 4, "filter": 2, "pack": 2, "update": 0, "publish": 5}
# The stages of the pipeline, with the spans that belong to them.
_STAGES = {name: (name,) for name in ("generate", "annotate", "filter", "store", "pack")}
_STAGES["train"] = ("teacher", "update", "publish")

Lanes = Mapping[str, Sequence[Span]]  # spans by process, on a clock that starts at 0


def timeline_facts(run: Run) -> dict[str, Any] | None:
    """Learner and generator on one clock: seconds since the first span, without pauses. None where
    no timeline was recorded; WorkdirError for a damaged row.
    """
    names = "generator", "learner"
    lanes = {who: spans for who in names if (spans := read_timeline(run.workdir, who))}
    if not lanes:
        return None
    busy = covered(itertools.chain(*lanes.values()))
    total = sum(end - start for start, end in busy)
    gaps = [(end, start) for (_, end), (start, _) in itertools.pairwise(busy)]
    pauses = [(start, end) for start, end in gaps if end - start > _PAUSE * total]
    lost, ends = (np.array([end - start for start, end in pauses]), [end for _, end in pauses])
    at = lambda time: float(time - busy[0][0] - lost[: sum(end <= time for end in ends)].sum())
    # A learner that samples for itself waits for its own rollouts.
    own = {("learner", "sample"): "wait", ("learner", "annotate"): "wait"}
    placed = lambda who, span: dataclasses.replace(
        span, start=at(span.start), what=own.get((who, span.what), span.what)
    )
    lanes = {who: [placed(who, span) for span in spans] for who, spans in lanes.items()}
    learner, length = lanes.get("learner", []), at(busy[-1][1])
    steps = waits(learner)
    warm = warm_after(steps)
    every = [span for spans in lanes.values() for span in spans]
    stages = {
        stage: sum(span.seconds for span in every if span.what in parts)
        for stage, parts in _STAGES.items()
    }
    return {
        "lanes": lanes,
        "length": length,
        "cuts": [at(end) for end in ends],  # times of the pauses that were cut out
        "cut_seconds": float(lost.sum()),
        "kinds": {who: _kinds(spans) for who, spans in lanes.items()},
        "idle": idle_share(steps),
        "warm_after": warm,
        "idle_warm": None if warm is None else idle_share(steps[warm:]),
        "overlap": _overlap(lanes),
        "stages": {stage: seconds for stage, seconds in stages.items() if seconds > 0},
        **_speeds(run, learner, min(total, length)),
    }


def covered(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """The union of the spans as disjoint (start, end) intervals, in order."""
    found: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda span: span.start):
        if found and span.start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], span.end)
        else:
            found.append((span.start, span.end))
    return found


def waits(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """(seconds waited for rollouts, all seconds) of each step of the learner, in order."""
    step, found = lambda span: span.step, []
    for _, own in itertools.groupby(sorted(spans, key=step), step):
        each = [(span.seconds * (span.what == "wait"), span.seconds) for span in own]
        found.append(tuple(map(sum, zip(*each))))
    return found


def warm_after(steps: Sequence[tuple[float, float]]) -> int | None:
    """Number of steps before the first warm one; None where no step is warm."""
    is_warm = (waited < WARM * seconds for waited, seconds in steps)
    return next((at for at, found in enumerate(is_warm) if found), None)


def idle_share(steps: Sequence[tuple[float, float]]) -> float | None:
    """Share of its time that the learner waited for rollouts; None without steps."""
    total = sum(seconds for _, seconds in steps)
    return sum(waited for waited, _ in steps) / total if total else None


def _overlap(lanes: Lanes) -> float | None:
    """Share of the generator's working time in which the learner worked too."""
    generating, learning = (
        [span for span in lanes.get(who, ()) if KINDS.get(span.what) != REST]
        for who in ("generator", "learner")
    )
    if not generating or not learning:
        return None
    both = _length(generating) + _length(learning) - _length([*generating, *learning])
    return max(0.0, both) / (_length(generating) or 1.0)


def _length(spans: Iterable[Span]) -> float:
    """Seconds that the spans cover."""
    return sum(end - start for start, end in covered(spans))


def _kinds(spans: Sequence[Span]) -> dict[str, dict[str, float | None]]:
    """Of each kind of span and of time in no span; shares are of the time from first to last."""
    length, found = spans[-1].end - spans[0].start, {}
    kinds = dict.fromkeys([*KINDS, *(span.what for span in spans)])
    by_kind = {kind: [span.seconds for span in spans if span.what == kind] for kind in kinds}
    rest = length - _length(spans)
    by_kind["in no span"] = [rest] if rest > 5e-4 * length else []
    for kind, seconds in by_kind.items():
        if seconds:
            share = sum(seconds) / length if length else None
            found[kind] = {"count": len(seconds), "seconds": sum(seconds), "share": share}
            found[kind]["median"] = statistics.median(seconds)
    return found


def _speeds(run: Run, learner: Sequence[Span], seconds: float) -> dict[str, Any]:
    """(trained tokens, seconds) of the learner `alone`, during updates, and of the `whole`: every
    second in which a process worked or waited; None where unknown.
    """
    tokens = finite(run.column("perf/trained_tokens"))
    updates = [span.seconds for span in learner if span.what == "update"]
    # The first update compiles, which a long run does not notice. The end-to-end rate includes it.
    skip = int(len(tokens) == len(updates) > 1)
    speeds = (sum(tokens[skip:]), sum(updates[skip:])), (sum(tokens), seconds)
    alone, whole = speeds if np.all(speeds) else (None, None)
    return {"alone": alone, "is_first_left_out": bool(alone and skip), "whole": whole}


def shares_of_time(lanes: Lanes, length: float) -> tuple[np.ndarray, dict[str, Shares]]:
    """(edges of stretches of time, seconds; by process, the share of each stretch that each colour
    takes). Stretches end where a span does, or, of very many spans, are equal.
    """
    times = (time for spans in lanes.values() for s in spans for time in (s.start, s.end))
    edges = np.unique([0, length, *times])
    if len(edges) > _MANY_EDGES:
        # Bins of few steps would show where their edges fall, not how time was spent.
        steps = max(len({span.step for span in spans}) for spans in lanes.values())
        edges = np.linspace(0, length, min(_BINS, max(12, steps // 5)) + 1)

    def shares(spans: Sequence[Span]) -> Shares:
        by_slot: dict[int, list[Span]] = {}
        for span in spans:
            by_slot.setdefault(KINDS.get(span.what, 5), []).append(span)
        return [(slot, busy_shares(own, edges)) for slot, own in by_slot.items()]

    return edges, {who: shares(spans) for who, spans in lanes.items()}


def busy_shares(spans: Sequence[Span], edges: np.ndarray) -> np.ndarray:
    """The share of each interval between two edges that the spans cover."""
    knots = np.array(covered(spans))
    spent = np.concatenate(([0.0], np.cumsum(knots[:, 1] - knots[:, 0])))
    at = np.interp(edges, knots.ravel(), np.repeat(spent, 2)[1:-1])
    return np.diff(at) / np.diff(edges)
