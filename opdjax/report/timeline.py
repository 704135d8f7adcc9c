"""The facts of a run's time: what learner and generator did, and what each stage cost."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from opdjax.report.drawing import REST, Shares, finite
from opdjax.runs.results import Run, Span, read_timeline

WARM = 0.05  # a step is warm if the learner waited for less than this share of its time
_STEPS = 30  # in the window that shows every span
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
    found = {who: read_timeline(run.workdir, who) for who in ("generator", "learner")}
    lanes = {who: spans for who, spans in found.items() if spans}
    if not lanes:
        return None
    busy = covered(itertools.chain(*lanes.values()))
    total = sum(end - start for start, end in busy)
    gaps = [(end, start) for (_, end), (start, _) in itertools.pairwise(busy)]
    pauses = [(start, end) for start, end in gaps if end - start > _PAUSE * total]
    lost, ends = (np.array([end - start for start, end in pauses]), [end for _, end in pauses])
    at = lambda time: float(time - busy[0][0] - lost[: sum(end <= time for end in ends)].sum())
    lanes = {
        who: [dataclasses.replace(_renamed(who, span), start=at(span.start)) for span in spans]
        for who, spans in lanes.items()
    }
    learner, length = lanes.get("learner", []), at(busy[-1][1])
    steps = waits(learner)
    warm = warm_after(steps)
    window, window_steps = _window(lanes) or (None, None)
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
        "window": window,  # (start, end) of the steps drawn span by span
        "window_steps": window_steps,
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


def _renamed(who: str, span: Span) -> Span:
    """The span with its step counted by the update that uses it."""
    if who == "generator":  # it numbers steps from 0, as its files
        return dataclasses.replace(span, step=span.step + 1)
    # A learner that samples for itself waits for its own rollouts.
    return dataclasses.replace(span, what="wait") if span.what in ("sample", "annotate") else span


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
    """Of each kind of span of a process, in the order of KINDS, and of time in no span; `share` is
    of the time from the first span to the last.
    """
    length, found = spans[-1].end - spans[0].start, {}
    by_kind: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for span in spans:
        by_kind.setdefault(span.what, []).append(span.seconds)
    rest = length - _length(spans)
    by_kind["in no span"] = [rest] if rest > 5e-4 * length else []
    for kind, seconds in by_kind.items():
        if seconds:
            share = sum(seconds) / length if length else None
            found[kind] = {"count": len(seconds), "seconds": sum(seconds), "share": share}
            found[kind]["median"] = statistics.median(seconds)
    return found


def _window(lanes: Lanes) -> tuple[tuple[float, float], tuple[int, int]] | None:
    """((start, end), (first, last step)) of some steps around the generator's last work."""
    spans = lanes.get("learner", [])
    steps = sorted({span.step for span in spans})
    if len(steps) < 3:
        return None
    last = max((span.step for span in lanes.get("generator", ())), default=steps[-1])
    place = sum(step < last for step in steps) - _STEPS // 3
    shown = steps[max(0, min(place, len(steps) - _STEPS)) :][:_STEPS]
    inside = [span for span in spans if shown[0] <= span.step <= shown[-1]]
    ends = min(span.start for span in inside), max(span.end for span in inside)
    return ends, (shown[0], shown[-1])


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


# For the drawing


def shares_of_time(lanes: Lanes, start: float, end: float) -> tuple[np.ndarray, dict[str, Shares]]:
    """(edges of stretches of time, seconds from `start`; by process, the share of each stretch that
    each colour takes). Stretches end where a span does, or, of very many spans, are equal.
    """
    times = [time for spans in lanes.values() for s in spans for time in (s.start, s.end)]
    edges = np.unique(np.clip([start, end, *times], start, end))
    if len(edges) > _MANY_EDGES:
        # Bins of few steps would show where their edges fall, not how time was spent.
        steps = max(len({span.step for span in spans}) for spans in lanes.values())
        edges = np.linspace(start, end, min(_BINS, max(12, steps // 5)) + 1)

    def shares(spans: Sequence[Span]) -> Shares:
        by_slot: dict[int, list[Span]] = {}
        for span in spans:
            by_slot.setdefault(KINDS.get(span.what, 5), []).append(span)
        return [(slot, busy_shares(own, edges)) for slot, own in by_slot.items()]

    return edges - start, {who: shares(spans) for who, spans in lanes.items()}


def busy_shares(spans: Sequence[Span], edges: np.ndarray) -> np.ndarray:
    """The share of each interval between two edges that the spans cover."""
    knots = np.array(covered(spans))
    spent = np.concatenate(([0.0], np.cumsum(knots[:, 1] - knots[:, 0])))
    at = np.interp(edges, knots.ravel(), np.repeat(spent, 2)[1:-1])
    return np.diff(at) / np.diff(edges)
