"""Prints facts about a TPU slice: `python3 tpu/topology.py v5e-8 [FIELD]`; without arguments, lists
all slices.

Reads the package's own table. Needs Python 3.11 and no installed package.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from opdjax.config.topology import TOPOLOGIES, topology


def facts(name):
    """Field -> text, for one TPU slice; ValueError if there is none of that name."""
    found = topology(name)
    if found.accelerator_type is None:
        raise ValueError(f"{name} is not a TPU slice; expected a name such as v5e-8 or v6e-16")
    return {
        "accelerator_type": found.accelerator_type,
        "runtime_version": found.chip.runtime_version,
        "chips": str(found.chips),
        "hosts": str(found.hosts),
        "hbm_gib": f"{found.chip.hbm_bytes / 2**30:.2f}",
        "jax_name": found.jax_name,
    }


def main(arguments):
    """Print one field, all fields of one slice, or one line per slice."""
    if not arguments:
        for name, machine in TOPOLOGIES.items():
            if machine.accelerator_type:
                cells = "".join(f"{value:22}" for value in facts(name).values())
                print(f"{name:10}{cells}".rstrip())
        return
    found = facts(arguments[0])
    if len(arguments) == 1:
        for field, value in found.items():
            print(f"{field:18}{value}")
    elif len(arguments) == 2 and arguments[1] in found:
        print(found[arguments[1]])
    else:
        raise ValueError(f"expected a topology and one of the fields {', '.join(found)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"{sys.argv[0]}: {error}")
