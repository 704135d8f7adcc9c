"""One way to write each kind of number and text, for pages and printed tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from opdjax.runs.results import is_number


def fixed(value: float | None, digits: int = 3) -> str:
    """Such as 0.570; a dash for an unknown value."""
    # Adding 0.0 turns -0.0, the rounded value of a tiny negative number, into 0.0.
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−") if is_number(value) else "–"


def plus_minus(
    value: float | None, half_width: float | None, digits: int = 3, *, signed: bool = False
) -> str:
    """Such as 0.570 ± 0.021; ± ∞ for an interval that cannot be computed."""
    if not is_number(value):
        return "–"
    text = ("+" if signed and value >= 0 else "") + fixed(value, digits)
    if half_width is None:
        return text
    return f"{text} ± {fixed(half_width, digits) if is_number(half_width) else '∞'}"


def number(value: Any, smallest: float = 1e-3) -> str:
    """Four significant digits with thousands separators; below `smallest` in the form 3e-4.

    A value that is not a number is returned as text.
    """
    if not is_number(value):
        return "–" if value is None or isinstance(value, float) else str(value)
    text = f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if 0 < abs(value) < smallest:
        mantissa, exponent = f"{value:.3e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return text.replace("-", "−") if text.startswith("-") else text


def integer(value: float | None) -> str:
    """Such as 1,536; a dash for an unknown value."""
    return f"{value:,.0f}".replace("-", "−") if is_number(value) else "–"


def significant(value: float | None, digits: int = 3) -> str:
    """A number rounded to a few significant digits; below 1e-9, which is rounding, 0."""
    if not is_number(value):
        return "–"
    return number(float(f"{value:.{digits}g}")) if abs(value) >= 1e-9 else "0"


def amount(value: float, half_width: float) -> str:
    """A quantity of any size with its interval, such as 30,640 ± 8,900 or 0.0515 ± 0.055."""
    half = significant(half_width, 2) if is_number(half_width) else "∞"
    return f"{significant(value, 4)} ± {half}"


def percent(share: float | None, *, is_log: bool = False) -> str:
    """A share, or with `is_log` its logarithm, such as 91.2 %; a dash for an unknown value."""
    if not is_number(share):
        return "–"
    share = math.exp(share) if is_log else share
    if abs(share) < 0.0005 and (is_log or abs(share) >= 1e-9):
        return "<\u00a00.1\u00a0%"
    return f"{number(round(100 * share, 1))}\u00a0%"


def shown(value: Any) -> str:
    """The value of a setting as a person writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "none"
    return number(value, smallest=1e-2) if isinstance(value, float) else str(value)


def duration(seconds: float | None) -> str:
    """Such as 41 s, 12 min or 3.4 h."""
    if not is_number(seconds):
        return "–"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def count(amount: int, noun: str) -> str:
    """Such as 1 seed or 3 seeds."""
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")


def listed(words: Sequence[str]) -> str:
    """Such as a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def prompt_text(prompt: Any) -> str:
    """A prompt as text; a chat as one line per message, with its role."""
    if not isinstance(prompt, list):
        return str(prompt)
    return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in prompt)


def shortened(text: str, limit: int) -> str:
    """The text, or its start and end, `limit` characters together, and what was left out."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} […{len(text) - limit:,} letters…] {text[-half:]}"


def spread(items: Sequence[Any], most: int) -> Sequence[Any]:
    """At most `most` (two or more) of the items, evenly spaced, the first and last included."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
