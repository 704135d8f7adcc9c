"""Measure the seconds of a step of every recipe of the white-box study, on an idle machine.

    python scripts/time_recipes.py

Prints a table and writes experiments/results/white_box_seconds.json. Real runs of 40 steps of 64
completions without evaluation; medians of the last 30 steps, the faster of two rounds.
"""

import dataclasses
import json
import pathlib
import statistics
import tempfile

from white_box_study import ROOT, load_sweep

from opdjax.config.grid import points, product, vary
from opdjax.runs.results import read_run
from opdjax.train import train

PHASES = ("time/sample", "time/teacher", "time/update", "time/step")


def run_once(config) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        train(config, directory)
        rows = read_run(pathlib.Path(directory)).metrics[10:]
    return {phase: statistics.median(row[phase] for row in rows) for phase in PHASES}


def main() -> None:
    sweep = load_sweep()
    base = dataclasses.replace(
        sweep.BASE,
        evaluation=dataclasses.replace(sweep.BASE.evaluation, source=None),
        log=dataclasses.replace(sweep.BASE.log, samples_every=0),
        mesh=dataclasses.replace(sweep.BASE.mesh, data=1),
    )
    short = vary("train.num_steps", (40,))
    names = (*sweep.ON_POLICY, *sweep.VARIANTS, *sweep.OFF_POLICY)
    configs = {
        name: points(base, product(sweep.one_recipe(name), short))[0].config for name in names
    }
    rounds = [{name: run_once(config) for name, config in configs.items()} for _ in range(2)]
    best = {
        name: min((found[name] for found in rounds), key=lambda seconds: seconds["time/step"])
        for name in configs
    }
    print("| recipe | sample | teacher | update | step |\n|---|---|---|---|---|")
    for name, seconds in best.items():
        print(f"| `{name}` | " + " | ".join(f"{seconds[phase]:.4f}" for phase in PHASES) + " |")
    out = ROOT / "experiments" / "results" / "white_box_seconds.json"
    out.write_text(json.dumps(best, indent=1) + "\n")


if __name__ == "__main__":
    main()
