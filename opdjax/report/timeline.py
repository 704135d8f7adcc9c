"""The sections of a run's page on time: what learner and generator did, and the cost of stages."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence

import numpy as np

from opdjax.report.charts import REST
from opdjax.report.markup import (
    Html,
    count,
    definitions,
    duration,
    group_row,
    number,
    percent,
    section,
    significant,
    table,
    table_row,
    tag,
)
from opdjax.report.measures import covered
from opdjax.report.timeline_charts import Lanes, gantt, in_order, slot_of, time_key, whole_run
from opdjax.runs.results import Run, Span, is_number, read_timeline

WARM = 0.05  # a step is warm if the learner waited for less than this share of its time
_STEPS = 30  # in the window that shows every span
_PAUSE = 0.1  # gaps longer than this share of all recorded time are cut out of the axis
_NAMES = {
    "wait": "wait for rollouts",
    "admit": "held back",
    "teacher": "teacher scores",
    "annotate": "teacher annotates",
    "store": "write to disk",
    "pack": "pack rows",
    "publish": "publish weights",
}
_MEANINGS = {
    "wait": "the learner has no rollouts to train on",
    "admit": "the generator may not sample yet: its rollouts would be staler than allowed, or no"
    " rollouts are requested",
    "generate": "the student samples completions",
    "annotate": "the teacher scores the completions, and its scores are stored",
    "store": "samples and annotations are written to disk",
    "pack": "rollouts are read, filtered and packed into rows, unless that was done during an"
    " update",
    "teacher": "the teacher scores the rows of an update; short where its scores were stored",
    "update": "forward, backward and optimizer",
    "publish": "the new weights are passed to the generator",
}
# The stages of the pipeline, with the spans that belong to them.
_STAGES = {name: (name,) for name in ("generate", "annotate", "filter", "store", "pack")}
_STAGES["train"] = ("teacher", "update", "publish")


@dataclasses.dataclass(frozen=True)
class TimelineData:
    """The spans of learner and generator on one clock: seconds since the first, without pauses."""

    lanes: Lanes
    length: float
    cuts: tuple[float, ...]  # times of the pauses that were cut out
    cut_seconds: float
    outside: float  # seconds of `length` that no span covers

    def of(self, who: str) -> Sequence[Span]:
        """The spans of the learner or the generator."""
        return self.lanes.get(who, ())


def timeline_of(run: Run) -> TimelineData | None:
    """The timelines that the run recorded; None where there are none."""
    found = {who: read_timeline(run.workdir, who) for who in ("generator", "learner")}
    lanes = {who: spans for who, spans in found.items() if spans}
    if not lanes:
        return None
    busy = covered(span for spans in lanes.values() for span in spans)
    total = sum(end - start for start, end in busy)
    gaps = [(end, start) for (_, end), (start, _) in itertools.pairwise(busy)]
    pauses = [(start, end) for start, end in gaps if end - start > _PAUSE * total]
    lost = np.array([end - start for start, end in pauses])
    ends = np.array([end for _, end in pauses])

    def at(time: float) -> float:
        return float(time - busy[0][0] - lost[ends <= time].sum()) if pauses else time - busy[0][0]

    moved = {who: [_moved(who, one, at(one.start)) for one in lane] for who, lane in lanes.items()}
    length, cuts = at(busy[-1][1]), tuple(at(end) for end in ends)
    return TimelineData(moved, length, cuts, float(lost.sum()), max(length - total, 0.0))


def _moved(who: str, span: Span, start: float) -> Span:
    """The span on the common clock, with steps counted by the update that uses them."""
    if who == "generator":  # it numbers steps from 0, as its files
        return dataclasses.replace(span, start=start, step=span.step + 1)
    # A learner that samples for itself waits for its own rollouts.
    kind = "wait" if span.what in ("sample", "annotate") else span.what
    return dataclasses.replace(span, start=start, what=kind)


# The learner's waiting time


def waits(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """(seconds waited for rollouts, all seconds) of each step of the learner, in order."""
    found: dict[int, list[float]] = {}
    for span in spans:
        step = found.setdefault(span.step, [0.0, 0.0])
        step[0] += span.seconds if span.what == "wait" else 0.0
        step[1] += span.seconds
    return [(waited, seconds) for _, (waited, seconds) in sorted(found.items())]


def warm_after(steps: Sequence[tuple[float, float]]) -> int | None:
    """Number of steps before the first warm one; None where no step is warm."""
    is_warm = [waited < WARM * seconds for waited, seconds in steps]
    return is_warm.index(True) if True in is_warm else None


def idle_sentence(spans: Sequence[Span]) -> str:
    """The share of the learner's time that it waited for rollouts, from the first warm step on."""
    steps = waits(spans)
    if not steps:
        return ""
    idle = lambda part: percent(sum(wait for wait, _ in part) / (sum(s for _, s in part) or 1.0))
    warm, whole = warm_after(steps), f"{idle(steps)} of its time over the whole run"
    if warm is None:
        return f"The learner waited for rollouts in every step: {whole}."
    if warm == 0:
        return f"The learner waited for rollouts {whole}."
    first = "the first step" if warm == 1 else f"the first {warm:,} steps"
    return (
        f"After {first} the learner waited for rollouts {idle(steps[warm:])} of its time ({whole})."
    )


