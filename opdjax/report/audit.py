"""The facts of an audit's page: what audit.json says of every estimator, and verdicts on it."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from opdjax.config.recipes import PLAIN, RECIPES
from opdjax.report.drawing import SERIES, Bars, Line
from opdjax.report.drawing_rows import Entry, Groups
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
NOISE_GROUPS = (
    "Same expected gradient as opd",
    "Another expected gradient",
    "Tokens of a sequence coupled",
    "Pitfalls",
)
PARTS = ("prompt", "trajectory", "action")  # of the noise of parameter gradients


@dataclasses.dataclass(frozen=True)
class NamedEstimator:
    """An estimator or pitfall: its short name and what it claims."""

    name: str
    short: str
    is_pitfall: bool
    aim: str  # reverse, forward or own
    has_baseline: bool
    is_drawn_often: bool  # more than one draw a token


@dataclasses.dataclass(frozen=True)
class Direction:
    """The expected gradient of an estimator: degrees to the gradient of each KL."""

    subject: NamedEstimator
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
    subjects: dict[str, NamedEstimator]
    contexts: dict[str, Direction]  # at contexts that the student reached
    vocabulary: dict[str, Direction]  # at random contexts
    variances: dict[str, list[str]]  # of logits: heading -> estimators, the least noisy first
    noises: dict[str, list[str]]  # of parameter gradients: the same
    noise_of_plain: float | None  # squared gradient; the unit of the noises
    parts_of_plain: dict[str, float]  # shares of opd's noise by cause
    has_negative_part: bool  # of opd's noise; it counts as 0
    same_gradient: tuple[str, ...]  # with one draw a token and opd's gradient, by variance
    pitfalls: dict[str, str]  # every known pitfall and what it is


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
    angles = lambda row: {kl: angle(row["cosine"][kl]) for kl in KL}
    contexts, vocabulary = (
        {key: Direction(subjects[key], row, angles(row)) for key, row in found.items()}
        for found in (document.get(part, {}).get("rows", {}) for part in ("contexts", "vocabulary"))
    )
    sampled = {
        key: each.row["variance_ratio"]
        for key, each in contexts.items()
        if "by_kl" in each.row and is_number(each.row["variance_ratio"])
    }
    noises = document.get("gradients", {}).get("rows", {})
    plain = noises.get(PLAIN, {})
    unit = plain.get("noise")
    variances = _grouped(sampled, subjects, contexts)
    return AuditFacts(
        student=model_name(document["student"]),
        teacher=model_name(document["teacher"]),
        directory="" if name == "." else name,
        unfinished=unfinished,
        document=document,
        subjects=subjects,
        contexts=contexts,
        vocabulary=vocabulary,
        variances=variances,
        noises=_grouped({key: row["noise"] for key, row in noises.items()}, subjects, contexts),
        noise_of_plain=unit if is_number(unit) and unit > 0 else None,
        parts_of_plain=_parts_of_plain(plain),
        has_negative_part=any((plain.get(part) or 0.0) < 0 for part in PARTS),
        same_gradient=tuple(
            key
            for key in variances[NOISE_GROUPS[0]]
            if key != PLAIN and not subjects[key].is_drawn_often
        ),
        pitfalls=document.get("pitfalls", {}),
    )


def _subject(name: str, about: dict[str, Any]) -> NamedEstimator:
    recipe, options = about.get("recipe"), about.get("options", {})
    is_clear = lambda value: isinstance(value, str) and value != "none"
    words = [
        value if is_clear(value) else f"{_SHORT.get(option, option)} {shown(value)}"
        for option, value in options.items()
    ]
    return NamedEstimator(
        name,
        f"{recipe} {', '.join(words)}".strip() if recipe else name,
        bool(about.get("is_pitfall")),
        about.get("advertises", "own"),
        recipe in RECIPES and "baseline" in RECIPES[recipe].options,
        bool(options.get("extra_draws")),
    )


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


def angle_groups(rows: dict[str, Direction], kl: str) -> Groups:
    """The rows of the chart of angles to the gradient of a KL; the same order for every KL."""
    headings = [*(f"Recipes for {name}" for name in KL.values()), _OWN, _PITFALLS, _LOST]
    found: dict[str, list[Entry]] = {heading: [] for heading in headings}
    for each in sorted(rows.values(), key=lambda each: round(each.degrees["reverse"] or 0.0, 1)):
        subject, value = each.subject, each.degrees[kl]
        heading = f"Recipes for {KL[subject.aim]}" if subject.aim in KL else _OWN
        heading = _LOST if each.is_lost else _PITFALLS if subject.is_pitfall else heading
        marks = {"is_warning": subject.is_pitfall, "is_target": subject.aim == kl}
        texts = {"text": degrees(value, ""), "note": "no direction" if value is None else ""}
        found[heading].append(Entry(subject.short, value, **marks, **texts))
    return list(found.items())


# Noise


def _grouped(
    sizes: dict[str, float], subjects: dict[str, NamedEstimator], contexts: dict[str, Direction]
) -> dict[str, list[str]]:
    """The names of each of NOISE_GROUPS, the least noisy first."""
    found: dict[str, list[str]] = {heading: [] for heading in NOISE_GROUPS}
    same, other, coupled, pitfalls = found.values()
    for name in sorted(sizes, key=sizes.__getitem__):
        bias = contexts[name].row["bias"]["reverse"] if name in contexts else None
        is_same = bias is not None and bias < _SAME
        chosen = coupled if name not in contexts else same if is_same else other
        (pitfalls if subjects[name].is_pitfall else chosen).append(name)
    return found


def _positive(row: dict[str, Any]) -> dict[str, float]:
    """The parts of the noise; a part estimated below 0 counts as 0."""
    return {part: max(row[part] or 0.0, 0.0) for part in PARTS}


def _parts_of_plain(row: dict[str, Any]) -> dict[str, float]:
    sizes = _positive(row) if row.get("action") is not None else {}
    total = sum(sizes.values())
    return {part: round(size / total, 2) for part, size in sizes.items()} if total else {}


def variance_groups(f: AuditFacts) -> Groups:
    """The rows of the chart of variances of logits."""

    def entry(name: str) -> Entry:
        row, value = f.contexts[name].row, f.contexts[name].row["variance_ratio"]
        ends = row.get("variance_ratio_interval") or (None, None)
        return _entry(f, name, value, *ends, text=f"{significant(value)}×")

    return [(heading, [*map(entry, names)]) for heading, names in f.variances.items()]


def noise_groups(f: AuditFacts) -> tuple[Groups, float]:
    """The rows of the chart of the noise of parameter gradients, by cause, and the limit of it."""
    rows, unit = f.document["gradients"]["rows"], f.noise_of_plain or 1.0

    def entry(name: str) -> Entry:
        row, snr = rows[name], rows[name]["signal_to_noise"]
        text = f"s/n {'–' if not is_number(snr) else f'{snr:.2f}' if snr else '0'}"
        parts = tuple(size / unit for size in _positive(row).values())
        return _entry(f, name, row["noise"] / unit, parts=parts, text=text)

    groups = [(heading, [*map(entry, names)]) for heading, names in f.noises.items()]
    sizes = [max(sum(e.parts), e.value or 0.0) for _, entries in groups for e in entries]
    limit = 1.06 * (max(sizes, default=0.0) or 1.0)
    return groups, min(limit, _MAX_STACK) if f.noise_of_plain else limit


def _entry(f: AuditFacts, name: str, *values: float | None, **more: Any) -> Entry:
    subject = f.subjects[name]
    return Entry(subject.short, *values, is_warning=subject.is_pitfall, **more)


# Places


def place_bars(bins: list[dict[str, Any]], actions: Sequence[float | None] | None) -> list[Bars]:
    """Contexts, their share of the KL and of opd's variance in every bin, percent."""
    whole = sum(each["contexts"] for each in bins) or 1
    shares = {5: [each["contexts"] / whole for each in bins]}
    shares |= {2: [each["kl_share"] for each in bins], 1: [each["variance_share"] for each in bins]}
    shares |= {3: actions} if actions else {}
    percents = lambda values: [100 * value if is_number(value) else None for value in values]
    return [Bars(percents(values), slot, slot == 5) for slot, values in shares.items()]


