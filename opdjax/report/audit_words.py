"""Names of estimators and directions on the page of an audit, and what the numbers say of them."""

from __future__ import annotations

import math
from typing import Any

from opdjax.config.recipes import RECIPES
from opdjax.report.markup import Html, percent, shown, significant, tag
from opdjax.runs.results import is_number

Document = dict[str, Any]

KL = {"reverse": "KL(student || teacher)", "forward": "KL(teacher || student)"}
CLOSE = 1.0  # degrees within which an estimator points along a direction: rounding is less
EXACT = 1e-9  # enumeration is in float64
_SHORT = {"support_top_k": "k", "renormalize": "renorm."}


def subject(document: Document, name: str) -> dict[str, Any]:
    """What the audit says of an estimator or pitfall."""
    return document["subjects"].get(name, {})


def is_pitfall(document: Document, name: str) -> bool:
    """Whether it is a known mistake, measured as a warning."""
    return bool(subject(document, name).get("is_pitfall"))


def has_baseline(document: Document, name: str) -> bool:
    """Whether it is a recipe with a baseline."""
    row = RECIPES.get(subject(document, name).get("recipe") or "")
    return row is not None and "baseline" in row.options


def short(document: Document, name: str) -> str:
    """A name for a chart: options without their names where the value is clear alone."""
    about = subject(document, name)
    if not about.get("recipe"):
        return name
    words = []
    for option, value in about.get("options", {}).items():
        is_clear = isinstance(value, str) and value != "none"
        words.append(value if is_clear else f"{_SHORT.get(option, option)} {shown(value)}")
    return f"{about['recipe']} {', '.join(words)}".strip()


def named(document: Document, name: str) -> Html:
    """A name for a table, with a badge for a pitfall."""
    badge = (" ", pitfall_badge()) if is_pitfall(document, name) else ()
    return tag("th", tag("code", name), *badge, scope="row", class_="long")


def pitfall_badge() -> Html:
    """The mark of a pitfall."""
    return tag("span", "pitfall", class_="badge")


def angle(cosine: float | None) -> float | None:
    """In degrees; None where there is no direction."""
    return math.degrees(math.acos(min(max(cosine, -1.0), 1.0))) if is_number(cosine) else None


def degrees(value: float | None, nothing: str = "none") -> str:
    """Such as 12° or 0.3°."""
    if value is None:
        return nothing
    return f"{value:.0f}°" if value >= 10 else f"{value:.1f}°"


def ratio(value: float | None, interval=None) -> str:
    """Such as 0.52 (0.48 to 0.57)."""
    if not is_number(value) or interval is None or not all(map(is_number, interval)):
        return significant(value)
    return f"{significant(value)} ({' to '.join(map(significant, interval))})"


def aim_of(document: Document, name: str) -> str:
    """The direction that it claims to follow: `reverse`, `forward` or `own`."""
    return subject(document, name).get("advertises", "own")


def angles_of(row: dict[str, Any]) -> dict[str, float | None]:
    """Degrees to the gradient of each KL."""
    return {direction: angle(row["cosine"][direction]) for direction in KL}


def is_lost(row: dict[str, Any]) -> bool:
    """Whether the expected gradient is 0 and has no direction."""
    return all(value is None for value in angles_of(row).values())


def verdict(row: dict[str, Any], aim: str) -> str:
    """What a pitfall does instead of following the KL that it is mistaken for."""
    if is_lost(row):
        return "has no direction (its expected gradient is 0)"
    found, aim = angles_of(row), aim if aim in KL else "reverse"
    other = "forward" if aim == "reverse" else "reverse"
    is_along = lambda direction: found[direction] is not None and found[direction] <= CLOSE
    if is_along(aim):
        bias = percent(row["bias"][aim])
        return f"points along {KL[aim]} within {CLOSE:g}°, with a bias of {bias}"
    if is_along(other):
        return f"points along {KL[other]}, {degrees(found[aim])} from {KL[aim]}"
    return f"is off by {degrees(found[aim])}"
