"""The part of a run's page that is about rollouts drawn ahead of their update: how stale they were,
and which were kept.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from opdjax.report import measures
from opdjax.report.charts import Chart, ChartLine, curve, draw, grid, legend
from opdjax.report.markup import (
    Html,
    count,
    definitions,
    details,
    fixed,
    join,
    notice,
    number,
    section,
    table,
    table_row,
    tag,
)
from opdjax.report.near_policy_charts import ZONES, Bounds, Histogram, deltas, pooled, zone_key
from opdjax.report.rollouts import percent, prompt_text
from opdjax.runs.results import Run, is_number, read_filters, wilson_interval

ALARM = 0.10  # nats a token: what NPD calls near-policy
_VERSIONS = 6  # histograms side by side; more are drawn as one
_EXAMPLES, _TEXT = 4, 280  # of each zone, and letters of each
_MEANINGS = {
    "kept": "Δ within the bounds",
    "degenerate": "Δ below the lower bound: the prompt helps the student less than the teacher to foresee the student's own answer",
    "disconnected": "Δ above the upper bound: the prompt makes the answer likely to the student and not to the teacher",
}


# How stale


def staleness_section(run: Run) -> Html | None:
    """How far the student had moved from the policy that drew what it was trained on; None where
    rollouts are drawn anew every step.
    """
    if not run.draws_ahead or all(value is None for value in run.column("staleness/mean")):
        return None
    steps, window = measures.steps_of(run), measures.smoothing_window(len(run.metrics))
    figures = [
        _age_chart(run, steps),
        _distance_chart(run, steps, window),
        _weight_chart(run, steps, window),
    ]
    key = legend(
        [("trained on: mean", 0), ("oldest of the step", 4), ("all rollouts, before the filter", 1)]
    )
    smoothed = f" Pale: every step; strong: mean over {window} steps." if window > 1 else ""
    about = (
        "Rollouts are drawn ahead of their update, so the student that learns from one is no longer quite the policy that drew it. These "
        f"curves tell how far the two were apart, measured before each update.{smoothed}"
    )
    return section(
        "staleness",
        "Staleness",
        *(tag("p", text, class_="finding") for text in [distance_sentence(run)] if text),
        tag("p", about, class_="quiet"),
        key,
        grid(figure for figure in figures if figure is not None),
    )


def distance_sentence(run: Run) -> str:
    """Whether, when and how often the distance from the policy that drew was above the alarm."""
    parts = []
    for name, whose in (
        ("staleness/kl", "of the tokens trained on"),
        ("staleness/kl_all", "of all rollouts, kept or not,"),
    ):
        known = [
            (step, value)
            for step, value in zip(measures.steps_of(run), run.column(name))
            if value is not None
        ]
        if known:
            parts.append(f"KL(student || behaviour) {whose} {_crossing(known)}")
    return ". ".join(parts) + "." if parts else ""


def _crossing(known: list[tuple[int, float]]) -> str:
    where, most = max(known, key=lambda pair: pair[1])
    above = [pair for pair in known if pair[1] > ALARM]
    peak = f"{_three(most)} nats a token at step {where:,}"
    if not above:
        return f"never crossed {ALARM:.2f} nats: at most {peak}"
    first, value = above[0]
    if len(above) == 1:
        return f"crossed {ALARM:.2f} nats at step {first:,} alone ({_three(value)})"
    often = f"above it in {len(above):,} of {len(known):,} measured steps, last in step {above[-1][0]:,}"
    return f"first crossed {ALARM:.2f} nats at step {first:,} ({_three(value)}) and was {often}; at most {peak}"


def _three(value: float) -> str:
    """Three significant digits."""
    return number(float(f"{value:.3g}"))


def _age_chart(run: Run, steps: list[int]) -> Html:
    lines = [
        ChartLine(steps, run.column("staleness/max"), slot=4),
        ChartLine(steps, run.column("staleness/mean")),
    ]
    about = "Updates between the weights that drew a rollout and those that it updated: the mean over the step's rollouts, and the oldest."
    limits = {"refresh": " Falls to 0 where rollouts are drawn anew.", "continuous": _limit(run)}
    about += limits.get(run.config["near_policy"]["schedule"], "")
    return draw(Chart("Age of the rollouts", "step", "updates", about, bounds=(0, None)), lines)


def _limit(run: Run) -> str:
    most = run.config["near_policy"]["max_staleness"]
    return f" At most max_staleness = {most}, which is enforced before a rollout is drawn."


def _distance_chart(run: Run, steps: list[int], window: int) -> Html | None:
    trained, probed = run.column("staleness/kl"), run.column("staleness/kl_all")
    lines = curve(steps, trained, window) if any(value is not None for value in trained) else []
    known = [(step, value) for step, value in zip(steps, probed) if value is not None]
    lines += [ChartLine(*zip(*known), slot=1, has_markers=len(known) < 60)] if known else []
    if not lines:
        return None
    most = max(value for line in lines for value in line.y if is_number(value))
    is_near = most > ALARM / 5  # otherwise the line would press the curves flat
    told = f"Dashed: {ALARM:.2f} nats" if is_near else f"All is far below {ALARM:.2f} nats"
    about = (
        "Mean over tokens of ρ log ρ − ρ + 1, ρ = p_student / p_behaviour of the token drawn: never below 0 and, over all rollouts, an "
        f"unbiased estimate of KL(student || behaviour) at the contexts reached. {told}, the bound of what NPD (arXiv 2605.05940) calls "
        "near-policy."
    )
    top = 1.08 * max(most, ALARM) if is_near else 1.08 * most or 1.0
    chart = Chart(
        "Distance from the policy that drew",
        "step",
        "KL, nats a token",
        about,
        reference=ALARM if is_near else None,
        y_range=(-0.02 * top, top),
    )
    return draw(chart, lines)


def _weight_chart(run: Run, steps: list[int], window: int) -> Html | None:
    values = run.column("staleness/effective_sample_size")
    if all(value is None for value in values):
        return None
    about = (
        "(Σ w)² / (n Σ w²) over the step's rollouts, w = p_student / p_behaviour of a whole one. 1: as good as freshly drawn; 0.3: "
        "weighted to the student's own distribution they would tell as much as 30 fresh ones of 100."
    )
    return draw(
        Chart("Effective sample size", "step", "share of the rollouts", about, bounds=(0, 1)),
        curve(steps, values, window),
    )


# Which are kept


def filter_section(run: Run) -> Html | None:
    """What Delta-IFD made of the samples, and some of them; None where no sample was ever judged."""
    found = read_filters(run.workdir) if run.draws_ahead else []
    judged = [
        one for one in found if one["filter"] != "none" or sum(one["histogram"].get("counts", ()))
    ]
    if not judged:
        return None
    groups = _by_version(judged)
    return section(
        "kept",
        "Which samples are kept",
        tag("p", keep_sentence(judged), class_="finding"),
        tag("p", _rule(judged), class_="quiet"),
        *_inert(judged),
        _charts(run, groups, judged),
        _counts(groups, judged),
        _examples(judged),
        _words(judged),
    )


def _by_version(found: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for one in found:
        groups.setdefault(one["version"], []).append(one)
    return groups


def _sum(found: list[dict[str, Any]], name: str) -> int:
    return sum(one[name] for one in found)


def keep_sentence(found: list[dict[str, Any]]) -> str:
    """What was kept and dropped, and whether right answers were treated otherwise than wrong ones."""
    names = ("samples", "kept", "degenerate", "disconnected", "unscored")
    samples, kept, degenerate, disconnected, unscored = (
        _sum(found, f"num_{name}") for name in names
    )
    drawn = f"Of {count(samples, 'sample')} {percent(kept / max(samples, 1))} were kept"
    zones = [
        f"{percent(amount / samples) if amount else 'none'} {zone}"
        for zone, amount in (("degenerate", degenerate), ("disconnected", disconnected))
    ]
    text = f"{drawn}; {zones[0]}, {zones[1]}"
    text += f", {percent(unscored / samples)} could not be scored." if unscored else "."
    right, wrong = _of_answers(found)
    if right is None or not (right[1] and wrong[1]):
        return text
    shares = [hits / trials for hits, trials in (right, wrong)]
    (low, high), (other_low, other_high) = wilson_interval(*right), wilson_interval(*wrong)
    if low > other_high or other_low > high:
        how = "more often than" if shares[0] > shares[1] else "less often than"
    else:
        how = "about as often as"
    return f"{text} Right answers were kept {how} wrong ones ({percent(shares[0])} against {percent(shares[1])})."


def _of_answers(found: list[dict[str, Any]]) -> tuple[Any, Any]:
    """(kept, samples) of right and of wrong answers; None where that is not known of all."""
    parts = [one.get("by_correctness") for one in found]
    if not all(parts):
        return None, None
    return tuple(
        tuple(sum(part[kind][name] for part in parts) for name in ("kept", "num"))
        for kind in ("right", "wrong")
    )


def _upper(found: list[dict[str, Any]]) -> list[float]:
    """The upper bounds that were in force, rising: several where each is a quantile of its own
    file.
    """
    return sorted({one["ifd_max"] for one in found if is_number(one.get("ifd_max"))})


def _rule(found: list[dict[str, Any]]) -> str:
    one, upper = found[-1], _upper(found)
    low, high = (
        one.get("ifd_min"),
        f"{_three(upper[0])} to {_three(upper[-1])}"
        if upper[1:]
        else _three(upper[0])
        if upper
        else "∞",
    )
    bounds = f"{'−∞' if low is None else number(low)} ≤ Δ ≤ {high}{' (a quantile of each file)' if upper[1:] else ''}"
    form = {
        "nll_ratio": "mean negative log-probability of its tokens with the prompt, over that without",
        "perplexity_ratio": "perplexity with the prompt, over that without",
    }.get(one.get("form", ""), "how much the prompt helps to foresee the answer")
    told = {
        "ifd": f"Kept are samples with {bounds}",
        "random": f"Kept were as many samples as {bounds} would keep, chosen at random: the control for what the filter chooses",
        "none": "Every sample was kept; the zones say what bounds would have made of them",
    }[one["filter"] if one["filter"] in ("ifd", "random") else "none"]
    return (
        f"The instruction-following difficulty (IFD) of an answer under a model is its {form}: near 0 the prompt gives the answer away, "
        f"near 1 it does not help. Δ is the teacher's IFD less the student's, of the student's answer. {told} (NPD, arXiv 2605.05940)."
    )


def _inert(found: list[dict[str, Any]]) -> list[Html]:
    """A bound that no sample was beyond did nothing, which a table of settings does not tell."""
    idle = [
        f"the {side} bound {number(found[-1][f'ifd_{end}'])}"
        for end, side, zone in (("min", "lower", "degenerate"), ("max", "upper", "disconnected"))
        if is_number(found[-1].get(f"ifd_{end}")) and not _sum(found, f"num_{zone}")
    ]
    return (
        [notice(f"No sample was beyond {' or '.join(idle)}: it removed nothing in this run.")]
        if idle
        else []
    )


def _histogram(found: list[dict[str, Any]]) -> Histogram | None:
    return pooled(
        [
            Histogram(
                *(np.asarray(one["histogram"].get(name, ()), float) for name in ("edges", "counts"))
            )
            for one in found
        ]
    )


def _bounds(found: list[dict[str, Any]]) -> Bounds:
    """Those of all; where they differ, their median."""
    ends = [
        [one[f"ifd_{end}"] for one in found if is_number(one.get(f"ifd_{end}"))]
        for end in ("min", "max")
    ]
    return tuple(statistics.median(values) if values else None for values in ends)


def _charts(
    run: Run, groups: dict[int, list[dict[str, Any]]], judged: list[dict[str, Any]]
) -> Html | None:
    is_apart = 1 < len(groups) <= _VERSIONS
    parts = (
        {f"Rollouts of version {version}": found for version, found in groups.items()}
        if is_apart
        else {"All samples": judged}
    )
    drawn = {title: one for title, found in parts.items() if (one := _histogram(found)) is not None}
    if not drawn:
        return None
    x_range = _x_range(list(drawn.values()), _bounds(judged))
    figures = [deltas(title, one, _bounds(parts[title]), x_range) for title, one in drawn.items()]
    figures += [figure for figure in (_over_steps(run),) if figure is not None]
    upper = _upper(judged)
    note = "The outermost bars of a file hold what lies beyond them too."
    note += (
        " The upper bound is the median of those of the files."
        if upper[1:] and not is_apart
        else ""
    )
    key = zone_key({zone: _MEANINGS[zone] for zone in ZONES})
    return join((key, grid(figures), tag("p", note, class_="quiet")))


def _x_range(drawn: list[Histogram], bounds: Bounds) -> tuple[float, float]:
    """Where there are samples, and a bound that is not far away."""
    filled = [
        edge
        for one in drawn
        for at in np.flatnonzero(one.counts)
        for edge in one.edges[at : at + 2]
    ]
    low, high = (min(filled), max(filled)) if filled else (0.0, 1.0)
    width = high - low
    near = [bound for bound in bounds if bound is not None and low - width < bound < high + width]
    low, high = min([low, *near]), max([high, *near])
    return low - 0.03 * (high - low), high + 0.03 * (high - low)


def _counts(groups: dict[int, list[dict[str, Any]]], judged: list[dict[str, Any]]) -> Html:
    head = [
        "rollouts of version",
        "samples",
        "kept",
        "degenerate",
        "disconnected",
        "unscored",
        "keep rate",
        "of right answers",
        "of wrong answers",
    ]
    rows = [_count_row(f"{version:,}", found) for version, found in groups.items()]
    caption = (
        "Version: the updates that the weights had seen which drew. In brackets: a 95 % interval (Wilson) as of independent samples; those "
        "of one prompt are not quite, so it is a little narrow."
    )
    whole = table_row(_count_row("all", judged), class_="main")
    if len(groups) <= _VERSIONS:
        return table(
            head, [*rows, whole] if len(rows) > 1 else rows, caption=caption, class_="dense"
        )
    return join(
        (
            table(head, [whole], caption=caption, class_="dense"),
            details(f"By version ({len(rows):,})", table(head, rows, class_="dense")),
        )
    )


def _count_row(name: str, found: list[dict[str, Any]]) -> list[Any]:
    amounts = {
        kind: _sum(found, f"num_{kind}")
        for kind in ("samples", "kept", "degenerate", "disconnected", "unscored")
    }
    rates = [_share((amounts["kept"], amounts["samples"])), *map(_share, _of_answers(found))]
    return [name, *(f"{amount:,}" for amount in amounts.values()), *rates]


def _share(hits: tuple[int, int] | None) -> str:
    """Such as 62.1 % (58.0 to 66.0), the interval by Wilson."""
    if hits is None or not hits[1]:
        return "–"
    low, high = (f"{100 * end:.1f}" for end in wilson_interval(*hits))
    return f"{100 * hits[0] / hits[1]:.1f} % ({low} to {high})"


def _over_steps(run: Run) -> Html | None:
    """The shares during training, where the filter is asked more than a few times."""
    names = {
        "kept": "filter/keep_rate",
        "degenerate": "filter/degenerate",
        "disconnected": "filter/disconnected",
    }
    columns = {zone: run.column(name) for zone, name in names.items()}
    if run.config["near_policy"]["schedule"] != "continuous" or all(
        value is None for values in columns.values() for value in values
    ):
        return None
    steps, window = measures.steps_of(run), measures.smoothing_window(len(run.metrics))
    lines = [
        line
        for zone, values in columns.items()
        for line in curve(steps, values, window, slot=ZONES[zone])
    ]
    chart = Chart(
        "Shares during training",
        "step",
        "share",
        "Of the samples drawn for each step, in the same colours.",
        bounds=(0, 1),
    )
    return draw(chart, lines)


def _examples(judged: list[dict[str, Any]]) -> Html | None:
    rows: list[Any] = []
    for zone in ZONES:
        found = [
            (one["version"], example) for one in judged for example in one["examples"].get(zone, ())
        ]
        if found:
            rows.append(
                tag(
                    "tr",
                    tag("th", f"{zone}: {_MEANINGS[zone]}", colspan=7, scope="rowgroup"),
                    class_="section",
                )
            )
            rows += [_example(version, example) for version, example in _spread(found)]
    if not rows:
        return None
    head = [
        tag("th", name, class_="text", scope="col")
        for name in ("prompt", "student's answer", "answer is")
    ]
    caption = "Chosen at random among the samples of each zone. IFD: how little the prompt helps to foresee the answer."
    box = table(
        [*head, "Δ", "teacher's IFD", "student's IFD", "version"],
        rows,
        caption=caption,
        class_="samples",
    )
    return join((tag("h3", "Samples of each zone"), box))


def _spread(found: list[Any]) -> list[Any]:
    """A few of them, over the whole run."""
    if len(found) <= _EXAMPLES:
        return found
    return [found[round(i * (len(found) - 1) / (_EXAMPLES - 1))] for i in range(_EXAMPLES)]


def _example(version: int, example: dict[str, Any]) -> Html:
    answer = {True: "right", False: "wrong"}.get(example.get("is_correct"), "–")
    texts = [
        tag("td", _cut(prompt_text(example.get(name, ""))), class_="sample")
        for name in ("prompt", "completion")
    ]
    numbers = [fixed(example.get(name)) for name in ("delta", "teacher_ifd", "student_ifd")]
    return table_row([*texts, tag("td", answer, class_="text"), *numbers, f"{version:,}"])


def _cut(text: str) -> str:
    """Its start and its end, which are what tells: a problem and its answer."""
    if len(text) <= _TEXT:
        return text
    return f"{text[: _TEXT // 2]} […{len(text) - _TEXT:,} letters…] {text[-(_TEXT // 2) :]}"


def _words(judged: list[dict[str, Any]]) -> Html:
    words = {
        "degenerate": "the student is less sure of its own answer, given the prompt, than the teacher is: a sample from its own tail",
        "disconnected": "the student is sure of what the teacher finds unlikely: the signal of such a token is large and noisy",
    }
    if _sum(judged, "num_unscored"):
        words["unscored"] = (
            "no IFD can be formed: an empty answer, or one that is certain without the prompt; never kept"
        )
    return details("What the zones mean", definitions(words))