def overlap(timeline: TimelineData) -> float | None:
    """Share of the generator's working time in which the learner worked too; None if unknown."""
    generating, learning = (
        [span for span in timeline.of(who) if slot_of(span.what) != REST]
        for who in ("generator", "learner")
    )
    if not generating or not learning:
        return None
    both = _length(generating) + _length(learning) - _length([*generating, *learning])
    return max(0.0, both) / (_length(generating) or 1.0)


def _length(spans: Sequence[Span]) -> float:
    """Seconds that the spans cover."""
    return sum(end - start for start, end in covered(spans))


# The sections


def timeline_section(run: Run, timeline: TimelineData | None) -> Html | None:
    """Learner and generator side by side; None where no timeline was recorded."""
    if timeline is None:
        return None
    lead, together = idle_sentence(timeline.of("learner")), overlap(timeline)
    if together is not None:
        lead += f" The learner worked during {percent(together)} of the generator's working time."
    about = (
        "An empty stretch of a lane was not timed: evaluation, checkpoints, start-up, or a"
        " generator without requests. Numbers in the spans: the step that the rollouts are for, or"
        " the step of the update."
    )
    if timeline.cuts:
        pauses = count(len(timeline.cuts), "pause")
        about += f" {pauses} (dotted), {duration(timeline.cut_seconds)} in total, left out."
    window, title = _window(timeline)
    lanes, length = timeline.lanes, timeline.length
    return section(
        "timeline",
        "Timeline",
        time_key(lanes, _NAMES),
        None if window is None else gantt(title, lanes, window),
        whole_run(f"The whole run, {duration(length)}", lanes, length, timeline.cuts),
        tag("h3", "Shares of each process's time"),
        _share_table(timeline),
        _meanings(timeline),
        lead=lead.strip(),
        about=about,
    )


