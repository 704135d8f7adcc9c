"""From facts to a page: the Jinja2 templates of assets/report, and facts as JSON.

Facts are frozen dataclasses of numbers and texts (`facts_as_json` writes them). A template turns
the facts of one kind of page into sentences, tables and drawings. Every text is escaped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from typing import Any

import jinja2
from markupsafe import Markup

from opdjax.config import PACKAGE
from opdjax.report import drawing, drawing_rows, text
from opdjax.runs.results import is_number

_ASSETS = PACKAGE / "assets" / "report"
_FILTERS = (
    text.fixed,
    text.plus_minus,
    text.number,
    text.integer,
    text.significant,
    text.amount,
    text.percent,
    text.shown,
    text.duration,
    text.count,
    text.listed,
    text.prompt_text,
    text.shortened,
    text.spread,
)
_DRAWINGS = (
    drawing.lines,
    drawing.curves,
    drawing.smoothed,
    drawing.known_line,
    drawing.interval_line,
    drawing.bars,
    drawing.figure,
    drawing.dashes,
    drawing.smoothing_window,
    drawing.smoothing_note,
    drawing.finite,
    drawing_rows.rows_of,
    drawing_rows.lanes,
    drawing_rows.points,
)
_TYPES = (drawing.Line, drawing.Bars, drawing_rows.Mark, drawing_rows.Entry, drawing_rows.Bar)


@functools.cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS),
        autoescape=True,
        extensions=["jinja2.ext.do"],
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {each.__name__: each for each in _FILTERS}
    made.tests["finite"] = is_number
    made.globals |= {each.__name__: each for each in (*_FILTERS, *_DRAWINGS, *_TYPES)}
    made.globals |= {
        "REST": drawing.REST,
        "SERIES": drawing.SERIES,
        "zip": zip,
        "map_of": map_of,
        "contents": contents,
    }
    return made


def map_of(values: Any, name: str) -> list[Any]:
    """The attribute of every value."""
    return [getattr(value, name) for value in values]


def render(template: str, facts: Any, **more: Any) -> str:
    """The page of `facts` (`f` in the template): one file that loads nothing from elsewhere."""
    style, script = ((_ASSETS / name).read_text("utf-8") for name in ("page.css", "page.js"))
    made = _environment().get_template(template)
    return made.render(f=facts, style=style, script=script, **more)


def part(template: str, macro: str, facts: Any) -> str:
    """A part of a page: what a macro makes of the facts."""
    return getattr(_environment().get_template(template).module, macro)(facts)


def facts_as_json(facts: Any) -> str:
    """The facts as JSON, without fields outside of `repr`; null stands for no finite number."""
    return json.dumps(_plain(facts), indent=1, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value) if field.repr)
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def contents(body: str) -> list[tuple[str, Markup]]:
    """(id, title) of the sections of a page."""
    found = re.findall(r'<section id="([^"]*)"><h2>(.*?)</h2>', body)
    return [(anchor, Markup(title)) for anchor, title in found]
