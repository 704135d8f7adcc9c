"""The part of a run's page that is about time: who was busy when, who waited, and what each stage
cost.
"""

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
    join,
    number,
    section,
    table,
    table_row,
    tag,
)
from opdjax.report.measures import covered
from opdjax.report.near_policy_charts import WHATS, Lanes, gantt, slot_of, time_key, whole_run
from opdjax.report.rollouts import percent
from opdjax.runs.results import Run, Span, is_number, read_timeline

WARM = 0.05  # a step is warm that waited for less than this share of its time
_STEPS = 30  # of the window that is shown span by span
_PAUSE = 0.1  # a gap longer than this share of all recorded time is cut out of the axis
_WORDS = {
    "wait": "wait for rollouts",
    "admit": "held back",
    "teacher": "teacher scores",
    "annotate": "teacher annotates",
    "store": "write to disk",
    "pack": "pack rows",
    "publish": "publish weights",
}
_ABOUT = {
    "wait": "the learner had no rollouts to train on: somebody else was drawing them, or it had to itself",
    "admit": "the generator was not let ahead: what it would draw would be staler than allowed, or nothing was asked of it",
    "generate": "the student draws completions",
    "annotate": "the teacher reads them and what it says of each token is kept",
    "store": "samples and annotations are written to disk",
    "pack": "rollouts are read, filtered and put into rows, as far as that was not done while an update ran",
    "teacher": "the teacher scores the rows of an update; next to nothing where its scores were stored",
    "update": "forward, backward and optimizer",
    "publish": "the new weights are handed to the generator",
}
# The stages of the pipeline, with the spans that they are made of.
_STAGES = {
    "generate": ("generate",),
    "annotate": ("annotate",),
    "filter": ("filter",),
    "store": ("store",),
    "pack": ("pack",),
    "train": ("teacher", "update", "publish"),
}


@dataclasses.dataclass(frozen=True)
class TimelineData:
    """The spans of both on one clock: seconds since the first, pauses cut out."""

    lanes: Lanes
    length: float
    cuts: tuple[float, ...]  # where a pause was
    cut_seconds: float
    outside: float  # seconds of `length` in which neither had a span

    def of(self, who: str) -> Sequence[Span]:
        """The spans of the learner or the generator."""
        return self.lanes.get(who, ())


def timeline_of(run: Run) -> TimelineData | None:
    """None where nobody wrote what it spent its time on."""
    lanes = {
        who: spans for who in ("generator", "learner") if (spans := read_timeline(run.workdir, who))
    }
    if not lanes:
        return None
    busy = covered(span for spans in lanes.values() for span in spans)
    total = sum(end - start for start, end in busy)
    gaps = [(end, start) for (_, end), (start, _) in itertools.pairwise(busy)]
    pauses = [gap for gap in gaps if gap[1] - gap[0] > _PAUSE * total]
    begin, lost = busy[0][0], np.array([end - start for start, end in pauses])
    ends = np.array([end for _, end in pauses])

    def at(time: float) -> float:
        return float(time - begin - lost[ends <= time].sum()) if len(ends) else time - begin

    moved = {
        who: [_as_drawn(who, span, at(span.start)) for span in spans]
        for who, spans in lanes.items()
    }
    length = at(busy[-1][1])
    return TimelineData(
        moved, length, tuple(at(end) for end in ends), float(lost.sum()), max(length - total, 0.0)
    )


def _as_drawn(who: str, span: Span, start: float) -> Span:
    """Both count steps by the update that is done with them, and a learner that draws for itself
    waits for what it draws.
    """
    if who == "generator":  # whose steps are numbered as its files are, from 0
        return dataclasses.replace(span, start=start, step=span.step + 1)
    return dataclasses.replace(
        span, start=start, what="wait" if span.what in ("sample", "annotate") else span.what
    )


# How long the learner waited


