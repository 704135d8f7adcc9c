"""What the launch scripts need to know of a slice: `python3 tpu/topology.py v5e-8 [FIELD]`; without
arguments, all there are.

Prints from the package's own table, on any Python 3 and without installing anything.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from opdjax.config.topology import TOPOLOGIES, topology


def facts(name):
    """Field -> text, of one TPU slice."""
    found = topology(name)
    if found.accelerator_type is None:
        raise ValueError(f"{name} is no Cloud TPU; expected a name such as v5e-8 or v6e-16")
    return {
        "accelerator_type": found.accelerator_type,
        "runtime_version": found.chip.runtime_version,
        "chips": str(found.chips),
        "hosts": str(found.hosts),
        "hbm_gib": f"{found.chip.hbm_bytes / 2**30:.2f}",
        "jax_name": found.jax_name,
    }


def main(arguments):
    """Print one field, all fields of one slice, or one line a slice."""
    if not arguments:
        for name in TOPOLOGIES:
            if TOPOLOGIES[name].accelerator_type:
                print(
                    f"{name:10}" + "".join(f"{value:22}" for value in facts(name).values()).rstrip()
                )
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
