"""Fill in the papers' tables from the runs of experiments/sweeps/mini_all.py.

    python scripts/paper_tables.py RUNS [--quiet RUNS] [--out experiments/results/papers]

Writes OUT.md and OUT.json: all claims, then the tables as `opdjax table RUNS --paper NAME` prints
them. Seconds come from --quiet, a second directory of the same sweep that ran on an idle machine.
"""

import argparse
import collections
import json
import pathlib
from typing import Any

from benchmark_vocab import cpu_model

from opdjax.report.papers.compare import Comparison, compare
from opdjax.report.papers.printing import claims_of, paper_table
from opdjax.report.papers.registry import PAPER_TABLES
from opdjax.report.papers.tables import PaperTable
from opdjax.report.table_formats import markdown
from opdjax.runs.results import Point, read_points, read_run
from opdjax.runs.workdir import read_lines


def is_timed(table: PaperTable) -> bool:
    """Return whether a column of the table is measured in seconds or per second."""
    read = " ".join(f"{column.read} {column.spent}" for column in table.columns)
    return "time/" in read or "second" in read


def minutes_of(points: list[Point]) -> float:
    """Return the minutes of all attempts, including killed ones whose end was recorded."""
    rows = (row for point in points for row in read_lines(point.workdir / "attempts.jsonl"))
    return sum(row.get("seconds", 0.0) for row in rows) / 60


def header(directories: list[pathlib.Path], points: list[Point]) -> list[str]:
    done = [point for point in points if point.status == "done"]
    commits = sorted({str(read_run(point.workdir).environment["commit"])[:10] for point in done})
    sweep = "    opdjax sweep experiments/sweeps/mini_all.py --workdir"
    commands = [f"{sweep} {directories[0]} --jobs 2"]
    commands += [
        f"{sweep} {directory} --only …    # the timed arms" for directory in directories[1:]
    ]
    commands.append(f"    python scripts/paper_tables.py {' --quiet '.join(map(str, directories))}")
    missing = [point.id for point in points if point.status != "done"]
    return [
        "# The papers' tables on the mini pair",
        "",
        *commands,
        "",
        f"{len(done)} of {len(points)} runs done ({', '.join(missing) or 'none'} missing), at "
        f"commit {', '.join(commits)}; {minutes_of(points):.0f} minutes of runs in total.",
        f"Machine: {cpu_model()}, two cores, one core a run, no accelerator, with other load.",
        "The student has 0.35 million parameters: a claim that is not reproduced here may hold for "
        "models of billions.",
        "",
    ]


def at_a_glance(found: list[Comparison]) -> list[str]:
    """Return a table with the verdict on every claim."""
    verdicts = [verdict for compared in found for verdict in compared.verdicts]
    counted = collections.Counter(verdict.status for verdict in verdicts)
    names = [compared.table.name for compared in found for _ in compared.verdicts]
    head, rows = claims_of(verdicts)
    counts = ", ".join(f"{count} {status}" for status, count in counted.most_common())
    return [
        f"## All {len(verdicts)} claims: {counts}",
        "",
        "Reproduced: the whole 95 % interval of the paired difference over seeds is on the claim's "
        "side. Contradicted: none of it is.",
        "",
        markdown(["table", *head], [[name, *row] for name, row in zip(names, rows)]),
        "",
    ]


def as_json(compared: Comparison) -> dict[str, Any]:
    cells = [
        {
            "row": row,
            "column": column,
            "paper": cell.paper and [cell.paper.number, cell.paper.mark],
            "by_seed": dict(cell.by_seed),
            "config": cell.digest,
            "missing": list(cell.missing),
        }
        for (row, column), cell in compared.cells.items()
        if cell.paper or cell.digest
    ]
    claims = [
        {
            "claim": v.claim.text,
            "mark": v.claim.mark,
            "column": v.column.label,
            "status": v.status,
            "difference": v.difference,
            "n": v.n,
        }
        for v in compared.verdicts
    ]
    return {"cells": cells, "claims": claims, "flags": list(compared.flags)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument(
        "--quiet",
        type=pathlib.Path,
        help="runs of the same arms on an idle machine, for the columns of seconds",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("experiments/results/papers")
    )
    given = parser.parse_args()
    sources = {
        name: given.quiet if given.quiet and is_timed(table) else given.runs
        for name, table in PAPER_TABLES.items()
    }
    points = {directory: read_points(directory) for directory in {given.runs, *sources.values()}}
    found = {name: compare(table, points[sources[name]]) for name, table in PAPER_TABLES.items()}
    found = {name: compared for name, compared in found.items() if compared.is_run}
    parts = [
        *header([given.runs, *([given.quiet] if given.quiet else [])], points[given.runs]),
        *at_a_glance(list(found.values())),
    ]
    for name in found:
        parts += [
            paper_table(sources[name], name),
            *([f"- Runs: {given.quiet}."] if sources[name] == given.quiet else []),
            "",
        ]
    given.out.with_suffix(".md").write_text("\n".join(parts))
    given.out.with_suffix(".json").write_text(
        json.dumps({name: as_json(compared) for name, compared in found.items()}, indent=1) + "\n"
    )
    print("\n".join(at_a_glance(list(found.values()))))


if __name__ == "__main__":
    main()
