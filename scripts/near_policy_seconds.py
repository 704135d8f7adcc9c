"""Processor seconds of each stage of the methods of the near-policy study, on one core, whatever
else the machine does.

    taskset -c 0 python scripts/near_policy_seconds.py    # prints a table, writes experiments/results/near_policy_seconds.json

Real runs of 40 updates, four epochs of the study's 640 prompts, with a refresh before the third and
without evaluation; medians of the last 20 updates, and what the second drawing of all prompts took:
programs are compiled by then. Seconds that the process computed, not those on the wall: on one core
they are the same where nothing else runs.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import tempfile
import time
from unittest import mock

from near_policy_study import ONCE, ROOT, STAGES, load_sweep
from white_box_study import markdown

from opdjax.config import Config
from opdjax.config.grid import points, product, vary
from opdjax.runs.metrics import Timer
from opdjax.runs.results import read_run
from opdjax.train import train

METHODS = (
    "sft",
    "opd",
    "vopd",
    "npd_fresh",
    "npd",
    "npd_no_packing",
    "npd_no_filter",
    "no_filter_no_packing",
)
STEPS, EPOCHS, REFRESH = 40, 4, 2


def shortened(config: Config) -> Config:
    """Four of the epochs, and one refresh in their middle."""
    near = config.near_policy
    if near.schedule == "refresh":
        near = dataclasses.replace(near, num_epochs=EPOCHS, refresh_epochs=(REFRESH,))
    return dataclasses.replace(
        config,
        near_policy=near,
        train=dataclasses.replace(config.train, num_steps=STEPS),
        evaluation=dataclasses.replace(config.evaluation, source=None),
        log=dataclasses.replace(config.log, diagnostics_every=0),
    )


def timed(config: Config) -> dict[str, dict[str, float]]:
    """Seconds of a step, and of a drawing of all prompts, by stage."""
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch("opdjax.train.Timer", functools.partial(Timer, time.process_time)),
    ):
        train(shortened(config), directory)
        rows = read_run(pathlib.Path(directory)).metrics
    step = {
        name: statistics.median(row.get(f"time/{name}", 0.0) for row in rows[-20:])
        for name in STAGES
    }
    if config.near_policy.schedule != "refresh":
        return {"step": step, "drawing": {}}
    drawn = rows[REFRESH * STEPS // EPOCHS]
    return {
        "step": step | dict.fromkeys(ONCE, 0.0),
        "drawing": {name: drawn[f"time/{name}"] for name in ONCE},
    }


def main() -> None:
    sweep = load_sweep("near_policy")
    found = {}
    for name in METHODS:
        config = points(
            sweep.BASE,
            product(sweep.method(name), vary("optimizer.learning_rate", (sweep.rate_of(name),))),
        )[0].config
        found[name] = timed(config)
        print(name, found[name], flush=True)
    lines = [
        [
            f"`{name}`",
            *(f"{of['step'][stage]:.4f}" for stage in STAGES),
            *(f"{of['drawing'].get(stage, 0):.2f}" for stage in ONCE),
        ]
        for name, of in found.items()
    ]
    print(markdown(["method", *STAGES, *(f"{stage}, a drawing" for stage in ONCE)], lines))
    out = ROOT / "experiments" / "results" / "near_policy_seconds.json"
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