def waits(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """(seconds waited for rollouts, seconds in all) of each step of the learner, in order."""
    found: dict[int, list[float]] = {}
    for span in spans:
        step = found.setdefault(span.step, [0.0, 0.0])
        step[0] += span.seconds if span.what == "wait" else 0.0
        step[1] += span.seconds
    return [(waited, seconds) for _, (waited, seconds) in sorted(found.items())]


def warm_after(steps: Sequence[tuple[float, float]]) -> int | None:
    """Steps before the first that waited for less than WARM of its time; None where none did."""
    return next(
        (number for number, (waited, seconds) in enumerate(steps) if waited < WARM * seconds), None
    )


def _idle(steps: Sequence[tuple[float, float]]) -> float:
    """Share of the steps' time that was waiting."""
    return sum(waited for waited, _ in steps) / (sum(seconds for _, seconds in steps) or 1.0)


def idle_sentence(spans: Sequence[Span]) -> str:
    """How much of the learner's time went by waiting for rollouts, once there were any in store."""
    steps = waits(spans)
    if not steps:
        return ""
    warm, whole = warm_after(steps), f"{percent(_idle(steps))} of its time over the whole run"
    if warm is None:
        return f"The learner waited for rollouts in every step: {whole}."
    if warm == 0:
        return f"The learner was idle for generation {whole}."
    after = "the first step" if warm == 1 else f"the first {warm:,} steps"
    return f"Learner idle for generation after {after}: {percent(_idle(steps[warm:]))} of its time ({whole})."


def overlap(timeline: TimelineData) -> float | None:
    """Share of the generator's working time in which the learner worked too; None where one of them
    never did.
    """
    drawing, learning = (
        [span for span in timeline.of(who) if slot_of(span.what) != REST]
        for who in ("generator", "learner")
    )
    if not drawing or not learning:
        return None
    return max(0.0, _length(drawing) + _length(learning) - _length([*drawing, *learning])) / (
        _length(drawing) or 1.0
    )


def _length(spans: Sequence[Span]) -> float:
    """Seconds that lie in any of the spans."""
    return sum(end - start for start, end in covered(spans))


# The page


def timeline_section(run: Run, timeline: TimelineData | None) -> Html | None:
    """Learner and generator side by side; None where neither wrote a timeline."""
    if timeline is None:
        return None
    sentence, together = idle_sentence(timeline.of("learner")), overlap(timeline)
    if together is not None:
        sentence += f" {percent(together) if together > 5e-4 else 'Nothing'} of the generator's work was done while the learner worked too."
    window, title = _window(timeline)
    left_out = (
        f" {count(len(timeline.cuts), 'pause')} (dotted) of {duration(timeline.cut_seconds)} in all left out."
        if timeline.cuts
        else ""
    )
    about = (
        "An empty stretch of a lane was not timed: evaluation, checkpoints, start-up, or a generator of which nothing is asked. Numbers in "
        f"the spans: the step that rollouts were drawn for, and the step that they updated.{left_out}"
    )
    return section(
        "timeline",
        "Timeline",
        tag("p", sentence, class_="finding") if sentence else None,
        tag("p", about, class_="quiet"),
        time_key(timeline.lanes, _WORDS),
        None if window is None else gantt(title, timeline.lanes, window),
        whole_run(
            f"The whole run, {duration(timeline.length)}",
            timeline.lanes,
            timeline.length,
            timeline.cuts,
        ),
        tag("h3", "Shares of each one's time"),
        _share_table(timeline),
        _meanings(timeline),
    )


def _window(timeline: TimelineData) -> tuple[tuple[float, float] | None, str]:
    """From when to when some steps are shown, and what to call that: once the learner no longer
    waits, or around its last long wait.
    """
    spans = timeline.of("learner")
    steps, waited = sorted({span.step for span in spans}), waits(spans)
    if len(steps) < 3:
        return None, ""
    found = _steps_from(spans, steps, max(warm_after(waited) or 1, 1))
    if not any(span.end > found[0] and span.start < found[1] for span in timeline.of("generator")):
        last = max(
            (number for number, (wait, seconds) in enumerate(waited) if wait >= WARM * seconds),
            default=0,
        )
        found = _steps_from(spans, steps, last - _STEPS // 3)
    start, end, first, last = found
    return (start, end), f"Steps {first:,} to {last:,}, span by span"


def _steps_from(
    spans: Sequence[Span], steps: Sequence[int], place: int
) -> tuple[float, float, int, int]:
    """(start, end, first step, last step) of some steps in a row, the first of them at this place
    among all where there are enough.
    """
    place = max(0, min(place, len(steps) - _STEPS))
    shown = steps[place : place + _STEPS]
    inside = [span for span in spans if shown[0] <= span.step <= shown[-1]]
    return min(span.start for span in inside), max(span.end for span in inside), shown[0], shown[-1]


def _share_table(timeline: TimelineData) -> Html:
    rows: list[Html] = []
    for who, spans in timeline.lanes.items():
        length = spans[-1].end - spans[0].start
        rows.append(table_row([who, "", "", "", ""], class_="section"))
        kinds = {span.what for span in spans}
        for what in [name for name in WHATS if name in kinds] + sorted(kinds - WHATS.keys()):
            rows.append(
                table_row(
                    [what, *_cells([span.seconds for span in spans if span.what == what], length)]
                )
            )
        rest = length - _length(spans)
        if rest > 5e-4 * length:
            rows.append(
                table_row(["in no span", "", number(_tenths(rest)), percent(rest / length), ""])
            )
    caption = "Shares of the time from one's first span to its last. What does not happen in its own lane is not in its share."
    return table(["", "spans", "seconds", "share", "median span, s"], rows, caption=caption)


def _cells(seconds: list[float], length: float) -> list[str]:
    total = sum(seconds)
    middle = number(float(f"{statistics.median(seconds):.3g}"))
    return [
        f"{len(seconds):,}",
        number(_tenths(total)),
        percent(total / length if length else None),
        middle,
    ]


def _tenths(seconds: float) -> float:
    return round(max(seconds, 0.0), 1)


def _meanings(timeline: TimelineData) -> Html:
    present = {span.what for spans in timeline.lanes.values() for span in spans}
    words = {what: meaning for what, meaning in _ABOUT.items() if what in present}
    words["after the first … steps"] = (
        f"counted from the first step that waited for rollouts for less than {WARM:.0%} of its own time"
    )
    return definitions(words)


def cost_section(run: Run, timeline: TimelineData | None) -> Html | None:
    """What each stage cost, and the two ways to count tokens a second; None where neither wrote a
    timeline.
    """
    spans = [] if timeline is None else [span for lane in timeline.lanes.values() for span in lane]
    seconds = {
        stage: sum(span.seconds for span in spans if span.what in parts)
        for stage, parts in _STAGES.items()
    }
    seconds = {stage: value for stage, value in seconds.items() if value > 0}
    total = sum(seconds.values())
    if timeline is None or not total:
        return None
    rows = [
        [stage, number(_tenths(value)), percent(value / total)] for stage, value in seconds.items()
    ]
    rows.append(table_row(["all stages", number(_tenths(total)), percent(1.0)], class_="main"))
    filtering = "" if "filter" in seconds else " Filtering is a part of pack."
    caption = (
        f"Work of learner and generator added up; who waits is not counted.{filtering} NPD (arXiv 2605.05940) reports 366 accelerator "
        "hours for its main run: 82 % generation, 11 % training, 5 % annotation, 2 % other."
    )
    speeds = _speeds(run, timeline)
    return section(
        "cost",
        "Cost of the stages",
        tag("p", speeds[0], class_="finding") if speeds else None,
        table(["stage", "seconds", "share"], rows, caption=caption),
        speeds[1] if speeds else None,
    )


def _speeds(run: Run, timeline: TimelineData) -> tuple[str, Html] | None:
    """Trained tokens a second of the learner alone and of everything, in words and as a table."""
    tokens = [value for value in run.column("perf/trained_tokens") if is_number(value)]
    updates = [span.seconds for span in timeline.of("learner") if span.what == "update"]
    if not tokens or not updates:
        return None
    # The first update compiles: it says nothing of a long run. End to end it is counted, as
    # everything is.
    steady = len(tokens) == len(updates) > 1
    alone = sum(tokens[steady:]), sum(updates[steady:])
    whole = sum(tokens), timeline.length - timeline.outside
    rates = [amount / spent if spent else None for amount, spent in (alone, whole)]
    names = (
        f"learner alone, while it updates{', its first update left out' if steady else ''}",
        "end to end, every second in which either worked or waited",
    )
    rows = [
        [name, f"{amount:,.0f}", number(_tenths(spent)), number(rate and float(f"{rate:.4g}"))]
        for name, (amount, spent), rate in zip(names, (alone, whole), rates)
    ]
    if not all(rates):
        return None
    text = f"The learner trains on {_rate(rates[0])} tokens a second while it updates, and on {_rate(rates[1])} end to end: "
    text += f"{number(float(f'{rates[0] / rates[1]:.2g}'))} times fewer. "
    text += "A speed-up is told by the second number; one that counts updates alone leaves out what drew the rollouts."
    caption = "Tokens that carried a gradient. Evaluation and checkpoints are in neither."
    return text, join(
        (table(["tokens a second", "tokens", "seconds", "tokens/s"], rows, caption=caption),)
    )


def _rate(value: float) -> str:
    return number(float(f"{value:.3g}"))
