"""The page of a sweep: which points are done, which group scored what over its seeds, and why
points failed.
"""

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
    notice,
    number,
    plus_minus,
    section,
    shown,
    table,
    table_row,
    tag,
)
from opdjax.report.paper_claims import compared, of_table, paper_sections
from opdjax.report.pareto import pareto_section
from opdjax.report.ranking import (
    Interval,
    Ranked,
    before,
    common_k,
    final,
    label,
    not_comparable,
    ranked,
    short_names,
)
from opdjax.report.run_page import failure_block, skipped_steps
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

_VARYING = 6  # settings that stand beside every point at most
# Columns of groups whose rollouts are drawn ahead of their update.
_AHEAD = {"staleness KL": lambda run: run.staleness, "keep rate": lambda run: run.keep_rate}
_AHEAD_WORDS = {
    "staleness KL": "KL(student || behaviour) of the tokens trained on, nats a token, mean over the last 10 steps: how far the student was "
    "from the policy that drew; near-policy is below 0.10 (NPD, arXiv 2605.05940)",
    "keep rate": "share of the samples that the filter kept, mean over all steps",
}


def sweep_page(
    points: list[Point], name: str, mark: Marker = unmarked, paper: str | None = None
) -> tuple[str, list[Html | None]]:
    """(title, parts of the page); of one paper's table alone where it is named."""
    points, damaged = readable(points)
    papers = compared(points, paper)
    if paper is not None:
        points, name = of_table(points, paper), f"{name}: {paper}"
    entries, anchors = (
        ranked(points),
        {point.id: f"point-{number}" for number, point in enumerate(points, 1)},
    )
    k, every = common_k(entries), entries
    entries = [entry for entry in every if not entry.is_reference] or every
    parts = [
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
    return f"Sweep {name}", [_header(points, entries, name, k, damaged), *parts]


def readable(points: list[Point]) -> tuple[list[Point], dict[str, str]]:
    """(points that can be read, why not by id of the others): a damaged file, or a config of a
    newer opdjax, must not hide other runs.

    WorkdirError where none can be read.
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
    states = {
        state: sum(point.status == state for point in points)
        for state in ("done", "failed", "begun", "waiting")
    }
    words = {"failed": "failed", "begun": "unfinished", "waiting": "not begun"}
    missing = ", ".join(f"{states[state]} {text}" for state, text in words.items() if states[state])
    lead = f"{states['done']} of {count(len(points), 'point')} done" + (
        f" ({missing})." if missing else "."
    )
    best = entries[0].over_seeds(final("avg@k"))
    result = None
    if best is not None:
        finished = sum(bool(entry.runs) for entry in entries)
        of = f"of {finished} finished groups" if finished > 1 else "of the one finished group"
        result = tag(
            "p",
            f"Highest {measures.score_label('avg@k', k)} {of}: {plus_minus(*best)} over {count(len(entries[0].runs), 'seed')}, with ",
            tag("strong", label(entries[0])),
            ".",
        )
    about = (
        "Each point is one training run: a student language model learns from a teacher. A group is the points that share every setting "
        "but the seed; only they are averaged."
    )
    warned = [notice(text, kind=kind) for kind, text in not_comparable(entries)]
    warned += [
        notice(f"{id} is left out, it cannot be read: {why}", kind="warning")
        for id, why in damaged.items()
    ]
    return tag(
        "header",
        tag("h1", f"Sweep {name}"),
        tag("p", lead, class_="lead"),
        result,
        tag("p", about, class_="quiet"),
        *warned,
    )


# Groups


def _group_section(entries: list[Ranked], anchors: dict[str, str], k: int | None) -> Html:
    scored = [
        values
        for entry in entries
        if not entry.is_reference and (values := entry.over_seeds(final("avg@k"))) is not None
    ]
    ends = [
        mean + sign * (half if math.isfinite(half) else 0.0)
        for mean, half in scored
        for sign in (-1, 1)
    ]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    labels = [measures.score_label(score, k) for score in measures.SCORES]
    named = list(dict.fromkeys(name for entry in entries for name in entry.settings)) or ["group"]
    plot = tag("th", scope="col", aria_label=f"{labels[0]}, drawn")
    seeds = tag("th", "seeds", class_="text", scope="col")
    finished = [entry for entry in entries if entry.runs]
    ahead = {
        name: read
        for name, read in _AHEAD.items()
        if any(entry.over_seeds(read) for entry in finished)
    }
    head = [
        *named,
        "n",
        plot,
        *labels,
        "gain",
        "median gradient norm",
        "KL, last 10 steps",
        *ahead,
        "seconds",
        seeds,
    ]
    rows = [
        _group_row(entry, named, anchors, low, high, list(ahead.values())) for entry in finished
    ]
    start = [before(entries, score) for score in measures.SCORES]
    if any(value is not None for value in start):
        rows.append(
            table_row(
                [
                    "before training",
                    *[""] * (len(named) + 1),
                    *map(fixed, start),
                    *[""] * (5 + len(ahead)),
                ]
            )
        )
    caption = (
        "Mean ± half a 95 % interval over seeds (Student's t, n − 1 degrees of freedom; ± ∞: one seed alone has none), not over prompts. "
        f"Ordered by {labels[0]}; the plot runs from {fixed(low)} to {fixed(high)}."
    )
    words = {
        labels[
            0
        ]: "share of right answers among the sampled ones, averaged over held-out prompts, after training",
        "greedy": "share of prompts whose most likely answer is right",
        labels[2]: "share of prompts where at least one sampled answer is right",
        "gain": f"in {labels[0]}: after less before training, on the same prompts",
        "KL": "KL(student || teacher) in nats a token, mean over the last 10 steps of training",
        **{name: meaning for name, meaning in _AHEAD_WORDS.items() if name in ahead},
        "n": "finished points, which are what is averaged; a seed that is missing failed or is not finished (see Points)",
    }
    luck = "The first of many is partly lucky: choose on validation prompts, then report the chosen one on others."
    note = tag("p", luck, class_="quiet") if len(entries) > 3 else None
    return section(
        "groups",
        "Groups",
        table(head, rows, caption=caption, class_="dense") if finished else None,
        _unfinished(entries, named, anchors),
        note,
        definitions(words),
    )


def _group_row(
    entry: Ranked,
    named: list[str],
    anchors: dict[str, str],
    low: float,
    high: float,
    ahead: list[Callable[[Run], float | None]],
) -> Html:
    avg = entry.over_seeds(final("avg@k"))
    scores = [_cell(entry.over_seeds(final(score))) for score in measures.SCORES]
    others = [
        _cell(entry.over_seeds(lambda run: run.gain), signed=True),
        _cell(entry.over_seeds(lambda run: run.median("grad/norm"))),
        _cell(entry.over_seeds(lambda run: run.last_mean("kl/student_teacher"))),
        *(_cell(entry.over_seeds(read), digits=4) for read in ahead),
        _cell(entry.over_seeds(lambda run: run.seconds), digits=0),
    ]
    seeds = joined_links([_seed(point, anchors) for point in entry.group.points])
    plot = tag(
        "td", None if avg is None or entry.is_reference else whisker(avg, low, high, entry.slot)
    )
    settings = _settings(entry, named)
    return table_row(
        [*settings, len(entry.runs), plot, *scores, *others, tag("td", seeds, class_="text")]
    )


def _settings(entry: Ranked, named: list[str]) -> list[Any]:
    first, *others = (
        [entry.settings.get(name, "") for name in named]
        if entry.settings
        else ["base", *[""] * (len(named) - 1)]
    )
    return [first, *(tag("td", value, class_="text") for value in others)]


def _unfinished(entries: list[Ranked], named: list[str], anchors: dict[str, str]) -> Html | None:
    """Groups that have nothing to average yet."""
    waiting = [entry for entry in entries if not entry.runs]
    if not waiting:
        return None
    rows = [
        [
            *_settings(entry, named),
            joined_links([_seed(point, anchors) for point in entry.group.points]),
        ]
        for entry in waiting
    ]
    return details(
        f"{count(len(waiting), 'group')} without a finished point",
        table([*named, "seeds"], rows, class_="words dense"),
    )


def _seed(point: Point, anchors: dict[str, str]) -> Html:
    """A link to the point; one that is not finished is named as missing."""
    link = tag("a", point.config.get("seed", point.id), href=f"#{anchors[point.id]}")
    return link if point.status == "done" else tag("span", link, " missing")


def _cell(values: Interval | None, digits: int = 3, *, signed: bool = False) -> str:
    return "–" if values is None else plus_minus(*values, digits, signed=signed)


# Points


def _failures(points: list[Point], anchors: dict[str, str]) -> Html | None:
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
    """The last line of its log, which is where programs say why they stop; else the first thing
    that the failure says.
    """
    texts = [
        "\n".join(map(str, value)) if isinstance(value, list) else str(value)
        for value in (point.failure or {}).values()
    ]
    lines = [text.strip().splitlines()[-1] for text in texts if text.strip()]
    logs = [
        line
        for text, line in zip((text for text in texts if text.strip()), lines)
        if "\n" in text.strip()
    ]
    return (logs or lines or ["no reason was written"])[0]


def _point_section(points: list[Point], anchors: dict[str, str], k: int | None) -> Html:
    varying = varying_settings(points)
    if len(varying) > _VARYING:  # told of arms above
        varying = [name for name in varying if name == "seed"]
    head = [
        "point",
        tag("th", "state", class_="text", scope="col"),
        measures.score_label("avg@k", k),
        "skipped steps",
        "time",
        *(tag("th", name, class_="text", scope="col") for name in short_names(varying)),
    ]
    rows = [_point_row(point, anchors[point.id], varying) for point in points]
    caption = (
        "Scores of single points; ± is half a 95 % interval over prompts, so it says nothing about other seeds. "
        "Of settings only the seed, or the few that differ between points, are listed: see what the arms differ in."
    )
    box = table(head, rows, caption=caption, class_="dense")
    return section(
        "points",
        "Points",
        box if len(points) <= 40 else details(f"All {len(points)} points", box, open=True),
    )


def _point_row(point: Point, anchor: str, varying: list[str]) -> Html:
    settings = measures.leaves(point.config)
    state, score, skipped, spent = point.status, "–", "–", "–"
    if point.status in ("done", "begun"):
        run = read_run(point.workdir)
        after = (run.result or {}).get("eval_after", {})
        score = plus_minus(after.get("avg@k"), after.get("avg@k_interval"))
        skipped, spent = (
            number(skipped_steps(run)),
            duration(run.seconds or measures.total(run, "seconds")),
        )
        if point.status == "begun":
            state = f"begun: step {run.metrics[-1]['step'] if run.metrics else 0:,} of {run.config['train']['num_steps']:,}"
    elif point.status == "failed":
        state = tag("a", "failed", href="#failures")
    named = tag("th", point.id, class_="long", scope="row")
    differing = (tag("td", shown(settings.get(name)), class_="text") for name in varying)
    return table_row(
        [named, tag("td", state, class_="text"), score, skipped, spent, *differing], id=anchor
    )


def varying_settings(points: list[Point]) -> list[str]:
    """Settings in which some points differ."""
    configs = [measures.leaves(point.config) for point in points]
    names = dict.fromkeys(name for config in configs for name in config)
    return [
        name
        for name in names
        if any(config.get(name) != configs[0].get(name) for config in configs)
    ]


def _common(points: list[Point]) -> Html:
    varying: set[str] = set(varying_settings(points))
    settings: dict[str, Any] = {
        name: value
        for name, value in measures.leaves(points[0].config).items()
        if name not in varying
    }
    rows = [[name, shown(value)] for name, value in settings.items()]
    return section(
        "common",
        "Common settings",
        details(
            f"{count(len(rows), 'setting')} shared by all points",
            table(["setting", "value"], rows, class_="words"),
        ),
    )
