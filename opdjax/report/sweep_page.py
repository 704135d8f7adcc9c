"""The page of a sweep: finished points, the scores of each group over its seeds, and failures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from opdjax.config.saved import upgrade
from opdjax.config.validation import ConfigError
from opdjax.report import measures
from opdjax.report.arms import ahead_section, judged_arms_section
from opdjax.report.config_diff import arms_differ_section
from opdjax.report.markup import (
    Html,
    count,
    definitions,
    details,
    duration,
    fixed,
    join,
    listed,
    notice,
    number,
    plus_minus,
    section,
    shown,
    table,
    table_row,
    tag,
    text_head,
)
from opdjax.report.measures import skipped_steps
from opdjax.report.paper_claims import compared, of_table, paper_sections
from opdjax.report.pareto import pareto_section
from opdjax.report.ranking import (
    Interval,
    Ranked,
    common_k,
    comparison_notices,
    final,
    label,
    ranked,
    score_before,
    short_names,
)
from opdjax.report.side_by_side import Marker, arms_section, unmarked
from opdjax.report.sweep_charts import (
    curves_section,
    joined_links,
    learning_rate_section,
    positions_section,
    training_section,
    whisker,
)
from opdjax.runs.results import Point, Run, read_run
from opdjax.runs.workdir import WorkdirError

_VARYING = 6  # most settings in a point's row
_STATES = {"done": "done", "failed": "failed", "begun": "unfinished", "waiting": "not begun"}
# Columns of near-policy groups.
_AHEAD = {"staleness KL": lambda run: run.staleness, "keep rate": lambda run: run.keep_rate}
_AHEAD_WORDS = {
    "staleness KL": "KL(student || behaviour) of the tokens trained on, nats a token, mean over "
    "the last 10 steps: how far the student was from the policy that sampled; near-policy is below "
    "0.10 (NPD, arXiv 2605.05940)",
    "keep rate": "share of the samples that the filter kept, mean over all steps",
}

Anchors = dict[str, str]  # id of a point -> id of its row


def sweep_page(
    points: list[Point], name: str, mark: Marker = unmarked, paper: str | None = None
) -> tuple[str, list[Html | None]]:
    """(title, parts of the page); `paper` restricts the page to one table of a paper."""
    points, damaged = readable(points)
    papers = compared(points, paper)
    if paper is not None:
        points, name = of_table(points, paper), f"{name}: {paper}"
    every = ranked(points)
    entries = [entry for entry in every if not entry.is_reference] or every
    anchors = {point.id: f"point-{number}" for number, point in enumerate(points, 1)}
    k = common_k(every)
    return f"Sweep {name}", [
        _header(points, entries, name, k, damaged),
        *paper_sections(papers, is_narrowed=paper is not None),
        _group_section(every, anchors, k),
        pareto_section(entries, k),
        arms_differ_section(entries),
        learning_rate_section(entries, k),
        curves_section(entries, k),
        training_section(entries),
        positions_section(entries),
        judged_arms_section(entries),
        ahead_section(entries),
        arms_section(entries, mark),
        _failures(points, anchors),
        _point_section(points, anchors, k),
        _common(points),
    ]


def readable(points: list[Point]) -> tuple[list[Point], dict[str, str]]:
    """(readable points, error by id of the others): a damaged file, or a config of a newer version,
    must not hide other runs. WorkdirError if no point is readable.
    """
    damaged: dict[str, str] = {}
    for point in points:
        try:
            upgrade(point.config)
            if point.status in ("done", "begun"):
                upgrade(read_run(point.workdir).config)
        except (WorkdirError, ConfigError) as error:
            damaged[point.id] = str(error)
    kept = [point for point in points if point.id not in damaged]
    if not kept:
        raise WorkdirError(next(iter(damaged.values())))
    return kept, damaged


def _header(
    points: list[Point], entries: list[Ranked], name: str, k: int | None, damaged: dict[str, str]
) -> Html:
    states = [_STATES[point.status] for point in points]
    missing = [
        f"{states.count(state)} {state}"
        for state in ("failed", "unfinished", "not begun")
        if state in states
    ]
    rest = f" ({', '.join(missing)})" if missing else ""
    lead = f"{states.count('done')} of {count(len(points), 'point')} done{rest}."
    about = (
        "Each point is one training run: a student language model learns from a teacher. A group "
        "is the points with the same settings but the seed; only they are averaged."
    )
    warnings = [notice(text, kind=kind) for kind, text in comparison_notices(entries)]
    warnings += [
        notice(f"{id} is left out, it cannot be read: {error}", kind="warning")
        for id, error in damaged.items()
    ]
    return tag(
        "header",
        tag("h1", f"Sweep {name}"),
        tag("p", lead, class_="lead"),
        _best(entries, k),
        tag("p", about, class_="quiet"),
        *warnings,
    )


def _best(entries: list[Ranked], k: int | None) -> Html | None:
    best = entries[0].over_seeds(final("avg@k"))
    if best is None:
        return None
    finished = sum(bool(entry.runs) for entry in entries)
    groups = f"{finished} finished groups" if finished > 1 else "the one finished group"
    score, seeds = measures.score_label("avg@k", k), count(len(entries[0].runs), "seed")
    tied = [
        entry
        for entry in entries
        if fixed((entry.over_seeds(final("avg@k")) or (None,))[0]) == fixed(best[0])
    ]
    if len(tied) == finished > 1:
        return tag("p", f"All {groups} have the same {score}: {fixed(best[0])}.")
    if len(tied) > 1:
        what = f"{len(tied)} of {groups} share the highest {score}, {fixed(best[0])}: "
        return tag("p", what, tag("strong", listed([label(entry) for entry in tied])), ".")
    return tag(
        "p",
        f"Highest {score} of {groups}: {plus_minus(*best)} over {seeds}, with ",
        tag("strong", label(entries[0])),
        ".",
    )


# Groups


def _group_section(entries: list[Ranked], anchors: Anchors, k: int | None) -> Html:
    finished = [entry for entry in entries if entry.runs]
    named = list(dict.fromkeys(name for entry in entries for name in entry.settings)) or ["group"]
    ahead = {
        name: read for name, read in _AHEAD.items() if any(e.over_seeds(read) for e in entries)
    }
    labels = [measures.score_label(score, k) for score in measures.SCORES]
    low, high = _plot_range(entries)
    head = [
        *named,
        "n",
        tag("th", scope="col", aria_label=f"{labels[0]}, drawn"),
        *labels,
        *("gain", "median gradient norm", "KL, last 10 steps"),
        *ahead,
        "seconds",
        text_head("seeds"),
    ]
    reads = list(ahead.values())
    rows = [_group_row(entry, named, anchors, (low, high), reads) for entry in finished]
    start = [score_before(entries, score) for score in measures.SCORES]
    if any(value is not None for value in start):
        blank = [""] * (len(named) + 1)
        rest = [""] * (5 + len(ahead))
        rows.append(table_row(["before training", *blank, *map(fixed, start), *rest]))
    caption = (
        "Mean ± half a 95 % interval over seeds (Student's t, n − 1 degrees of freedom; ± ∞: one "
        f"seed has none), not over prompts. Ordered by {labels[0]}; the plot runs from "
        f"{fixed(low)} to {fixed(high)}."
    )
    chance = (
        "The best of many groups is partly lucky: choose on validation prompts, then report its "
        "score on others."
    )
    return section(
        "groups",
        "Groups",
        table(head, rows, caption=caption, class_="dense") if finished else None,
        _unfinished(entries, named, anchors),
        tag("p", chance, class_="quiet") if len(entries) > 3 else None,
        definitions(_words(labels, ahead)),
    )


def _words(labels: list[str], ahead: dict[str, Any]) -> dict[str, str]:
    """The meaning of the columns."""
    avg, greedy, best = labels
    return {
        avg: "share of right answers among the sampled ones, averaged over held-out prompts, after "
        "training",
        greedy: "share of prompts whose greedy answer is right",
        best: "share of prompts where at least one sampled answer is right",
        "gain": f"{avg} after training minus before, on the same prompts",
        "KL": "KL(student || teacher) in nats a token, mean over the last 10 steps of training",
        **{name: meaning for name, meaning in _AHEAD_WORDS.items() if name in ahead},
        "n": "finished points, which are averaged; missing seeds failed or are not finished (see "
        "Points)",
    }


def _plot_range(entries: list[Ranked]) -> tuple[float, float]:
    """The scale of the plots: the extent of all intervals, without the teacher's."""
    found = [e.over_seeds(final("avg@k")) for e in entries if not e.is_reference]
    spans = [(mean, half if math.isfinite(half) else 0.0) for mean, half in filter(None, found)]
    if not spans:
        return 0.0, 1.0
    return min(mean - half for mean, half in spans), max(mean + half for mean, half in spans)


