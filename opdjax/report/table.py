"""The table of a sweep: one row per setting, averaged over its seeds only. No jax."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from opdjax.config.saved import upgrade
from opdjax.config.validation import differences
from opdjax.report.table_formats import Format, comma_separated, latex, markdown
from opdjax.runs.results import Point, Run, SeedGroup, read_points, read_run, seed_groups
from opdjax.runs.statistics import seed_interval
from opdjax.runs.workdir import WorkdirError

Reading = Callable[[pathlib.Path], Run]

# The numbers of a run that a row shows; a column that no run has is left out.
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


@dataclasses.dataclass(frozen=True)
class _TableRow:
    """A setting and the statistics of its runs."""

    overrides: Mapping[str, Any]
    values: Mapping[str, tuple[float, float]]  # column -> (mean, half width of the interval)
    n: int
    missing: tuple[str, ...]


def table(directory: pathlib.Path, format: Format = "markdown") -> str:
    """The sweep in `directory` as Markdown, LaTeX or CSV.

    A cell has the mean and half the 95 % interval over seeds (Student's t; no interval for one
    seed). Further columns have the number of seeds n and the missing ones. WorkdirError if runs of
    one row have different data or models.
    """
    points = read_points(directory)
    found = seed_groups(points)
    rows = [_row(group) for group in found]
    names = list(dict.fromkeys(name for group in found for name in group.overrides))
    columns = [name for name in COLUMNS if any(name in row.values for row in rows)]
    if format == "csv":
        return _csv(rows, names, columns)
    header = [*names, *columns, "n", "missing"]
    cells = [
        [
            *_labels(row, names),
            *(_cell(row.values.get(column)) for column in columns),
            str(row.n),
            ", ".join(map(seed_of, row.missing)),
        ]
        for row in rows
    ]
    if format == "latex":
        return latex(header, cells)
    return "\n".join([markdown(header, cells), "", *_notes(points, columns)])


def read_group(group: SeedGroup, reading: Reading = read_run) -> list[Run]:
    """The completed runs of a group. WorkdirError if a run's config differs from its point's, or
    its data and models from those of the first run.
    """
    runs = [reading(point.workdir) for point in group.done]
    for point, run in zip(group.done, runs):
        changed = differences(upgrade(point.config), upgrade(run.config))
        changed += differences(runs[0].data, run.data)
        if changed:
            listed = "\n  ".join(changed)
            raise WorkdirError(
                f"{run.workdir} holds another run than its point asks for, or one with other data; "
                f"move it away:\n  {listed}"
            )
    return runs


def seed_of(id: str) -> str:
    """The `seed=N` of a point's id; the id if it has none."""
    found = re.search(r"(?:^|,)(seed=\d+)", id)
    return found[1] if found else id


def _row(group: SeedGroup) -> _TableRow:
    runs = read_group(group)
    found = {name: [v for v in map(read, runs) if v is not None] for name, read in COLUMNS.items()}
    values = {name: seed_interval(numbers) for name, numbers in found.items() if numbers}
    return _TableRow(group.overrides, values, len(runs), group.missing)


def _labels(row: _TableRow, names: list[str]) -> list[str]:
    return [str(row.overrides.get(name, "")) for name in names]


def _cell(value: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    mean, half = value
    return _number(mean) if math.isinf(half) else f"{_number(mean)} ± {_number(half)}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def _csv(rows: list[_TableRow], names: list[str], columns: list[str]) -> str:
    """Full precision; one column for a mean and one for its half interval, empty for one seed."""
    lines = []
    for row in rows:
        numbers: list[Any] = []
        for name in columns:
            mean, half = row.values.get(name, ("", math.inf))
            numbers += [mean, "" if math.isinf(half) else half]
        lines.append([*_labels(row, names), *numbers, row.n, " ".join(row.missing)])
    means = [part for name in columns for part in (name, f"{name} half interval")]
    return comma_separated([*names, *means, "n", "missing"], lines)


def _notes(points: list[Point], columns: list[str]) -> list[str]:
    done = [point for point in points if point.status == "done"]
    saved = [json.loads((point.workdir / "config.json").read_text()) for point in done]
    commits = sorted({str(each["environment"].get("commit"))[:12] for each in saved})
    fields = ("source", "num_samples", "num_prompts")
    kinds = {tuple(point.config["evaluation"][name] for name in fields) for point in points}
    evaluations = "; ".join(
        f"{source}: k = {k}, at most {count} prompts" for source, k, count in sorted(kinds, key=str)
    )
    notes = [
        "± is half a 95 % interval over seeds (Student's t). Runs of one row answer the same "
        "prompts, so it does not include the variance over prompts."
    ]
    if "staleness KL" in columns:
        notes.append(
            "Staleness KL: KL(student || behaviour) of the tokens trained on, last 10 steps. Keep "
            "rate: mean over all steps."
        )
    if columns:
        notes.append(
            "KL is exact, except for opd and for vopd with a top-k baseline, where it is the mean "
            "log-ratio of the sampled tokens."
        )
        notes.append(
            f"{evaluations}. {len(done)} of {len(points)} points done; commit "
            f"{', '.join(commits) or 'none'}."
        )
    if len(commits) > 1:
        notes.append("The runs of this table are of several commits.")
    return notes
