"""The facts of an audit's page: what audit.json says of every estimator, and verdicts on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from opdjax.config.recipes import PLAIN
from opdjax.report.drawing import Entry, Groups
from opdjax.report.measures import bucket_label, model_name
from opdjax.report.text import percent, shown, significant
from opdjax.runs.results import is_number
from opdjax.runs.workdir import WorkdirError

Facts = dict[str, Any]

KL = {"reverse": "KL(student || teacher)", "forward": "KL(teacher || student)"}
CLOSE = 1.0  # degrees within which an estimator points along a direction: rounding is less
EXACT = 1e-9  # enumeration is in float64
_SAME = 0.01  # expected gradients are equal below this relative bias
_SHORT = {"support_top_k": "k", "baseline_top_k": "k", "renormalize": "renorm."}
_SAME_GRADIENT = "Same expected gradient as opd"
_GROUPS = (_SAME_GRADIENT, "Another expected gradient", "Tokens of a sequence coupled", "Pitfalls")
PARTS = ("prompt", "trajectory", "action")  # of the noise of parameter gradients


def audit_facts(document: dict[str, Any], name: str) -> Facts:
    """The facts of the document that `opdjax audit` writes; a part that was not measured is empty.

    WorkdirError where a part is missing that the document does not name as unfinished.
    """
    unfinished = document.get("unfinished", [])
    needed = ("subjects", "vocabulary", "tree", "contexts", "student", "teacher")
    missing = [part for part in needed if part not in document and part not in unfinished]
    if missing:
        raise WorkdirError(
            f"audit.json lacks {', '.join(missing)}; expected a file that opdjax audit wrote"
        )
    subjects = {key: _subject(key, about) for key, about in document["subjects"].items()}
    contexts, vocabulary = (
        {key: _direction(subjects[key], row) for key, row in found.items()}
        for found in (document.get(part, {}).get("rows", {}) for part in ("contexts", "vocabulary"))
    )
    biases = {key: each["row"]["bias"]["reverse"] for key, each in contexts.items()}

    def grouped(sizes: dict[str, float]) -> dict[str, list[str]]:
        """The names of each of _GROUPS, the least noisy first."""
        found: dict[str, list[str]] = {heading: [] for heading in _GROUPS}
        same, other, coupled, pitfalls = found.values()
        for key in sorted(sizes, key=sizes.__getitem__):
            is_same = is_number(biases.get(key)) and biases[key] < _SAME
            chosen = coupled if key not in contexts else same if is_same else other
            (pitfalls if subjects[key]["is_pitfall"] else chosen).append(key)
        return found

    sampled = {
        key: each["row"]["variance_ratio"]
        for key, each in contexts.items()
        if "by_kl" in each["row"] and is_number(each["row"]["variance_ratio"])
    }
    noises, variances = document.get("gradients", {}).get("rows", {}), grouped(sampled)
    plain = noises.get(PLAIN, {})
    # A part estimated below 0 counts as 0.
    parts = {part: plain.get(part) for part in PARTS}
    sizes = {part: max(v or 0.0, 0.0) for part, v in parts.items() if parts["action"] is not None}
    whole = sum(sizes.values())
    return {
        "student": model_name(document["student"]),
        "teacher": model_name(document["teacher"]),
        "directory": "" if name == "." else name,
        "unfinished": unfinished,
        "document": document,
        "subjects": subjects,
        "contexts": contexts,  # directions at contexts that the student reached
        "vocabulary": vocabulary,  # and at random contexts
        "variances": variances,  # of logits: heading -> estimators
        "noises": grouped({key: row["noise"] for key, row in noises.items()}),  # of parameters
        # Shares of opd's noise by cause.
        "parts_of_plain": {part: round(v / whole, 2) for part, v in sizes.items()} if whole else {},
        "has_negative_part": any((value or 0.0) < 0 for value in parts.values()),
        # With one draw a token and opd's gradient, by variance.
        "same_gradient": [
            key
            for key in variances[_SAME_GRADIENT]
            if key != PLAIN and not subjects[key]["is_drawn_often"]
        ],
        "pitfalls": document.get("pitfalls", {}),  # every known one and what it is
    }


def _subject(name: str, about: dict[str, Any]) -> dict[str, Any]:
    """An estimator or pitfall: its short name and what it claims."""
    recipe, options = about.get("recipe"), about.get("options", {})
    is_clear = lambda value: isinstance(value, str) and value != "none"
    words = [
        value if is_clear(value) else f"{_SHORT.get(option, option)} {shown(value)}"
        for option, value in options.items()
    ]
    return {
        "name": name,
        "short": f"{recipe} {', '.join(words)}".strip() if recipe else name,
        "is_pitfall": bool(about.get("is_pitfall")),
        "aim": about.get("advertises", "own"),  # reverse, forward or own
        "is_drawn_often": bool(options.get("extra_draws")),  # more than one draw a token
    }


def _direction(subject: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The expected gradient of an estimator: degrees to the gradient of each KL (None: it is 0),
    and what a pitfall does instead of following the KL that it is mistaken for.
    """
    found = {kl: angle(row["cosine"][kl]) for kl in KL}
    aim = subject["aim"] if subject["aim"] in KL else "reverse"
    other = "forward" if aim == "reverse" else "reverse"
    along = {kl: value is not None and value <= CLOSE for kl, value in found.items()}
    if all(value is None for value in found.values()):
        verdict = "has no direction (its expected gradient is 0)"
    elif along[aim]:
        bias = percent(row["bias"][aim])
        verdict = f"points along {KL[aim]} within {CLOSE:g}°, with a bias of {bias}"
    elif along[other]:
        verdict = f"points along {KL[other]}, {degrees(found[aim])} from {KL[aim]}"
    else:
        verdict = f"is off by {degrees(found[aim])}"
    return {"subject": subject, "row": row, "degrees": found, "verdict": verdict}