def place_lines(rows: Sequence[list], noise: Sequence[float | None]) -> list[Line]:
    """Variance over that of opd in every bin, a line for each of `rows`; bins with little of opd's
    noise have no point.
    """
    found, rows = [], rows[:SERIES]
    for slot, cells in enumerate(rows):
        kept = [
            cell if all(map(is_number, (*cell, share))) and share >= _LITTLE else [math.nan] * 3
            for cell, share in zip(cells, noise)
        ]
        # Shifted, so that intervals do not hide one another.
        shift = 0.06 * (slot - (len(rows) - 1) / 2)
        x = [at + shift for at in range(len(noise))]
        found.append(Line(x, *zip(*kept), slot=slot, has_markers=True, bars=True))
    return found


def bin_labels(bins: Sequence[dict[str, Any]]) -> list[str]:
    """Percentiles of a context's KL, or positions in the completion."""
    percentiles = lambda each: f"{100 * each['from']:g}–{100 * each['to']:g}"
    return [
        bucket_label((each["first"], each["last"])) if "first" in each else percentiles(each)
        for each in bins
    ]


# Costs


def known_costs(f: AuditFacts, key: str) -> dict[str, tuple[float, float | None]]:
    """The known costs of one kind and their multiples of opd's, the lowest first."""
    rows = (f.document.get("costs") or {}).items()
    known = {name: row[key] for name, row in rows if is_number(row.get(key))}
    over_plain = lambda value: value / known[PLAIN] if known.get(PLAIN) else None
    return {name: (known[name], over_plain(known[name])) for name in sorted(known, key=known.get)}


def common_cost(known: dict[str, tuple[float, float | None]]) -> float | None:
    """The median where all values are equal up to 1 %; else None."""
    values = [value for value, _ in known.values()]
    return statistics.median(values) if values and values[-1] <= 1.01 * values[0] else None


COSTS = (
    ("seconds_per_token", "Time per token", "µs", 1e6),
    ("bytes_per_token", "Memory per token", "kB", 1e-3),
)