def _group_row(
    entry: Ranked,
    named: list[str],
    anchors: Anchors,
    plot_range: tuple[float, float],
    ahead: list[Callable[[Run], float | None]],
) -> Html:
    avg = entry.over_seeds(final("avg@k"))
    is_plotted = avg is not None and not entry.is_reference
    return table_row(
        [
            *_settings(entry, named),
            len(entry.runs),
            tag("td", whisker(avg, *plot_range, entry.slot) if is_plotted else None),
            *(_cell(entry.over_seeds(final(score))) for score in measures.SCORES),
            _cell(entry.over_seeds(lambda run: run.gain), signed=True),
            _cell(entry.over_seeds(lambda run: run.median("grad/norm"))),
            _cell(entry.over_seeds(lambda run: run.last_mean("kl/student_teacher"))),
            *(_cell(entry.over_seeds(read), digits=4) for read in ahead),
            _cell(entry.over_seeds(lambda run: run.seconds), digits=0),
            tag("td", _seeds(entry, anchors), class_="text"),
        ]
    )


def _settings(entry: Ranked, named: list[str]) -> list[Any]:
    values = [entry.settings.get(name, "") for name in named]
    first, *others = values if entry.settings else ["base", *values[1:]]
    return [first, *(tag("td", value, class_="text") for value in others)]


