"""What the page of an audit calls things: subjects, directions, small numbers."""

from __future__ import annotations

import math
from typing import Any

from opdjax.report.markup import Html, number, shown, tag
from opdjax.runs.results import is_number

Document = dict[str, Any]

KL = {"reverse": "KL(student || teacher)", "forward": "KL(teacher || student)"}
# degrees within which an estimator is said to point somewhere: rounding moves a cosine of 1 by less
CLOSE = 1.0
EXACT = 1e-9  # what is enumerated is enumerated in float64
_SHORT = {"baseline_top_k": "k", "support_top_k": "k", "renormalize": "renorm."}


def is_pitfall(document: Document, name: str) -> bool:
    """Whether a subject stands there as a warning."""
    return bool(document["subjects"].get(name, {}).get("is_pitfall"))


def short(document: Document, name: str) -> str:
    """A subject's name for a chart: its options without their names where the value alone says
    enough.
    """
    about = document["subjects"].get(name, {})
    if not about.get("recipe"):
        return name
    words = []
    for option, value in about.get("options", {}).items():
        speaks = isinstance(value, str) and value != "none"
        words.append(value if speaks else f"{_SHORT.get(option, option)} {shown(value)}")
    return ", ".join([f"{about['recipe']} {words[0]}", *words[1:]]) if words else about["recipe"]


def named(document: Document, name: str) -> Html:
    """A subject's name for a table, marked where it is a pitfall."""
    badge = tag("span", "pitfall", class_="badge") if is_pitfall(document, name) else None
    return tag("th", tag("code", name), " " if badge else None, badge, scope="row", class_="long")


def angle(cosine: float | None) -> float | None:
    """In degrees; None where there is no direction."""
    return math.degrees(math.acos(min(max(cosine, -1.0), 1.0))) if is_number(cosine) else None


def degrees(value: float | None, nothing: str = "none") -> str:
    """Such as 12° or 0.3°."""
    if value is None:
        return nothing
    return f"{value:.0f}°" if value >= 10 else f"{value:.1f}°"


def percent(share: float | None, digits: int = 1) -> str:
    """Such as 12.3 %; what is no more than rounding is 0."""
    if not is_number(share):
        return "–"
    return (
        "0"
        if abs(share) < EXACT
        else f"{number(float(f'{100 * share:.{digits}f}'))} %"
        if abs(share) >= 1e-3
        else "< 0.1 %"
    )


def ratio(value: float | None, interval=None) -> str:
    """Such as 0.52 (0.48 to 0.57)."""
    if not is_number(value):
        return "–"
    known = interval is not None and all(map(is_number, interval))
    return three(value) + (f" ({three(interval[0])} to {three(interval[1])})" if known else "")


def three(value: float) -> str:
    """Three significant digits; what is no more than rounding is 0."""
    return number(float(f"{value:.3g}")) if abs(value) >= 1e-9 else "0"


def listed(words: list[str]) -> str:
    """Such as a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def told(text: str) -> Html:
    """The one sentence of a section."""
    return tag("p", text, class_="finding")


def aim_of(document: Document, name: str) -> str:
    """Whose gradient a subject is meant to have: `reverse`, `forward`, or `own`."""
    return document["subjects"].get(name, {}).get("advertises", "own")


def angles_of(row: dict[str, Any]) -> dict[str, float | None]:
    """Degrees to each KL's gradient."""
    return {direction: angle(row["cosine"][direction]) for direction in KL}


def is_lost(row: dict[str, Any]) -> bool:
    """Whether its expected gradient is 0, so that it has no direction."""
    return all(value is None for value in angles_of(row).values())


def verdict(document: Document, row: dict[str, Any], aim: str) -> str:
    """What a pitfall does instead of following the KL that it is taken for."""
    if is_lost(row):
        return "points nowhere (its expected gradient is 0)"
    found = angles_of(row)
    aim = aim if aim in KL else "reverse"
    other = "forward" if aim == "reverse" else "reverse"
    if found[aim] is not None and found[aim] <= CLOSE:
        return (
            f"points along {KL[aim]} within {CLOSE:g}°, with a bias of {percent(row['bias'][aim])}"
        )
    if found[other] is not None and found[other] <= CLOSE:
        return f"points along {KL[other]}, {degrees(found[aim])} from {KL[aim]}"
    return f"is off by {degrees(found[aim])}"
