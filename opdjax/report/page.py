"""One HTML page for a work directory, a sweep, an audit or two runs, and its facts as JSON.

The page is a single file: it loads nothing from elsewhere and is readable without JavaScript.
"""

from __future__ import annotations

import pathlib
from typing import Any

from opdjax.config import rubrics
from opdjax.report import audit, judged, judgements, measures, near_policy, run, table, timeline
from opdjax.report.against import against_facts
from opdjax.report.audit import audit_facts
from opdjax.report.drawing import require_matplotlib
from opdjax.report.render import exported, facts_as_json, render
from opdjax.report.run import run_facts
from opdjax.report.sweep import sweep_facts
from opdjax.runs import statistics
from opdjax.runs.results import FAILURE, is_sweep, read_points, read_run
from opdjax.runs.workdir import WorkdirError, read_json

AUDIT = "audit.json"
# What a template reads beside its facts.
_CONTEXTS: dict[str, dict[str, Any]] = {
    "against": {},
    "audit": exported(audit),
    "run": exported(measures, judgements, near_policy, timeline, judged, run, statistics, rubrics),
    "sweep": exported(table, statistics),
}


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
        require_matplotlib()
    output = output or directory / page_name(against, as_json=as_json)
    kind, facts = _facts(directory, against)
    text = facts_as_json(facts) if as_json else render(f"{kind}.html", facts, **_CONTEXTS[kind])
    if not output.parent.is_dir():
        raise WorkdirError(f"--output {output}: there is no directory {output.parent}")
    output.write_text(text, encoding="utf-8")
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
        require_matplotlib()
    except ImportError as error:
        return f"wrote {directory / AUDIT} without a page: {error}"
    page = directory / "audit.html"
    page.write_text(render("audit.html", _audit(directory), **_CONTEXTS["audit"]), "utf-8")
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
        return "against", against_facts(read_run(directory), read_run(against), names)
    if is_sweep(directory):
        return "sweep", sweep_facts(read_points(directory), directory.resolve().name)
    if (directory / "config.json").exists():
        file = directory / FAILURE
        failure = read_json(file, "delete it") if file.exists() else None
        return "run", run_facts(read_run(directory), failure)
    if (directory / AUDIT).exists():
        return "audit", _audit(directory)
    raise WorkdirError(
        f"{directory} holds neither a run (config.json) nor points of a sweep (*/point.json)"
        f" nor an audit ({AUDIT})"
    )


def _audit(directory: pathlib.Path) -> dict[str, Any]:
    document = read_json(directory / AUDIT, "run opdjax audit again")
    return audit_facts(document, directory.resolve().name)