def _window(timeline: TimelineData) -> tuple[tuple[float, float] | None, str]:
    """(start, end) of some steps and their title: from the first warm step on.

    If the generator does nothing then, the window is around the learner's last long wait.
    """
    spans = timeline.of("learner")
    steps, waited = sorted({span.step for span in spans}), waits(spans)
    if len(steps) < 3:
        return None, ""
    start, end, title = _steps_from(spans, steps, max(warm_after(waited) or 1, 1))
    if not any(span.end > start and span.start < end for span in timeline.of("generator")):
        long = [at for at, (wait, seconds) in enumerate(waited) if wait >= WARM * seconds]
        start, end, title = _steps_from(spans, steps, max(long, default=0) - _STEPS // 3)
    return (start, end), title


def _steps_from(
    spans: Sequence[Span], steps: Sequence[int], place: int
) -> tuple[float, float, str]:
    """(start, end, title) of consecutive steps, from this place on where there are enough."""
    place = max(0, min(place, len(steps) - _STEPS))
    first, last = steps[place], steps[place : place + _STEPS][-1]
    inside = [span for span in spans if first <= span.step <= last]
    title = f"Steps {first:,} to {last:,}, span by span"
    return min(span.start for span in inside), max(span.end for span in inside), title


def _share_table(timeline: TimelineData) -> Html:
    rows: list[Html] = []
    for who, spans in timeline.lanes.items():
        length = spans[-1].end - spans[0].start
        rows.append(group_row(who, 5))
        for kind in in_order({span.what for span in spans}):
            seconds = [span.seconds for span in spans if span.what == kind]
            total, middle = sum(seconds), significant(statistics.median(seconds))
            share = percent(total / length if length else None)
            rows.append(table_row([kind, f"{len(seconds):,}", _tenths(total), share, middle]))
        rest = length - _length(spans)
        if rest > 5e-4 * length:
            rows.append(table_row(["in no span", "", _tenths(rest), percent(rest / length), ""]))
    caption = (
        "Shares of the time from a process's first span to its last. Work that another process does"
        " at the same time is not included."
    )
    return table(["", "spans", "seconds", "share", "median span, s"], rows, caption=caption)


def _tenths(seconds: float) -> str:
    return number(round(max(seconds, 0.0), 1))


def _meanings(timeline: TimelineData) -> Html:
    present = {span.what for spans in timeline.lanes.values() for span in spans}
    words = {kind: meaning for kind, meaning in _MEANINGS.items() if kind in present}
    words["after the first … steps"] = (
        f"from the first step in which the learner waited for less than {WARM:.0%} of the time"
    )
    return definitions(words)


def cost_section(run: Run, timeline: TimelineData | None) -> Html | None:
    """Cost of each stage, and tokens a second; None where no timeline was recorded."""
    spans = [span for lane in timeline.lanes.values() for span in lane] if timeline else []
    seconds = {
        stage: sum(span.seconds for span in spans if span.what in parts)
        for stage, parts in _STAGES.items()
    }
    total = sum(seconds.values())
    if timeline is None or not total:
        return None
    line = lambda stage, value: [stage, _tenths(value), percent(value / total)]
    rows = [table_row(line(stage, value)) for stage, value in seconds.items() if value > 0]
    rows.append(table_row(line("all stages", total), class_="main"))
    filtering = "" if seconds["filter"] else " Filtering is part of pack."
    caption = (
        f"Work of learner and generator added up, without waiting.{filtering} NPD (arXiv"
        " 2605.05940) reports 366 accelerator hours for its main run: 82 % generation, 11 %"
        " training, 5 % annotation, 2 % other."
    )
    lead, speeds = _speeds(run, timeline)
    costs = table(["stage", "seconds", "share"], rows, caption=caption)
    return section("cost", "Cost of the stages", costs, speeds, lead=lead)


def _speeds(run: Run, timeline: TimelineData) -> tuple[str, Html | None]:
    """Trained tokens a second of the learner alone and of the whole run: (sentence, table)."""
    tokens = [value for value in run.column("perf/trained_tokens") if is_number(value)]
    updates = [span.seconds for span in timeline.of("learner") if span.what == "update"]
    # The first update compiles, which a long run does not notice. The end-to-end rate includes it.
    skip = int(len(tokens) == len(updates) > 1)
    alone = sum(tokens[skip:]), sum(updates[skip:])
    whole = sum(tokens), timeline.length - timeline.outside
    if not all((*alone, *whole)):
        return "", None
    names = (
        f"learner alone, during updates{', without the first' if skip else ''}",
        "end to end, every second in which a process worked or waited",
    )
    rates = [amount / spent for amount, spent in (alone, whole)]
    rows = [
        [name, f"{amount:,.0f}", _tenths(spent), significant(rate, 4)]
        for name, (amount, spent), rate in zip(names, (alone, whole), rates)
    ]
    text = (
        f"The learner trains on {significant(rates[0])} tokens a second during updates, and on"
        f" {significant(rates[1])} end to end, {significant(rates[0] / rates[1], 2)} times fewer."
        " Compare runs by the second number: the first leaves out the cost of the rollouts."
    )
    caption = "Tokens that carried a gradient. Evaluation and checkpoints are not included."
    return text, table(["tokens a second", "tokens", "seconds", "tokens/s"], rows, caption=caption)