def _unfinished(entries: list[Ranked], named: list[str], anchors: Anchors) -> Html | None:
    """The groups without a finished point."""
    waiting = [entry for entry in entries if not entry.runs]
    if not waiting:
        return None
    rows = [[*_settings(entry, named), _seeds(entry, anchors)] for entry in waiting]
    return details(
        f"{count(len(waiting), 'group')} without a finished point",
        table([*named, "seeds"], rows, class_="words dense"),
    )


def _seeds(entry: Ranked, anchors: Anchors) -> Html:
    """A link to each point; unfinished points are marked as missing."""
    links = []
    for point in entry.group.points:
        link = tag("a", point.config.get("seed", point.id), href=f"#{anchors[point.id]}")
        links.append(link if point.status == "done" else tag("span", link, " missing"))
    return joined_links(links)


def _cell(values: Interval | None, digits: int = 3, *, signed: bool = False) -> str:
    return "–" if values is None else plus_minus(*values, digits, signed=signed)


# Points


def _failures(points: list[Point], anchors: Anchors) -> Html | None:
    failed = [point for point in points if point.status == "failed"]
    if not failed:
        return None
    blocks = [
        details(
            tag("span", tag("a", point.id, href=f"#{anchors[point.id]}"), f": {_reason(point)}"),
            failure_block(point.failure or {}),
            open=len(failed) <= 3,
        )
        for point in failed
    ]
    return section("failures", "Failures", *blocks)


def _reason(point: Point) -> str:
    """The last line of the failure's log, where programs state the error; without a log, the first
    text of the failure.
    """
    texts = []
    for value in (point.failure or {}).values():
        text = "\n".join(map(str, value)) if isinstance(value, list) else str(value)
        texts += [text.strip().splitlines()] if text.strip() else []
    logs = [lines for lines in texts if len(lines) > 1]
    return (logs or texts or [["no reason was written"]])[0][-1]


def _point_section(points: list[Point], anchors: Anchors, k: int | None) -> Html:
    varying = varying_settings(points)
    if len(varying) > _VARYING:  # the arms' differences are listed above
        varying = [name for name in varying if name == "seed"]
    head = [
        "point",
        text_head("state"),
        measures.score_label("avg@k", k),
        "skipped steps",
        "time",
        *map(text_head, short_names(varying)),
    ]
    rows = [_point_row(point, anchors[point.id], varying) for point in points]
    caption = (
        "Scores of single points; ± is half a 95 % interval over prompts, so it says nothing about "
        "other seeds. Only the seed, or the few settings that differ between points, are listed: "
        "see how the arms differ."
    )
    box = table(head, rows, caption=caption, class_="dense")
    if len(points) > 40:
        box = details(f"All {len(points)} points", box, open=True)
    return section("points", "Points", box)


def _point_row(point: Point, anchor: str, varying: list[str]) -> Html:
    settings = measures.leaves(point.config)
    state, score, skipped, spent = point.status, "–", "–", "–"
    if point.status in ("done", "begun"):
        run = read_run(point.workdir)
        after = (run.result or {}).get("eval_after", {})
        score = plus_minus(after.get("avg@k"), after.get("avg@k_interval"))
        skipped = number(skipped_steps(run))
        spent = duration(run.seconds or measures.total(run, "seconds"))
        if point.status == "begun":
            step = run.metrics[-1]["step"] if run.metrics else 0
            state = f"begun: step {step:,} of {run.config['train']['num_steps']:,}"
    elif point.status == "failed":
        state = tag("a", "failed", href="#failures")
    named = tag("th", point.id, class_="long", scope="row")
    differing = (tag("td", shown(settings.get(name)), class_="text") for name in varying)
    cells = [named, tag("td", state, class_="text"), score, skipped, spent, *differing]
    return table_row(cells, id=anchor)


def varying_settings(points: list[Point]) -> list[str]:
    """Settings in which points differ."""
    configs = [measures.leaves(point.config) for point in points]
    names = dict.fromkeys(name for config in configs for name in config)
    return [
        name
        for name in names
        if any(config.get(name) != configs[0].get(name) for config in configs)
    ]


def _common(points: list[Point]) -> Html:
    varying = set(varying_settings(points))
    settings = measures.leaves(points[0].config)
    rows = [[name, shown(value)] for name, value in settings.items() if name not in varying]
    return section(
        "common",
        "Common settings",
        details(
            f"{count(len(rows), 'setting')} shared by all points",
            table(["setting", "value"], rows, class_="words"),
        ),
    )


def failure_block(failure: dict[str, Any]) -> Html:
    """Why a run failed: short facts on one line, longer texts unchanged."""
    lines = {
        name: "\n".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in failure.items()
    }
    texts = {name: text for name, text in lines.items() if "\n" in text.strip()}
    facts = "; ".join(f"{name}: {lines[name].strip()}" for name in lines if name not in texts)
    long = [join((tag("p", name), tag("pre", text))) for name, text in texts.items()]
    cause = tag("p", tag("strong", "Failed. "), facts)
    return tag("div", cause, *long, class_="notice warning")
