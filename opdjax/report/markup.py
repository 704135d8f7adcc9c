"""HTML that is escaped by construction: every text becomes safe when it enters a tag, and numbers
are written one way.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from opdjax.runs.results import is_number

_VOID = {"br", "col", "input", "meta"}


class Html(str):
    """Text that is HTML already; any other string is escaped where it is put into a tag."""

    __slots__ = ()


def join(parts: Iterable[Any]) -> Html:
    """Children one after another: HTML as it is, None as nothing, all else escaped."""
    return Html(
        "".join(
            part if isinstance(part, Html) else html.escape(str(part))
            for part in parts
            if part is not None
        )
    )


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. Attributes: `class_` is class, `data_x` is data-x, True is a bare attribute, None
    and False are left out.
    """
    given = {
        key.rstrip("_").replace("_", "-"): value
        for key, value in attributes.items()
        if value is not None and value is not False
    }
    written = "".join(
        f" {key}" if value is True else f' {key}="{html.escape(str(value))}"'
        for key, value in given.items()
    )
    return (
        Html(f"<{name}{written}>")
        if name in _VOID
        else Html(f"<{name}{written}>{join(children)}</{name}>")
    )


def table(
    head: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    *,
    caption: Any = None,
    class_: str | None = None,
) -> Html:
    """A table in a box of its own that scrolls sideways where the screen is narrow. A cell may be a
    ready `td` or `th`.
    """
    columns = tag("thead", tag("tr", *(_cell(cell, "th", scope="col") for cell in head)))
    body = tag("tbody", *(row if isinstance(row, Html) else table_row(row) for row in rows))
    box = tag(
        "div",
        tag("table", columns, body, class_=class_),
        class_="scroll",
        tabindex=0,
        role="group",
        aria_label="table",
    )
    # Not a <caption>: that would be as wide as the table and scroll away with it.
    return box if caption is None else join((box, tag("p", caption, class_="quiet")))


def table_row(cells: Sequence[Any], **attributes: Any) -> Html:
    """A row whose first cell names it."""
    first, *others = cells
    return tag(
        "tr", _cell(first, "th", scope="row"), *(_cell(cell, "td") for cell in others), **attributes
    )


def _cell(content: Any, name: str, **attributes: Any) -> Html:
    if isinstance(content, Html) and content.startswith(("<td", "<th")):
        return content
    return tag(name, content, **attributes)


def section(anchor: str, title: str, *children: Any) -> Html:
    """A part of the page that the list of contents can point at."""
    return tag("section", tag("h2", title), *children, id=anchor)


def details(summary: Any, *children: Any, **attributes: Any) -> Html:
    """Shown on request; works without JavaScript."""
    return tag("details", tag("summary", summary), *children, **attributes)


def tabs(name: str, views: dict[str, Any], question: str) -> Html:
    """One of several views at a time, chosen by radio buttons alone, so that it works without
    JavaScript.
    """
    if len(views) == 1:
        return tag("div", *views.values())
    choices = []
    for number, view in enumerate(views):
        key = f"{name}-{number}"
        choices += [
            tag("input", type="radio", name=name, id=key, checked=number == 0),
            tag("label", view, for_=key),
        ]
    panels = [tag("div", panel, class_="panel") for panel in views.values()]
    return tag("div", tag("span", question, class_="question"), *choices, *panels, class_="tabs")


def definitions(pairs: dict[str, Any]) -> Html:
    """Words and what they mean."""
    return tag(
        "dl", *(join((tag("dt", name), tag("dd", meaning))) for name, meaning in pairs.items())
    )


def notice(*children: Any, kind: str = "note") -> Html:
    """A remark that must not be missed; `kind` is note or warning."""
    label = {"note": "Note. ", "warning": "Warning. "}[kind]
    return tag("p", tag("strong", label), *children, class_=f"notice {kind}")


# Numbers


def fixed(value: float | None, digits: int = 3) -> str:
    """Such as 0.570; a dash where there is none."""
    # Adding 0.0 turns -0.0, which a tiny negative number is rounded to, into 0.0.
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−") if is_number(value) else "–"


def plus_minus(
    value: float | None, half_width: float | None, digits: int = 3, *, signed: bool = False
) -> str:
    """Such as 0.570 ± 0.021; an interval that one value alone cannot have is ± ∞."""
    if not is_number(value):
        return "–"
    shown = ("+" if signed and value >= 0 else "") + fixed(value, digits)
    if half_width is None:
        return shown
    return f"{shown} ± {fixed(half_width, digits) if is_number(half_width) else '∞'}"


def number(value: Any, smallest: float = 1e-3) -> str:
    """Four significant digits, thousands set apart, those under `smallest` as in 3e-4; what is no
    number stays as it is.
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


def amount(value: float, half_width: float) -> str:
    """Such as 30,640 ± 8,900 or 0.0515 ± 0.055: figures enough for quantities of any size, with
    thousands set apart.
    """
    told = number(float(f"{value:.4g}"))
    return f"{told} ± {number(float(f'{half_width:.2g}')) if is_number(half_width) else '∞'}"


def shown(value: Any) -> str:
    """A setting as a person writes it."""
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
