"""One HTML page for a work directory, a sweep, an audit or two runs, and its facts as JSON.

Facts are dictionaries and frozen dataclasses of numbers and texts. A Jinja2 template turns those of
one kind of page into sentences, tables and drawings, and escapes every text. The page is a single
file: it loads nothing from elsewhere and needs no JavaScript.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import re
import types
from typing import Any

import jinja2
from markupsafe import Markup

from opdjax.config import PACKAGE, rubrics
from opdjax.report import audit, drawing, judgements, measures, near_policy, run, table, text
from opdjax.report.sweep import sweep_facts
from opdjax.runs import statistics
from opdjax.runs.results import FAILURE, is_number, is_sweep, read_points, read_run
from opdjax.runs.workdir import WorkdirError, read_json

AUDIT = "audit.json"
_ASSETS = PACKAGE / "assets" / "report"
# Templates use their public functions, classes and constants.
_MODULES = (text, drawing, measures, judgements, near_policy, run, audit, table)
_MODULES += (statistics, rubrics)


def write_report(
    directory: pathlib.Path,
    output: pathlib.Path | None = None,
    *,
    against: pathlib.Path | None = None,
    as_json: bool = False,
) -> pathlib.Path:
    """Write the page of a run, sweep or audit and return its path (default: in the directory).

    `against` compares the run with another run. With `as_json`, the facts of the page are written
    instead of it. WorkdirError if the directory is none of the three, or the directory of `output`
    does not exist; ImportError without matplotlib, which the facts do not need.
    """
    if not as_json:
        drawing.require_matplotlib()
    output = output or directory / page_name(against, as_json=as_json)
    kind, facts = _facts(directory, against)
    page = facts_as_json(facts) if as_json else _render(kind, facts)
    if not output.parent.is_dir():
        raise WorkdirError(f"--output {output}: there is no directory {output.parent}")
    output.write_text(page, encoding="utf-8")
    return output


def page_name(against: pathlib.Path | None, *, as_json: bool = False) -> str:
    """The file name of the page, or of its facts."""
    name = "report" if against is None else f"against-{against.name or against.resolve().name}"
    return f"{name}.{'json' if as_json else 'html'}"


def write_audit_report(directory: pathlib.Path) -> str:
    """Write audit.html from a directory's audit.json; return the line to print.

    Without matplotlib no page is written. That is no error: audit.json has the measurements.
    """
    try:
        drawing.require_matplotlib()
    except ImportError as error:
        return f"wrote {directory / AUDIT} without a page: {error}"
    page = directory / "audit.html"
    page.write_text(_render("audit", _audit(directory)), "utf-8")
    return f"wrote {page}"


def _facts(directory: pathlib.Path, against: pathlib.Path | None) -> tuple[str, Any]:
    """(kind of page, its facts)."""
    for each in (directory, against):
        if each is not None and not each.is_dir():
            raise WorkdirError(f"there is no directory {each}")
    if against is not None:
        one, two = directory.resolve(), against.resolve()
        depth = 1 if one.name != two.name else 2
        names = ["/".join(each.parts[-depth:]) for each in (one, two)]
        return "against", run.against_facts(read_run(directory), read_run(against), names)
    if is_sweep(directory):
        return "sweep", sweep_facts(read_points(directory), directory.resolve().name)
    if (directory / "config.json").exists():
        file = directory / FAILURE
        failure = read_json(file, "delete it") if file.exists() else None
        return "run", run.run_facts(read_run(directory), failure)
    if (directory / AUDIT).exists():
        return "audit", _audit(directory)
    raise WorkdirError(
        f"{directory} holds neither a run (config.json) nor points of a sweep (*/point.json)"
        f" nor an audit ({AUDIT})"
    )


def _audit(directory: pathlib.Path) -> dict[str, Any]:
    document = read_json(directory / AUDIT, "run opdjax audit again")
    return audit.audit_facts(document, directory.resolve().name)


# From facts to texts


def _exported(module: types.ModuleType) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (name.isupper() or getattr(value, "__module__", None) == module.__name__)
    }


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
    made.filters |= _exported(text)
    made.tests["finite"] = is_number
    for module in _MODULES:
        made.globals |= _exported(module)
    made.globals |= {each.__name__: each for each in (zip, contents, is_number)}
    made.globals["style"] = (_ASSETS / "page.css").read_text("utf-8")
    return made


def _render(kind: str, facts: Any) -> str:
    """The page of the facts, `f` in its template."""
    return _environment().get_template(f"{kind}.html").render(f=facts)


def contents(body: str) -> list[tuple[str, Markup]]:
    """(id, title) of the sections of a page."""
    found = re.findall(r'<section id="([^"]*)"><h2>(.*?)</h2>', body)
    return [(anchor, Markup(title)) for anchor, title in found]


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
