"""The sections of a run's page on near-policy rollouts: their staleness, and the sample filter."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from opdjax.report import measures
from opdjax.report.charts import ChartLine, by_step, curve, draw, draw_columns, grid, legend
from opdjax.report.markup import (
    Html,
    count,
    definitions,
    details,
    fixed,
    group_row,
    join,
    notice,
    number,
    percent,
    prompt_text,
    quiet,
    section,
    shortened,
    significant,
    spread,
    table,
    table_row,
    tag,
    text_head,
)
from opdjax.report.near_policy_charts import ZONES, Bounds, Histogram, deltas, pooled, zone_key
from opdjax.runs.results import Run, is_number, read_filters
from opdjax.runs.statistics import wilson_interval

ALARM = 0.10  # nats a token: the limit of what NPD calls near-policy
_VERSIONS = 6  # histograms side by side; more versions are pooled
_EXAMPLES, _TEXT = 4, 280  # samples shown of each zone, and characters of each text
_MEANINGS = {
    "kept": "Δ within the bounds",
    "degenerate": "Δ below the lower bound: the prompt helps the student less than the teacher to"
    " predict the student's own answer",
    "disconnected": "Δ above the upper bound: the prompt makes the answer likely for the student"
    " and not for the teacher",
}
_FORMS = {
    "nll_ratio": "mean negative log-probability of its tokens with the prompt, divided by that"
    " without it",
    "perplexity_ratio": "perplexity with the prompt, divided by that without it",
}

Filter = dict[str, Any]  # one filter file: counts, bounds, histogram and examples of its samples


# Staleness


def staleness_section(run: Run) -> Html | None:
    """Distance of the student from the policy that sampled its data; None for on-policy runs."""
    if not run.is_near_policy or all(value is None for value in run.column("staleness/mean")):
        return None
    key = legend(
        [("trained on: mean", 0), ("oldest of the step", 4), ("all rollouts, before the filter", 1)]
    )
    about = (
        "Rollouts are sampled ahead of their update, so the student that trains on them is no"
        " longer the policy that sampled them. The curves show how far the two are apart, measured"
        f" before each update.{measures.smoothing_note(len(run.metrics))}"
    )
    figures = grid([_age_chart(run), _distance_chart(run), _weight_chart(run)])
    lead = distance_sentence(run)
    return section("staleness", "Staleness", key, figures, lead=lead, about=about)


def distance_sentence(run: Run) -> str:
    """Whether, when and how often KL(student || behaviour) exceeded the alarm."""
    parts = []
    for name, whose in (("kl", "of trained tokens"), ("kl_all", "of all rollouts, kept or not,")):
        pairs = zip(measures.steps_of(run), run.column(f"staleness/{name}"))
        known = [(step, value) for step, value in pairs if value is not None]
        if known:
            parts.append(f"KL(student || behaviour) {whose} {_crossing(known)}.")
    return " ".join(parts)


def _crossing(known: list[tuple[int, float]]) -> str:
    where, most = max(known, key=lambda pair: pair[1])
    above = [pair for pair in known if pair[1] > ALARM]
    peak = f"{significant(most)} nats a token at step {where:,}"
    limit = f"{ALARM:.2f} nats"
    if not above:
        return f"never exceeded {limit}: at most {peak}"
    step, value = above[0]
    if len(above) == 1:
        return f"exceeded {limit} only at step {step:,} ({significant(value)})"
    times = f"in {len(above):,} of {len(known):,} measured steps"
    first, last = f"first at step {step:,} ({significant(value)})", f"last at step {above[-1][0]:,}"
    return f"exceeded {limit} {times}, {first}, {last}; at most {peak}"


def _age_chart(run: Run) -> Html:
    near = run.config["near_policy"]
    limits = {
        "refresh": " Falls to 0 when new rollouts are sampled.",
        "continuous": f" At most max_staleness = {near['max_staleness']}, enforced at sampling.",
    }
    about = (
        "Updates between the policy that sampled a rollout and the update that trains on it: mean"
        f" and maximum over the rollouts of the step.{limits.get(near['schedule'], '')}"
    )
    steps, columns = measures.steps_of(run), ((4, "max"), (0, "mean"))
    lines = [ChartLine(steps, run.column(f"staleness/{name}"), slot=slot) for slot, name in columns]
    return draw(by_step("Age of the rollouts", "updates", about, bounds=(0, None)), lines)


def _distance_chart(run: Run) -> Html | None:
    steps = measures.steps_of(run)
    trained, probed = run.column("staleness/kl"), run.column("staleness/kl_all")
    window = measures.smoothing_window(len(steps))
    lines = curve(steps, trained, window) if any(map(is_number, trained)) else []
    known = [(step, value) for step, value in zip(steps, probed) if value is not None]
    lines += [ChartLine(*zip(*known), slot=1, has_markers=len(known) < 60)] if known else []
    if not lines:
        return None
    most = max(value for line in lines for value in line.y if is_number(value))
    is_near = most > ALARM / 5  # a line far above the curves would flatten them
    limit = f"Dashed: {ALARM:.2f} nats" if is_near else f"All values are far below {ALARM:.2f} nats"
    about = (
        "Mean over tokens of ρ log ρ − ρ + 1 with ρ = p_student / p_behaviour of the sampled token."
        " It is never negative. Over all rollouts it estimates KL(student || behaviour) at the"
        f" sampled contexts without bias. {limit}, the bound of near-policy in NPD (arXiv"
        " 2605.05940)."
    )
    top = 1.08 * max(most, ALARM) if is_near else 1.08 * most or 1.0
    limits = {"reference": ALARM if is_near else None, "y_range": (-0.02 * top, top)}
    title = "Distance from the behaviour policy"
    return draw(by_step(title, "KL, nats a token", about, **limits), lines)


def _weight_chart(run: Run) -> Html | None:
    about = (
        "(Σ w)² / (n Σ w²) over the n rollouts of the step, w = p_student / p_behaviour of a whole"
        " rollout. 1: as good as fresh rollouts. 0.3: weighted to the student's distribution, 100"
        " rollouts are worth 30 fresh ones."
    )
    chart = by_step("Effective sample size", "share of the rollouts", about, bounds=(0, 1))
    values = run.column("staleness/effective_sample_size")
    return draw_columns(chart, measures.steps_of(run), [(0, values)])


# The sample filter


def filter_section(run: Run) -> Html | None:
    """What the Delta-IFD filter kept, with examples; None where no sample was scored."""
    found = read_filters(run.workdir) if run.is_near_policy else []
    scored = [f for f in found if f["filter"] != "none" or sum(f["histogram"].get("counts", ()))]
    if not scored:
        return None
    versions: dict[int, list[Filter]] = {}
    for one in scored:
        versions.setdefault(one["version"], []).append(one)
    return section(
        "kept",
        "Which samples are kept",
        _idle_bounds(scored),
        _charts(run, versions, scored),
        _counts(versions, scored),
        _examples(scored),
        _zone_meanings(scored),
        lead=keep_sentence(scored),
        about=_rule(scored),
    )


def _sum(found: list[Filter], name: str) -> int:
    return sum(one[f"num_{name}"] for one in found)


def keep_sentence(found: list[Filter]) -> str:
    """The shares of each zone, and whether right answers were kept more often than wrong ones."""
    samples = _sum(found, "samples")
    share = lambda zone: percent(_sum(found, zone) / max(samples, 1))
    zones = f"{share('degenerate')} degenerate, {share('disconnected')} disconnected"
    text = f"Of {count(samples, 'sample')} {share('kept')} were kept; {zones}"
    text += f", {share('unscored')} could not be scored." if _sum(found, "unscored") else "."
    right, wrong = _by_correctness(found)
    if right is None or not (right[1] and wrong[1]):
        return text
    shares = [kept / trials for kept, trials in (right, wrong)]
    (low, high), (other_low, other_high) = wilson_interval(*right), wilson_interval(*wrong)
    often = "about as often as"
    if low > other_high or other_low > high:
        often = "more often than" if shares[0] > shares[1] else "less often than"
    rates = " against ".join(map(percent, shares))
    return f"{text} Right answers were kept {often} wrong ones ({rates})."


def _by_correctness(found: list[Filter]) -> tuple[Any, Any]:
    """(kept, samples) of right and of wrong answers; None where a file does not record it."""
    parts = [one.get("by_correctness") for one in found]
    if not all(parts):
        return None, None
    sums = lambda kind: tuple(sum(part[kind][name] for part in parts) for name in ("kept", "num"))
    return sums("right"), sums("wrong")


def _upper_bounds(found: list[Filter]) -> list[float]:
    """The distinct upper bounds, ascending; several where each is a quantile of its own file."""
    return sorted({one["ifd_max"] for one in found if is_number(one.get("ifd_max"))})


def _rule(found: list[Filter]) -> str:
    last, upper = found[-1], _upper_bounds(found)
    low = "−∞" if last.get("ifd_min") is None else number(last["ifd_min"])
    high = " to ".join(map(significant, dict.fromkeys((upper[0], upper[-1])))) if upper else "∞"
    bounds = f"{low} ≤ Δ ≤ {high}{' (a quantile of each file)' if upper[1:] else ''}"
    form = _FORMS.get(last.get("form", ""), "measure of how much the prompt helps to predict it")
    rules = {
        "ifd": f"Samples with {bounds} were kept",
        "random": f"As many samples as {bounds} would keep were kept, chosen at random: the control"
        " for the filter's choice",
    }
    rule = rules.get(last["filter"], "Every sample was kept; the zones show what bounds would do")
    return (
        f"The instruction-following difficulty (IFD) of an answer under a model is its {form}. Near"
        " 0, the prompt determines the answer; near 1, the prompt does not help. Δ is the teacher's"
        f" IFD minus the student's, for the student's answer. {rule} (NPD, arXiv 2605.05940)."
    )


def _idle_bounds(found: list[Filter]) -> Html | None:
    """Names the bounds that no sample exceeded."""
    idle = [
        f"the {side} bound {number(found[-1][f'ifd_{end}'])}"
        for end, side, zone in (("min", "lower", "degenerate"), ("max", "upper", "disconnected"))
        if is_number(found[-1].get(f"ifd_{end}")) and not _sum(found, zone)
    ]
    text = f"No sample was beyond {' or '.join(idle)}: it removed nothing in this run."
    return notice(text) if idle else None


def _histogram(found: list[Filter]) -> Histogram | None:
    sides = [[one["histogram"].get(name, ()) for name in ("edges", "counts")] for one in found]
    return pooled([Histogram(*(np.asarray(side, float) for side in pair)) for pair in sides])


def _bounds(found: list[Filter]) -> Bounds:
    """The bounds of the files; where they differ, their median."""
    ends = [[one.get(f"ifd_{end}") for one in found] for end in ("min", "max")]
    known = [[value for value in values if is_number(value)] for values in ends]
    return tuple(statistics.median(values) if values else None for values in known)


def _charts(run: Run, versions: dict[int, list[Filter]], scored: list[Filter]) -> Html | None:
    is_apart = 1 < len(versions) <= _VERSIONS
    parts = {"All samples": scored}
    if is_apart:
        parts = {f"Rollouts of version {version}": found for version, found in versions.items()}
    pools = {title: one for title, found in parts.items() if (one := _histogram(found)) is not None}
    if not pools:
        return None
    x_range = _x_range(list(pools.values()), _bounds(scored))
    figures = [deltas(title, one, _bounds(parts[title]), x_range) for title, one in pools.items()]
    note = "The outermost bars of a file include the samples beyond them."
    if _upper_bounds(scored)[1:] and not is_apart:
        note += " The upper bound shown is the median over files."
    key = zone_key({zone: _MEANINGS[zone] for zone in ZONES})
    return join((key, grid([*figures, _shares_by_step(run)]), quiet(note)))


def _x_range(pools: list[Histogram], bounds: Bounds) -> tuple[float, float]:
    """The range that has samples, and the bounds that are near it."""
    bars = [(one.edges, at) for one in pools for at in np.flatnonzero(one.counts)]
    filled = [edge for edges, at in bars for edge in edges[at : at + 2]]
    low, high = (min(filled), max(filled)) if filled else (0.0, 1.0)
    width = high - low
    near = [bound for bound in bounds if bound is not None and low - width < bound < high + width]
    low, high = min([low, *near]), max([high, *near])
    return low - 0.03 * (high - low), high + 0.03 * (high - low)


_AMOUNTS = ("samples", "kept", "degenerate", "disconnected", "unscored")


def _counts(versions: dict[int, list[Filter]], scored: list[Filter]) -> Html:
    head = ["policy version", *_AMOUNTS, "keep rate", "of right answers", "of wrong answers"]
    rows = [_count_row(f"{version:,}", found) for version, found in versions.items()]
    caption = (
        "Policy version: number of updates of the weights that sampled. In brackets: a 95 %"
        " interval (Wilson) for independent samples. Samples of one prompt are correlated, so the"
        " interval is slightly too narrow."
    )
    whole = table_row(_count_row("all", scored), class_="main")
    dense = {"class_": "dense"}
    if len(versions) <= _VERSIONS:
        return table(head, [*rows, whole] if len(rows) > 1 else rows, caption=caption, **dense)
    every = details(f"By version ({len(rows):,})", table(head, rows, **dense))
    return join((table(head, [whole], caption=caption, **dense), every))


def _count_row(name: str, found: list[Filter]) -> list[Any]:
    amounts = [_sum(found, kind) for kind in _AMOUNTS]
    rates = map(_rate, ((amounts[1], amounts[0]), *_by_correctness(found)))
    return [name, *(f"{amount:,}" for amount in amounts), *rates]


def _rate(hits: tuple[int, int] | None) -> str:
    """(hits, trials) such as 62.1 % (58.0 to 66.0), with Wilson's interval."""
    if hits is None or not hits[1]:
        return "–"
    low, high = (f"{100 * end:.1f}" for end in wilson_interval(*hits))
    return f"{100 * hits[0] / hits[1]:.1f} % ({low} to {high})"


