"""The facts of an audit's page: what audit.json says of every estimator, and verdicts on it."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from opdjax.config.recipes import PLAIN, RECIPES
from opdjax.report.drawing import SERIES, Bars, Line
from opdjax.report.drawing_rows import Entry
from opdjax.report.measures import bucket_label, model_name
from opdjax.report.text import percent, shown, significant
from opdjax.runs.results import is_number
from opdjax.runs.workdir import WorkdirError

Document = dict[str, Any]

KL = {"reverse": "KL(student || teacher)", "forward": "KL(teacher || student)"}
CLOSE = 1.0  # degrees within which an estimator points along a direction: rounding is less
EXACT = 1e-9  # enumeration is in float64
_SAME = 0.01  # expected gradients are equal below this relative bias
_MAX_STACK = 3.0  # limit of a chart of noise, in multiples of the noise of opd
_LITTLE = 0.005  # a bin with a smaller share of opd's noise has no point: its ratio is rounding
_SHORT = {"support_top_k": "k", "renormalize": "renorm."}
_OWN, _LOST = "Recipes with a direction of their own", "No direction: the expected gradient is 0"
_PITFALLS = f"Pitfalls, mistaken for {KL['reverse']}"
_SAME_GRADIENT = "Same expected gradient as opd"
NOISE_GROUPS = (
    _SAME_GRADIENT,
    "Another expected gradient",
    "Tokens of a sequence coupled",
    "Pitfalls",
)
PARTS = ("prompt", "trajectory", "action")  # of the noise of parameter gradients


@dataclasses.dataclass(frozen=True)
class Subject:
    """An estimator or pitfall: its short name and what it claims."""

    name: str
    short: str
    is_pitfall: bool
    aim: str  # reverse, forward or own
    has_baseline: bool
    about: str
    is_drawn_often: bool  # more than one draw a token


@dataclasses.dataclass(frozen=True)
class Direction:
    """The expected gradient of an estimator: degrees to the gradient of each KL."""

    subject: Subject
    row: dict[str, Any]
    degrees: dict[str, float | None]  # None: no direction

    @property
    def is_lost(self) -> bool:
        """Whether the expected gradient is 0 and has no direction."""
        return all(value is None for value in self.degrees.values())

    @property
    def verdict(self) -> str:
        """What a pitfall does instead of following the KL that it is mistaken for."""
        aim = self.subject.aim if self.subject.aim in KL else "reverse"
        other = "forward" if aim == "reverse" else "reverse"
        along = {kl: value is not None and value <= CLOSE for kl, value in self.degrees.items()}
        if self.is_lost:
            return "has no direction (its expected gradient is 0)"
        if along[aim]:
            bias = percent(self.row["bias"][aim])
            return f"points along {KL[aim]} within {CLOSE:g}°, with a bias of {bias}"
        if along[other]:
            return f"points along {KL[other]}, {degrees(self.degrees[aim])} from {KL[aim]}"
        return f"is off by {degrees(self.degrees[aim])}"


@dataclasses.dataclass(frozen=True)
class AuditFacts:
    """An audit: its document and what follows from it; a part that was not measured is missing."""

    student: str
    teacher: str
    directory: str
    unfinished: tuple[str, ...]
    document: Document
    subjects: dict[str, Subject]
    contexts: dict[str, Direction]  # at contexts that the student reached
    vocabulary: dict[str, Direction]  # at random contexts
    variances: dict[str, list[str]]  # of logits: heading -> estimators, the least noisy first
    noises: dict[str, list[str]]  # of parameter gradients: the same
    noise_of_plain: float | None  # squared gradient; the unit of the noises
    parts_of_plain: dict[str, float]  # shares of opd's noise by cause
    has_negative_part: bool  # of opd's noise; it counts as 0
    same_gradient: tuple[str, ...]  # with one draw a token and opd's gradient, by variance
    pitfalls: dict[str, str]  # every known pitfall and what is known of it


def audit_facts(document: Document, name: str) -> AuditFacts:
    """The facts of the document that `opdjax audit` writes.

    WorkdirError where a part is missing that the document does not name as unfinished.
    """
    unfinished = tuple(document.get("unfinished", ()))
    needed = ("subjects", "vocabulary", "tree", "contexts", "student", "teacher")
    missing = [part for part in needed if part not in document and part not in unfinished]
    if missing:
        raise WorkdirError(
            f"audit.json lacks {', '.join(missing)}; expected a file that opdjax audit wrote"
        )
    subjects = {key: _subject(key, about) for key, about in document["subjects"].items()}
    contexts, vocabulary = (
        _directions(document.get(part, {}).get("rows", {}), subjects)
        for part in ("contexts", "vocabulary")
    )
    sampled = {
        key: each.row["variance_ratio"]
        for key, each in contexts.items()
        if "by_kl" in each.row and is_number(each.row["variance_ratio"])
    }
    noises = document.get("gradients", {}).get("rows", {})
    group = lambda key: _noise_group(key, subjects, contexts)
    same = [
        key
        for key in sorted(sampled, key=sampled.__getitem__)
        if group(key) == _SAME_GRADIENT and key != PLAIN and not subjects[key].is_drawn_often
    ]
    batches = dict.fromkeys(document.get("batch_pitfalls", {}), "")
    measured = {
        key: each.about for key, each in subjects.items() if each.is_pitfall and key in contexts
    }
    return AuditFacts(
        model_name(document["student"]),
        model_name(document["teacher"]),
        "" if name == "." else name,
        unfinished,
        document,
        subjects,
        contexts,
        vocabulary,
        _grouped(sampled, group),
        _grouped({key: row["noise"] for key, row in noises.items()}, group),
        _noise_of_plain(noises.values()),
        _parts_of_plain(noises.get(PLAIN)),
        any((noises.get(PLAIN, {}).get(part) or 0.0) < 0 for part in PARTS),
        tuple(same),
        document.get("pitfalls") or measured | batches,
    )


def _subject(name: str, about: dict[str, Any]) -> Subject:
    recipe, options = about.get("recipe"), about.get("options", {})
    words = []
    for option, value in options.items():
        is_clear = isinstance(value, str) and value != "none"
        words.append(value if is_clear else f"{_SHORT.get(option, option)} {shown(value)}")
    row = RECIPES.get(recipe or "")
    return Subject(
        name,
        f"{recipe} {', '.join(words)}".strip() if recipe else name,
        bool(about.get("is_pitfall")),
        about.get("advertises", "own"),
        row is not None and "baseline" in row.options,
        about.get("about", ""),
        bool(options.get("extra_draws")),
    )


def _directions(rows: dict[str, Any], subjects: dict[str, Subject]) -> dict[str, Direction]:
    return {
        name: Direction(
            subjects.get(name) or _subject(name, {}),
            row,
            {kl: angle(row["cosine"][kl]) for kl in KL},
        )
        for name, row in rows.items()
    }


def angle(cosine: float | None) -> float | None:
    """In degrees; None where there is no direction."""
    return math.degrees(math.acos(min(max(cosine, -1.0), 1.0))) if is_number(cosine) else None


def degrees(value: float | None, nothing: str = "none") -> str:
    """Such as 12° or 0.3°."""
    if value is None:
        return nothing
    return f"{value:.0f}°" if value >= 10 else f"{value:.1f}°"


def ratio(value: float | None, interval: Sequence[float | None] | None = None) -> str:
    """Such as 0.52 (0.48 to 0.57)."""
    if not is_number(value) or interval is None or not all(map(is_number, interval)):
        return significant(value)
    return f"{significant(value)} ({' to '.join(map(significant, interval))})"


def angle_groups(rows: dict[str, Direction], kl: str) -> list[tuple[str, list[Entry]]]:
    """The rows of the chart of angles to the gradient of a KL; the same order for every KL."""
    headings = [*(f"Recipes for {name}" for name in KL.values()), _OWN, _PITFALLS, _LOST]
    found: dict[str, list[Entry]] = {heading: [] for heading in headings}
    for each in sorted(rows.values(), key=lambda each: round(each.degrees["reverse"] or 0.0, 1)):
        subject, value = each.subject, each.degrees[kl]
        heading = f"Recipes for {KL[subject.aim]}" if subject.aim in KL else _OWN
        heading = _LOST if each.is_lost else _PITFALLS if subject.is_pitfall else heading
        entry = Entry(
            subject.short,
            value,
            is_warning=subject.is_pitfall,
            is_target=subject.aim == kl,
            text=degrees(value, ""),
            note="no direction" if value is None else "",
        )
        found[heading].append(entry)
    return list(found.items())


# Noise


def _noise_group(name: str, subjects: dict[str, Subject], contexts: dict[str, Direction]) -> str:
    same, other, coupled, pitfalls = NOISE_GROUPS
    if name in subjects and subjects[name].is_pitfall:
        return pitfalls
    if name not in contexts:
        return coupled
    bias = contexts[name].row["bias"]["reverse"]
    return same if bias is not None and bias < _SAME else other


def _grouped(sizes: dict[str, float], group: Callable[[str], str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {heading: [] for heading in NOISE_GROUPS}
    for name in sorted(sizes, key=sizes.__getitem__):
        found[group(name)].append(name)
    return found


def _noise_of_plain(rows: Iterable[dict[str, Any]]) -> float | None:
    """The noise of opd, from the ratio of another estimator to it."""
    known = (row for row in rows if is_number(row.get("noise_ratio")) and row["noise_ratio"])
    unit = next((row["noise"] / row["noise_ratio"] for row in known if is_number(row["noise"])), 0)
    return unit if unit > 0 else None


def positive(row: dict[str, Any]) -> dict[str, float]:
    """The parts of the noise; a part estimated below 0 counts as 0."""
    return {part: max(row[part] or 0.0, 0.0) for part in PARTS}


def _parts_of_plain(row: dict[str, Any] | None) -> dict[str, float]:
    sizes = positive(row) if row and row["action"] is not None else {}
    total = sum(sizes.values())
    return {part: round(size / total, 2) for part, size in sizes.items()} if total else {}


def variance_groups(f: AuditFacts) -> list[tuple[str, list[Entry]]]:
    """The rows of the chart of variances of logits."""

    def entry(name: str) -> Entry:
        subject, row = f.subjects[name], f.contexts[name].row
        low, high = row.get("variance_ratio_interval") or (None, None)
        value = row["variance_ratio"]
        text = f"{significant(value)}×"
        return Entry(subject.short, value, low, high, is_warning=subject.is_pitfall, text=text)

    return [(heading, [*map(entry, names)]) for heading, names in f.variances.items()]


def noise_groups(f: AuditFacts) -> list[tuple[str, list[Entry]]]:
    """The rows of the chart of the noise of parameter gradients, by cause."""
    rows, unit = f.document["gradients"]["rows"], f.noise_of_plain or 1.0

    def entry(name: str) -> Entry:
        subject, row = f.subjects.get(name) or _subject(name, {}), rows[name]
        snr = row["signal_to_noise"]
        return Entry(
            subject.short,
            row["noise"] / unit,
            parts=tuple(size / unit for size in positive(row).values()),
            is_warning=subject.is_pitfall,
            text=f"s/n {'–' if not is_number(snr) else f'{snr:.2f}' if snr else '0'}",
        )

    return [(heading, [*map(entry, names)]) for heading, names in f.noises.items()]


def noise_limit(f: AuditFacts, groups: list[tuple[str, list[Entry]]]) -> float:
    """Where the stacks of `noise_groups` are cut."""
    sizes = [max(sum(e.parts), e.value or 0.0) for _, entries in groups for e in entries]
    limit = 1.06 * (max(sizes, default=0.0) or 1.0)
    return min(limit, _MAX_STACK) if f.noise_of_plain else limit


# Places


def place_bars(bins: list[dict[str, Any]], actions: Sequence[float | None] | None) -> list[Bars]:
    """Contexts, their share of the KL and of opd's variance in every bin, percent."""
    whole = sum(each["contexts"] for each in bins) or 1
    percents = lambda values: [100 * value if is_number(value) else None for value in values]
    found = [
        Bars(percents(each["contexts"] / whole for each in bins), 5, is_hatched=True),
        Bars(percents(each["kl_share"] for each in bins), 2),
        Bars(percents(each["variance_share"] for each in bins), 1),
    ]
    return [*found, Bars(percents(actions), 3)] if actions else found


