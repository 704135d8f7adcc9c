"""Measure the CPU seconds of each stage of the methods of the near-policy study, on one core.

    taskset -c 0 python scripts/near_policy_seconds.py

Prints a table and writes experiments/results/near_policy_seconds.json. Real runs of 40 updates,
four epochs of the study's 640 prompts, with a refresh before the third and without evaluation.
Seconds of an update are medians of the last 20; seconds of a refresh are those of the second, when
programs are compiled. They are CPU seconds of the process; on one idle core these equal wall time.
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

METHODS = ("sft", "opd", "vopd", "npd_fresh", "npd")
METHODS += ("npd_no_packing", "npd_no_filter", "no_filter_no_packing")
STEPS, EPOCHS, REFRESH = 40, 4, 2


def shortened(config: Config) -> Config:
    """Return the config with four epochs and one refresh in the middle."""
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
    """Return the seconds of an update, and of one refresh of all prompts, by stage."""
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
    refreshed = rows[REFRESH * STEPS // EPOCHS]
    return {
        "step": step | dict.fromkeys(ONCE, 0.0),
        "drawing": {name: refreshed[f"time/{name}"] for name in ONCE},
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
    print(markdown(["method", *STAGES, *(f"{stage}, a refresh" for stage in ONCE)], lines))
    out = ROOT / "experiments" / "results" / "near_policy_seconds.json"
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