def _shares_by_step(run: Run) -> Html | None:
    """The shares during training, where every step filters its own samples."""
    if run.config["near_policy"]["schedule"] != "continuous":
        return None
    names = {"kept": "keep_rate", "degenerate": "degenerate", "disconnected": "disconnected"}
    columns = [(ZONES[zone], run.column(f"filter/{name}")) for zone, name in names.items()]
    about = "Of the samples of each step, in the same colours."
    chart = by_step("Shares during training", "share", about, bounds=(0, 1))
    return draw_columns(chart, measures.steps_of(run), columns)


def _examples(scored: list[Filter]) -> Html | None:
    rows: list[Any] = []
    for zone in ZONES:
        pairs = [
            (one["version"], example) for one in scored for example in one["examples"].get(zone, ())
        ]
        if pairs:
            rows.append(group_row(f"{zone}: {_MEANINGS[zone]}", 7))
            rows += [_example(*pair) for pair in spread(pairs, _EXAMPLES)]
    if not rows:
        return None
    head = [text_head(name) for name in ("prompt", "student's answer", "answer is")]
    head += ["Δ", "teacher's IFD", "student's IFD", "version"]
    caption = "A random choice of the samples of each zone."
    box = table(head, rows, caption=caption, class_="samples")
    return join((tag("h3", "Samples of each zone"), box))


def _example(version: int, example: dict[str, Any]) -> Html:
    answer = {True: "right", False: "wrong"}.get(example.get("is_correct"), "–")
    texts = (prompt_text(example.get(name, "")) for name in ("prompt", "completion"))
    cells = [tag("td", shortened(text, _TEXT), class_="sample") for text in texts]
    numbers = [fixed(example.get(name)) for name in ("delta", "teacher_ifd", "student_ifd")]
    return table_row([*cells, tag("td", answer, class_="text"), *numbers, f"{version:,}"])


def _zone_meanings(scored: list[Filter]) -> Html:
    words = {
        "degenerate": "given the prompt, the student is less sure of its own answer than the"
        " teacher is: a sample from the tail of the student's distribution",
        "disconnected": "the student is sure of tokens that the teacher finds unlikely: the signal"
        " of such a token is large and noisy",
    }
    if _sum(scored, "unscored"):
        words["unscored"] = (
            "IFD is undefined: the answer is empty, or certain without the prompt; never kept"
        )
    return details("Meaning of the zones", definitions(words))
