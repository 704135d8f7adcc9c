"""Compile the programs of an experiment for a TPU slice, on a machine that has none.

    python tpu/aot_compile.py EXPERIMENT TOPOLOGY [--json FILE] [--section.field VALUE …]

Prints what `opdjax plan EXPERIMENT --topology TOPOLOGY --aot` prints; with --json the numbers are
added to FILE as well, under a name made of experiment, topology and overrides. Needs libtpu beside
jax: pip install 'jax[tpu]==0.10.2'.
"""

import dataclasses
import json
import pathlib
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import tyro

from opdjax.cli.experiments import load_experiment
from opdjax.config import Config
from opdjax.config.topology import topology
from opdjax.diagnose.plan.aot import Program, compile_programs
from opdjax.diagnose.plan.estimate import estimate
from opdjax.diagnose.plan.hlo import traffic
from opdjax.diagnose.plan.table import fits, text
from opdjax.diagnose.plan.workload import read_workload


def main(arguments: list[str]) -> int:
    """0 where the run fits, 1 where it does not, 2 where the question is wrong."""
    if len(arguments) < 2 or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    experiment, name, *rest = arguments
    file = None
    if "--json" in rest:
        at = rest.index("--json")
        file, rest = pathlib.Path(rest[at + 1]), [*rest[:at], *rest[at + 2 :]]
    config = tyro.cli(
        Config,
        args=rest,
        default=load_experiment(experiment),
        prog="aot_compile.py EXPERIMENT TOPOLOGY",
    )
    # No chip of this machine is needed, nor may one be taken from a run.
    jax.config.update("jax_platforms", "cpu")
    plan = estimate(read_workload(config, topology(name)))
    programs = compile_programs(plan.workload)
    print(text(plan, programs))
    if file is not None:
        title = " ".join([pathlib.Path(experiment).stem, name, *rest])
        found = json.loads(file.read_text()) if file.exists() else {}
        found[title] = {
            "versions": {package: _version(package) for package in ("jax", "jaxlib", "libtpu")},
            "mesh": plan.workload.mesh,
            "counted_bytes": {each.name: plan.program_bytes(each.name) for each in programs},
            "programs": [described(program) for program in programs],
        }
        file.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if fits(plan, programs) else 1


def described(program: Program) -> dict[str, Any]:
    """A program as JSON holds it, its collectives by kind and loop."""
    fields = dataclasses.asdict(dataclasses.replace(program, collectives=[]))
    return fields | {
        "temp_bytes": program.temp_bytes,
        "collectives": [dataclasses.asdict(row) for row in traffic(program.collectives)],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"aot_compile.py: {error}")