def angle(cosine: float | None) -> float | None:
    """In degrees; None where there is no direction."""
    return math.degrees(math.acos(min(max(cosine, -1.0), 1.0))) if is_number(cosine) else None


def degrees(value: float | None) -> str:
    """Such as 12° or 0.3°."""
    if value is None:
        return "no direction"
    return f"{value:.0f}°" if value >= 10 else f"{value:.1f}°"


def ratio(value: float | None, interval: Sequence[float | None] | None = None) -> str:
    """Such as 0.52 (0.48 to 0.57)."""
    if not is_number(value) or interval is None or not all(map(is_number, interval)):
        return significant(value)
    return f"{significant(value)} ({' to '.join(map(significant, interval))})"


# Rows of drawings


def _entry(subject: dict[str, Any], *values: float | None) -> Entry:
    return Entry(subject["short"], *values, is_warning=subject["is_pitfall"])


def angle_groups(rows: dict[str, dict[str, Any]], kl: str) -> Groups:
    """The rows of the chart of angles to the gradient of a KL; the same order for every KL."""
    own = "Recipes with a direction of their own"
    headings = {kl: f"Recipes for {name}" for kl, name in KL.items()}
    found = {heading: [] for heading in (*headings.values(), own, "Pitfalls")}
    for each in sorted(rows.values(), key=lambda each: round(each["degrees"]["reverse"] or 0.0, 1)):
        subject, value = each["subject"], each["degrees"][kl]
        heading = "Pitfalls" if subject["is_pitfall"] else headings.get(subject["aim"], own)
        found[heading].append(_entry(subject, value))
    return list(found.items())


def ratio_groups(f: Facts, kind: Literal["variances", "noises"]) -> Groups:
    """The rows of the chart of variances of logits, or of noises of parameters, over opd's."""
    rows = {name: each["row"] for name, each in f["contexts"].items()}
    if kind == "noises":
        rows = f["document"].get("gradients", {}).get("rows", {})

    def entry(name: str) -> Entry:
        value = f"{kind.removesuffix('s')}_ratio"
        ends = rows[name].get(f"{value}_interval") or ()
        return _entry(f["subjects"][name], rows[name].get(value), *ends)

    return [(heading, [*map(entry, names)]) for heading, names in f[kind].items()]


def bin_labels(bins: Sequence[dict[str, Any]]) -> list[str]:
    """Percentiles of a context's KL, or positions in the completion."""
    percentiles = lambda each: f"{100 * each['from']:g}–{100 * each['to']:g}"
    return [
        bucket_label((each["first"], each["last"])) if "first" in each else percentiles(each)
        for each in bins
    ]
