"""What all benchmarks share: alternating runs, medians, the line on the machine, the table."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from opdjax.report.table import markdown
from opdjax.runs.workdir import num_cores

Row = dict[str, Any]  # a list of numbers is one per run: the table shows their median and range


class Runs(NamedTuple):
    """All counted runs of one piece of work, in order."""

    wall: list[float]  # seconds
    cpu: list[float]  # CPU seconds of the process
    results: list[Any]  # what `describe` returned for each run


def alternate(
    works: Mapping[str, Callable[[], Any]],
    repeats: int,
    describe: Callable[[Any], Any] = lambda result: None,
    warm_ups: int = 1,
) -> dict[str, Runs]:
    """Run all works in turn, in reversed order every other round, and time each run.

    Other load on the machine then affects all works alike. `describe` reads a result and is not
    timed. The first `warm_ups` rounds are not counted.
    """
    import jax

    found = {name: Runs([], [], []) for name in works}
    for turn in range(warm_ups + repeats):
        for name in list(works)[:: -1 if turn % 2 else 1]:
            wall, cpu = time.perf_counter(), time.process_time()
            result = jax.block_until_ready(works[name]())
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn >= warm_ups:
                for values, value in zip(found[name], (wall, cpu, describe(result))):
                    values.append(value)
    return found


def progress(row: Row) -> Row:
    """Print a row to standard error as soon as it is known, and return it."""
    print({name: cell(value) for name, value in row.items()}, file=sys.stderr, flush=True)
    return row


def machine() -> str:
    """Return the processor, its cores, and the backend of jax if it is in use."""
    info = pathlib.Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)", info.read_text() if info.exists() else "", re.M)
    found = f"{named[1] if named else platform.processor()}, {num_cores()} cores"
    if jax := sys.modules.get("jax"):
        devices = jax.devices()
        found += f"; jax {jax.__version__} on {len(devices)} x {devices[0].device_kind}"
    return found


def cell(value: Any) -> str:
    """Return a value as text: three digits or more of a number, median (range) of several."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list):
        middle, *ends = map(cell, (statistics.median(value), min(value), max(value)))
        return f"{middle} ({ends[0]} to {ends[1]})" if len(value) > 1 else middle
    return f"{value:,}" if isinstance(value, int) else str(value)


def to_markdown(rows: Iterable[Row]) -> str:
    """Return a table whose columns are the keys of the rows, in the order of their appearance."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return markdown(columns, [[cell(row.get(name)) for name in columns] for row in rows])


def report(
    rows: list[Row], options: argparse.Namespace, notes: Sequence[str] = (), **facts: Any
) -> None:
    """Print the table; write rows, machine, options and `facts` to the file `--output`."""
    hidden = ("command", "run", "output")
    chosen = {name: value for name, value in vars(options).items() if name not in hidden}
    document = {"command": options.command, "machine": machine(), "options": chosen}
    given = ", ".join(f"{name} {value}" for name, value in chosen.items())
    heading = f"`benchmark.py {options.command}` on {machine()}. Options: {given}."
    print("\n".join([heading, *notes, "", to_markdown(rows)]))
    if options.output:
        document |= {"rows": rows, **facts}
        options.output.write_text(json.dumps(document, indent=1, default=str) + "\n")