def place_lines(rows: dict[str, list], noise: Sequence[float | None]) -> list[Line]:
    """Variance over that of opd in every bin, a line for each of `rows`; bins with little of opd's
    noise have no point.
    """
    found = []
    unknown = [math.nan] * 3
    for slot, cells in enumerate(list(rows.values())[:SERIES]):
        kept = [
            cell if is_number(share) and share >= _LITTLE and all(map(is_number, cell)) else unknown
            for cell, share in zip(cells, noise)
        ]
        value, low, high = zip(*kept)
        # Shifted, so that intervals do not hide one another.
        shift = 0.06 * (slot - (min(len(rows), SERIES) - 1) / 2)
        x = [at + shift for at in range(len(noise))]
        found.append(Line(x, value, low, high, slot=slot, has_markers=True, bars=True))
    return found


def bin_labels(bins: Sequence[dict[str, Any]]) -> list[str]:
    """Percentiles of a context's KL, or positions in the completion."""
    return [
        bucket_label((each["first"], each["last"]))
        if "first" in each
        else f"{100 * each['from']:g}–{100 * each['to']:g}"
        for each in bins
    ]


# Costs


def known_costs(f: AuditFacts, key: str) -> dict[str, float]:
    """The known costs of one kind, the lowest first."""
    rows = f.document.get("costs") or {}
    known = {name: row[key] for name, row in rows.items() if is_number(row.get(key))}
    return dict(sorted(known.items(), key=lambda each: each[1]))


def common_cost(known: dict[str, float]) -> float | None:
    """The median where all values are equal up to 1 %; else None."""
    values = list(known.values())
    return statistics.median(values) if values and max(values) <= 1.01 * min(values) else None


def over_plain(f: AuditFacts, key: str, name: str) -> float | None:
    """A cost divided by that of opd; None where one is unknown."""
    known = known_costs(f, key)
    return known[name] / known[PLAIN] if name in known and known.get(PLAIN) else None


COSTS = (
    ("seconds_per_token", "Time per token", "µs", 1e6),
    ("bytes_per_token", "Memory per token", "kB", 1e-3),
)
# What the template reads beside the facts.
CONTEXT = {"KL": KL, "CLOSE": CLOSE, "EXACT": EXACT, "COSTS": COSTS, "PLAIN": PLAIN} | {
    each.__name__: each
    for each in (
        *(angle, angle_groups, bin_labels, common_cost, degrees, known_costs, noise_groups),
        *(noise_limit, over_plain, place_bars, place_lines, ratio, variance_groups),
    )
}
