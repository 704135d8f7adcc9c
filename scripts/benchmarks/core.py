"""What all benchmarks share: alternating runs, medians, the line on the machine, the table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from opdjax.report.table import markdown
from opdjax.runs.workdir import num_cores

Row = dict[str, Any]  # a list of numbers is one per run: the table shows their median and range


@dataclasses.dataclass(frozen=True)
class Runs:
    """All counted runs of one piece of work, in order."""

    wall: list[float]  # seconds
    cpu: list[float]  # CPU seconds of the process
    results: list[Any]  # what `describe` returned for each run

    def row(self) -> Row:
        """Return the columns of a table that show the two clocks."""
        return {"seconds": self.wall, "CPU seconds": self.cpu}


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
            described = describe(result)
            if turn >= warm_ups:
                runs = found[name]
                runs.wall.append(wall)
                runs.cpu.append(cpu)
                runs.results.append(described)
    return found


def temp_mib(compiled: Any) -> float:
    """Return XLA's figure of a program's temporary memory, without arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def progress(row: Row) -> Row:
    """Print a row to standard error as soon as it is known, and return it."""
    print({name: cell(value) for name, value in row.items()}, file=sys.stderr, flush=True)
    return row


def machine() -> str:
    """Return the processor, its cores, and the backend of jax if it is in use."""
    model = platform.processor()
    info = pathlib.Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    found = f"{model}, {num_cores()} cores"
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
    heading = f"`benchmark.py {options.command}` on {machine()}."
    given = ", ".join(f"{name} {_plain(value)}" for name, value in chosen.items())
    print("\n".join([heading, f"Options: {given}.", *notes, "", to_markdown(rows)]))
    if options.output:
        document = {"command": options.command, "machine": machine(), "options": chosen}
        document |= {"rows": rows, **facts}
        options.output.write_text(json.dumps(document, indent=1, default=str) + "\n")


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
