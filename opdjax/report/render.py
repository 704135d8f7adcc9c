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
import types
from typing import Any

import jinja2
from markupsafe import Markup

from opdjax.config import PACKAGE
from opdjax.report import drawing, text
from opdjax.runs.results import is_number

_ASSETS = PACKAGE / "assets" / "report"


def exported(*modules: types.ModuleType) -> dict[str, Any]:
    """What templates may use of the modules: their public functions and classes, and constants."""
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (name.isupper() or getattr(value, "__module__", None) == module.__name__)
    }


@functools.cache
def environment() -> jinja2.Environment:
    """The templates, with what every one of them may use."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS),
        autoescape=True,
        extensions=["jinja2.ext.do"],
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= exported(text)
    made.tests["finite"] = is_number
    made.globals |= exported(text, drawing)
    made.globals |= {each.__name__: each for each in (zip, contents, is_number)}
    return made


def render(template: str, facts: Any, **more: Any) -> str:
    """The page of `facts` (`f` in the template): one file that loads nothing from elsewhere."""
    style, script = ((_ASSETS / name).read_text("utf-8") for name in ("page.css", "page.js"))
    made = environment().get_template(template)
    return made.render(f=facts, style=style, script=script, **more)


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
