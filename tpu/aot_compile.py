"""Compile the programs of an experiment for a TPU slice, on a machine without one.

    python tpu/aot_compile.py EXPERIMENT TOPOLOGY [--json FILE] [--section.field VALUE …]

Prints the same as `opdjax plan EXPERIMENT --topology TOPOLOGY --aot`. With --json, the numbers are
also added to FILE, under a key made of experiment, topology and overrides. Needs libtpu:
pip install 'jax[tpu]==0.10.2'.
"""

import dataclasses
import json
import pathlib
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import tyro

from opdjax.cli.main import is_user_error
from opdjax.cli.parsing import load_experiment
from opdjax.config import Config
from opdjax.config.topology import topology
from opdjax.diagnose.plan.aot import Program, compile_programs
from opdjax.diagnose.plan.estimate import estimate
from opdjax.diagnose.plan.hlo import traffic
from opdjax.diagnose.plan.table import fits, text
from opdjax.diagnose.plan.workload import read_workload


def main(arguments: list[str]) -> int:
    """Exit status: 0 if the run fits, 1 if it does not, 2 if the arguments are wrong."""
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
    # Needs no accelerator, and must not take one from a run on this machine.
    jax.config.update("jax_platforms", "cpu")
    plan = estimate(read_workload(config, topology(name)))
    programs = compile_programs(plan.workload)
    print(text(plan, programs))
    if file is not None:
        title = " ".join([pathlib.Path(experiment).stem, name, *rest])
        found = json.loads(file.read_text()) if file.exists() else {}
        found[title] = {
            "versions": {package: _version(package) for package in ("jax", "jaxlib", "libtpu")},
            "mesh": dict(plan.workload.layout.shape),
            "counted_bytes": {each.name: plan.program_bytes(each.name) for each in programs},
            "programs": [described(program) for program in programs],
        }
        file.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if fits(plan, programs) else 1


def described(program: Program) -> dict[str, Any]:
    """The JSON entry of a program, with its collectives summed by kind and loop."""
    return dataclasses.asdict(program) | {"collectives": traffic(program.collectives)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if not is_user_error(error):
            raise
        sys.exit(f"aot_compile.py: {error}")
