"""Every table of the four papers on the built-in mini pair, in one directory: what the README's
condensed table stands on.

    opdjax sweep experiments/sweeps/mini_all.py --workdir runs/mini_all --jobs 2
    python scripts/paper_tables.py runs/mini_all           # writes experiments/results/papers.*
    opdjax report runs/mini_all

The points of mini_vopd.py, mini_npd.py and mini_ropd.py beside this file, which say what each arm
is. Two CPU cores: about an hour.
"""

from opdjax.config.experiments import sweeps_beside
from opdjax.config.grid import SweepPoint


def get_sweep() -> list[SweepPoint]:
    found = sweeps_beside(__file__, "mini_vopd.py", "mini_npd.py", "mini_ropd.py")
    return sorted(
        found, key=lambda point: point.config.seed
    )  # a table is whole, of one seed, as early as can be
