"""HTML that is escaped by construction, and one way to write each kind of number.

Every text is escaped when it enters a tag.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from opdjax.runs.results import is_number

_VOID = {"br", "col", "input", "meta"}


class Html(str):
    """A string that is already HTML. Any other string is escaped when it enters a tag."""

    __slots__ = ()


def join(parts: Iterable[Any]) -> Html:
    """The parts in order: HTML unchanged, None left out, everything else escaped."""
    kept = (part for part in parts if part is not None)
    return Html("".join(p if isinstance(p, Html) else html.escape(str(p)) for p in kept))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element.

    In attribute names a trailing `_` is dropped and `_` becomes `-`. True writes the name alone;
    None and False write nothing.
    """
    written = "".join(
        f" {key}" if value is True else f' {key}="{html.escape(str(value))}"'
        for key, value in (
            (key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()
        )
        if value is not None and value is not False
    )
    end = "" if name in _VOID else f"{join(children)}</{name}>"
    return Html(f"<{name}{written}>{end}")


def finding(text: str | None) -> Html | None:
    """The sentence that states the result of a section; None where the text is empty."""
    return tag("p", text, class_="finding") if text else None


def quiet(*children: Any) -> Html:
    """A paragraph of explanation, in muted ink."""
    return tag("p", *children, class_="quiet")


def table(
    head: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    *,
    caption: Any = None,
    class_: str | None = None,
) -> Html:
    """A table that scrolls sideways on a narrow screen. A cell may be a finished `td` or `th`."""
    columns = tag("thead", tag("tr", *(_cell(cell, "th", scope="col") for cell in head)))
    body = tag("tbody", *(row if isinstance(row, Html) else table_row(row) for row in rows))
    content = tag("table", columns, body, class_=class_)
    box = tag("div", content, class_="scroll", tabindex=0, role="group", aria_label="table")
    # Not a <caption>: it would be as wide as the table and scroll away with it.
    return box if caption is None else join((box, quiet(caption)))


def table_row(cells: Sequence[Any], **attributes: Any) -> Html:
    """A row; its first cell is the row's heading."""
    first, *others = cells
    heading = _cell(first, "th", scope="row")
    return tag("tr", heading, *(_cell(cell, "td") for cell in others), **attributes)


def group_row(title: Any, num_columns: int) -> Html:
    """A heading over the rows that follow, as wide as the table."""
    heading = tag("th", title, colspan=num_columns, scope="rowgroup")
    return tag("tr", heading, class_="section")


def text_head(title: str) -> Html:
    """The heading of a column of text, which is aligned to the left."""
    return tag("th", title, class_="text", scope="col")


def text_cell(*children: Any) -> Html:
    """A cell of running text, which may wrap."""
    return tag("td", *children, class_="wrap text")


def _cell(content: Any, name: str, **attributes: Any) -> Html:
    if isinstance(content, Html) and content.startswith(("<td", "<th")):
        return content
    return tag(name, content, **attributes)


def section(
    anchor: str, title: str, *children: Any, lead: str | None = None, about: Any = None
) -> Html:
    """A section that the table of contents links to.

    `lead` (its finding) and `about` (an explanation) come before the children.
    """
    opening = (finding(lead), quiet(about) if about else None)
    return tag("section", tag("h2", title), *opening, *children, id=anchor)


def details(summary: Any, *children: Any, **attributes: Any) -> Html:
    """Content that is folded away; it opens without JavaScript."""
    return tag("details", tag("summary", summary), *children, **attributes)


def tabs(name: str, views: dict[str, Any], question: str) -> Html:
    """One of several views at a time, chosen with radio buttons; needs no JavaScript."""
    if len(views) == 1:
        return tag("div", *views.values())
    choices = []
    for number, view in enumerate(views):
        key = f"{name}-{number}"
        choices.append(tag("input", type="radio", name=name, id=key, checked=number == 0))
        choices.append(tag("label", view, for_=key))
    panels = [tag("div", panel, class_="panel") for panel in views.values()]
    return tag("div", tag("span", question, class_="question"), *choices, *panels, class_="tabs")


def definitions(pairs: dict[str, Any]) -> Html:
    """Terms and their meanings."""
    rows = (join((tag("dt", term), tag("dd", meaning))) for term, meaning in pairs.items())
    return tag("dl", *rows)


def notice(*children: Any, kind: str = "note") -> Html:
    """A remark that the reader must not miss; `kind` is note or warning."""
    label = {"note": "Note. ", "warning": "Warning. "}[kind]
    return tag("p", tag("strong", label), *children, class_=f"notice {kind}")


# Numbers


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
    if value == 0 or smallest <= abs(value) < 1e4:
        text = f"{value:.4g}"
    elif abs(value) >= 1e4:
        text = f"{value:,.0f}"
    else:
        mantissa, exponent = f"{value:.3e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return text.replace("-", "−") if text.startswith("-") else text


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


# Text


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
