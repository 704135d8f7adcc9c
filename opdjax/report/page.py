"""One HTML page for a work directory, a sweep or an audit.

The page is a single file: it loads nothing from elsewhere and is readable without JavaScript.
"""

from __future__ import annotations

import json
import pathlib
import re

from opdjax.config import PACKAGE
from opdjax.report import paper_claims
from opdjax.report.against import against_facts
from opdjax.report.answers import Marker, unmarked
from opdjax.report.audit import CONTEXT, audit_facts
from opdjax.report.charts import require_matplotlib
from opdjax.report.markup import Html, tag
from opdjax.report.render import render
from opdjax.report.run_page import run_page
from opdjax.report.sweep import sweep_facts
from opdjax.runs.results import FAILURE, is_sweep, read_points, read_run
from opdjax.runs.workdir import WorkdirError, read_json

_ASSETS = PACKAGE / "assets" / "report"
AUDIT = "audit.json"


def write_report(
    directory: pathlib.Path,
    output: pathlib.Path | None = None,
    *,
    paper: str | None = None,
    against: pathlib.Path | None = None,
    mark: Marker = unmarked,
) -> pathlib.Path:
    """Write the page of a run, sweep or audit and return its path (default: in the directory).

    `paper` restricts a sweep to one table of a paper. `against` compares the run with another run.
    `mark` decides which recorded rollouts are right. WorkdirError if the directory is none of the
    three, or the directory of `output` does not exist; ImportError without matplotlib.
    """
    require_matplotlib()
    text = page(directory, paper=paper, against=against, mark=mark)
    return _write(text, output or directory / page_name(paper, against))


def page_name(paper: str | None, against: pathlib.Path | None) -> str:
    """The file name of the page."""
    if against is not None:
        return f"against-{against.name or against.resolve().name}.html"
    return "report.html" if paper is None else f"report-{paper}.html"


def write_audit_report(directory: pathlib.Path) -> str:
    """Write audit.html from a directory's audit.json; return the line to print.

    Without matplotlib no page is written. That is no error: audit.json has the measurements.
    """
    try:
        require_matplotlib()
    except ImportError as error:
        return f"wrote {directory / AUDIT} without a page: {error}"
    return f"wrote {_write(_audit(directory), directory / 'audit.html')}"


def _write(text: str, output: pathlib.Path) -> pathlib.Path:
    if not output.parent.is_dir():
        raise WorkdirError(f"--output {output}: there is no directory {output.parent}")
    output.write_text(text, encoding="utf-8")
    return output


def page(
    directory: pathlib.Path,
    *,
    paper: str | None = None,
    against: pathlib.Path | None = None,
    mark: Marker = unmarked,
) -> str:
    """The text of the page; arguments and errors as in `write_report`."""
    for each in (directory, against):
        if each is not None and not each.is_dir():
            raise WorkdirError(f"there is no directory {each}")
    if paper is not None and not is_sweep(directory):
        raise WorkdirError(
            f"--paper {paper} restricts the page of a sweep; {directory} holds no points"
            " (*/point.json)"
        )
    if against is not None:
        names = _distinct_names(directory, against)
        return render("against.html", against_facts(read_run(directory), read_run(against), names))
    if is_sweep(directory):
        points, name = read_points(directory), directory.resolve().name
        facts = sweep_facts(points, name, mark, paper)
        return render("sweep.html", facts, **paper_claims.CONTEXT)
    if (directory / "config.json").exists():
        file = directory / FAILURE
        failure = json.loads(file.read_text()) if file.exists() else None
        title, parts = run_page(read_run(directory), failure, mark)
    elif (directory / AUDIT).exists():
        return _audit(directory)
    else:
        raise WorkdirError(
            f"{directory} holds neither a run (config.json) nor points of a sweep (*/point.json)"
            f" nor an audit ({AUDIT})"
        )
    return _document(title, parts)


def _distinct_names(one: pathlib.Path, other: pathlib.Path) -> tuple[str, str]:
    """Names of two directories; with their parents where the names are equal."""
    one, other = one.resolve(), other.resolve()
    depth = 1 if one.name != other.name else 2
    return "/".join(one.parts[-depth:]), "/".join(other.parts[-depth:])


def _audit(directory: pathlib.Path) -> str:
    document = read_json(directory / AUDIT, "run opdjax audit again")
    return render("audit.html", audit_facts(document, directory.resolve().name), **CONTEXT)


def _document(title: str, parts: list[Html | None]) -> str:
    header, *sections = (part for part in parts if part is not None)
    found = [re.match(r'<section id="([^"]*)"><h2>(.*?)</h2>', part) for part in sections]
    links = (tag("a", Html(part[2]), href=f"#{part[1]}") for part in found if part)
    width = "width=device-width, initial-scale=1"
    style, script = (Html((_ASSETS / name).read_text()) for name in ("page.css", "page.js"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content=width),
        tag("title", title),
        tag("style", style),
    )
    made = "Made by ", tag("code", "opdjax report"), " from the files of the directory."
    body = tag(
        "body",
        header,
        tag("nav", *links, aria_label="contents"),
        tag("main", *sections),
        tag("footer", *made, class_="quiet"),
        tag("script", script),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"
