"""Tables of a sweep: a row for each setting, averaged over seeds and over nothing else. No jax."""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

from opdjax.config.saved import upgrade
from opdjax.config.validation import differences
from opdjax.report.table_formats import Format, comma_separated, latex, markdown
from opdjax.runs.results import Point, Run, SeedGroup, read_points, read_run, seed_groups
from opdjax.runs.statistics import seed_interval
from opdjax.runs.workdir import WorkdirError

# What a row shows of its runs; a column that no run has is left out.
COLUMNS: dict[str, Callable[[Run], float | None]] = {
    "avg@k": lambda run: run.score("avg@k"),
    "greedy": lambda run: run.score("greedy"),
    "pass@k": lambda run: run.score("pass@k"),
    "gain in avg@k": lambda run: run.gain,
    "median gradient norm": lambda run: run.median("grad/norm"),
    "KL, last 10 steps": lambda run: run.last_mean("kl/student_teacher"),
    "staleness KL": lambda run: run.staleness,
    "keep rate": lambda run: run.keep_rate,
    "seconds": lambda run: run.seconds,
}


def table(directory: pathlib.Path, format: Format = "markdown") -> str:
    """The sweep in `directory` as Markdown, LaTeX or CSV; seeds are the only thing that is averaged
    over.

    Mean and half of the 95 % interval over seeds (Student's t; none for one seed), their number n,
    and what is missing. WorkdirError where runs of one row saw different data or models.
    """
    points = read_points(directory)
    rows = [_row(group) for group in seed_groups(points)]
    names = list(dict.fromkeys(name for group in seed_groups(points) for name in group.overrides))
    columns = [name for name in COLUMNS if any(name in row["values"] for row in rows)]
    if format == "csv":
        return _csv(rows, names, columns)
    header = [*names, *columns, "n", "missing"]
    cells = [
        [
            *_labels(row, names),
            *(_cell(row["values"].get(c)) for c in columns),
            str(row["n"]),
            _missing(row),
        ]
        for row in rows
    ]
    if format == "latex":
        return latex(header, cells)
    return "\n".join([markdown(header, cells), "", *_notes(points, columns)])


def _row(group: SeedGroup) -> dict[str, Any]:
    runs = [read_run(point.workdir) for point in group.done]
    _require_one_kind(group.done, runs)
    found = {name: [v for v in map(read, runs) if v is not None] for name, read in COLUMNS.items()}
    values = {name: seed_interval(numbers) for name, numbers in found.items() if numbers}
    return {
        "overrides": group.overrides,
        "values": values,
        "n": len(runs),
        "missing": group.missing,
    }


def _require_one_kind(points: tuple[Point, ...], runs: list[Run]) -> None:
    """A run's directory must hold the run that was asked for, and one row only runs on the same
    data and models.
    """
    for point, run in zip(points, runs):
        changed = differences(upgrade(point.config), upgrade(run.config)) + differences(
            runs[0].data, run.data
        )
        if changed:
            listed = "\n  ".join(changed)
            raise WorkdirError(
                f"{run.workdir} holds another run than its row asks for, or saw other data; move it away:\n  {listed}"
            )


def _labels(row: dict[str, Any], names: list[str]) -> list[str]:
    return [str(row["overrides"].get(name, "")) for name in names]


def _missing(row: dict[str, Any]) -> str:
    """The seeds that are not there; the id where the sweep has no seeds."""
    return ", ".join(
        f"seed={found[1]}" if (found := re.search(r"(?:^|,)seed=(\d+)", id)) else id
        for id in row["missing"]
    )


def _cell(value: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    mean, interval = value
    return _number(mean) if math.isinf(interval) else f"{_number(mean)} ± {_number(interval)}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def _csv(rows: list[dict[str, Any]], names: list[str], columns: list[str]) -> str:
    """Full precision, one column for each mean and one for its half interval (empty for one seed)."""
    lines = []
    for row in rows:
        numbers: list[Any] = []
        for name in columns:
            mean, interval = row["values"].get(name, ("", math.inf))
            numbers += [mean, "" if math.isinf(interval) else interval]
        lines.append([*_labels(row, names), *numbers, row["n"], " ".join(row["missing"])])
    return comma_separated(
        [
            *names,
            *(part for name in columns for part in (name, f"{name} half interval")),
            "n",
            "missing",
        ],
        lines,
    )


def _notes(points: list[Point], columns: list[str]) -> list[str]:
    done = [point for point in points if point.status == "done"]
    runs = [
        json.loads((point.workdir / "config.json").read_text())["environment"] for point in done
    ]
    commits = sorted({str(environment.get("commit"))[:12] for environment in runs})
    kinds = {
        (
            p.config["evaluation"]["source"],
            p.config["evaluation"]["num_samples"],
            p.config["evaluation"]["num_prompts"],
        )
        for p in points
    }
    evaluations = "; ".join(
        f"{source}: k = {k}, at most {count} prompts" for source, k, count in sorted(kinds, key=str)
    )
    notes = [
        "± is half a 95 % interval over seeds (Student's t). Runs of one row answer the same prompts, whose share is not part of it."
    ]
    if "staleness KL" in columns:
        notes.append(
            "Staleness KL: KL(student || behaviour) of the tokens trained on, last 10 steps. Keep rate: mean over all steps."
        )
    if columns:
        notes.append(
            "KL is exact, but for opd and for vopd with a top-k baseline: there it is the mean log-ratio of the sampled tokens."
        )
        notes.append(
            f"{evaluations}. {len(done)} of {len(points)} points done; commit {', '.join(commits) or 'none'}."
        )
    if len(commits) > 1:
        notes.append("Runs of several commits stand in this table.")
    return notes
