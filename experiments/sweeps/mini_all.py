"""All tables of the four papers on the built-in mini pair, in one directory; the README's summary
table is computed from these runs.

    opdjax sweep experiments/sweeps/mini_all.py --workdir runs/mini_all --jobs 2
    opdjax table runs/mini_all --paper all --output experiments/results/papers.md
    opdjax report runs/mini_all

The points are those of mini_vopd.py, mini_npd.py and mini_ropd.py, which describe the arms.
Hardware: two CPU cores, about three hours.
"""

from opdjax.config.experiments import sweeps_beside
from opdjax.config.grid import SCORED_ON, SweepPoint


def get_sweep() -> list[SweepPoint]:
    found = sweeps_beside(__file__, "mini_vopd.py", "mini_npd.py", "mini_ropd.py")
    # The grids come first. Then all arms of one seed come before the next seed, so tables are
    # complete for one seed early.
    return sorted(found, key=lambda p: (SCORED_ON not in p.overrides, p.config.seed))
