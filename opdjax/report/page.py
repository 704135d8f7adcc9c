"""One self-contained HTML page for a work directory, a sweep or an audit: no network, readable
without JavaScript.
"""

from __future__ import annotations

import json
import pathlib
import re

from opdjax.config import PACKAGE
from opdjax.report.audit_page import audit_page
from opdjax.report.charts import require_matplotlib
from opdjax.report.config_diff import against_page
from opdjax.report.markup import Html, join, tag
from opdjax.report.run_page import run_page
from opdjax.report.side_by_side import Marker, unmarked
from opdjax.report.sweep_page import sweep_page
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
    """Write the page of a run, sweep or audit (default: report.html inside it) and say where.

    `paper` narrows a sweep to one table of a paper, `against` tells how another run differs from
    this one; `mark` says which recorded rollouts are right. WorkdirError where the directory is
    none of them, or the place to write to does not exist; ImportError without matplotlib.
    """
    require_matplotlib()
    return _write(
        page(directory, paper=paper, against=against, mark=mark),
        output or directory / page_name(paper, against),
    )


def page_name(paper: str | None, against: pathlib.Path | None) -> str:
    """What the page is called in the directory that it is of."""
    if against is not None:
        return f"against-{against.name or against.resolve().name}.html"
    return "report.html" if paper is None else f"report-{paper}.html"


def write_audit_report(directory: pathlib.Path) -> str:
    """Write the page of a directory's audit.json beside it, whatever else the directory holds; the
    line that tells of it.

    Without matplotlib there is no page, which is no failure: what was measured stands in the file
    already.
    """
    try:
        require_matplotlib()
    except ImportError as error:
        return f"wrote {directory / AUDIT}, and no page of it: {error}"
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
    """The page as text."""
    for each in (directory, against):
        if each is not None and not each.is_dir():
            raise WorkdirError(f"there is no directory {each}")
    if paper is not None and not is_sweep(directory):
        raise WorkdirError(
            f"--paper {paper} narrows the page of a sweep; {directory} holds no points (*/point.json)"
        )
    if against is not None:
        title, parts = against_page(
            read_run(directory), read_run(against), _told_apart(directory, against)
        )
    elif is_sweep(directory):
        title, parts = sweep_page(read_points(directory), directory.resolve().name, mark, paper)
    elif (directory / "config.json").exists():
        failure = directory / FAILURE
        title, parts = run_page(
            read_run(directory), json.loads(failure.read_text()) if failure.exists() else None, mark
        )
    elif (directory / AUDIT).exists():
        return _audit(directory)
    else:
        raise WorkdirError(
            f"{directory} holds neither a run (config.json) nor points of a sweep (*/point.json) nor an audit ({AUDIT})"
        )
    return _document(title, [part for part in parts if part is not None])


def _told_apart(one: pathlib.Path, other: pathlib.Path) -> tuple[str, str]:
    """Names of two directories; with what they lie in where they have the same."""
    one, other = one.resolve(), other.resolve()
    depth = 1 if one.name != other.name else 2
    return "/".join(one.parts[-depth:]), "/".join(other.parts[-depth:])


def _audit(directory: pathlib.Path) -> str:
    document = read_json(directory / AUDIT, "run opdjax audit again")
    missing = [
        name
        for name in ("subjects", "vocabulary", "tree", "contexts", "student", "teacher")
        if name not in document
    ]
    if missing:
        raise WorkdirError(
            f"{directory / AUDIT} lacks {', '.join(missing)}; expected a file written by opdjax audit"
        )
    title, parts = audit_page(document, directory.resolve().name)
    return _document(title, [part for part in parts if part is not None])


def _document(title: str, parts: list[Html]) -> str:
    header, *sections = parts
    found = [re.match(r'<section id="([^"]*)"><h2>(.*?)</h2>', part) for part in sections]
    contents = tag(
        "nav",
        *(tag("a", Html(part[2]), href=f"#{part[1]}") for part in found if part),
        aria_label="contents",
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html((_ASSETS / "page.css").read_text())),
    )
    script = tag("script", Html((_ASSETS / "page.js").read_text()))
    body = tag(
        "body",
        header,
        contents,
        tag("main", *sections),
        tag("footer", _colophon(), class_="quiet"),
        script,
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _colophon() -> Html:
    return join(
        (
            "Made by ",
            tag("code", "opdjax report"),
            " from the files of the directory; nothing is loaded from elsewhere.",
        )
    )
