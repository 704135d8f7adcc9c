"""Seconds of real runs by phase."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import statistics
import tempfile
import time
from functools import partial
from unittest import mock

from benchmarks.core import Row, progress, report
from opdjax.config import Config, EvaluationConfig
from opdjax.config.experiments import load_config, load_sweep
from opdjax.runs.metrics import Timer
from opdjax.runs.results import read_run
from opdjax.train import train

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SWEEP = pathlib.Path(__file__).parents[2] / "experiments" / "sweeps" / "white_box.py"
UNTIMED_LABELS = ("seed", "learning_rate")


def add_step(parser: argparse.ArgumentParser) -> None:
    """Measure the seconds of a step by phase, for each setting of an experiment or a sweep.

    Real runs of a few steps without evaluation; points that differ in seed, learning rate or
    evaluation only are one setting. A figure is the mean over the steps after the first quarter. A
    run with a refresh schedule makes one refresh in its middle, which the mean spreads over its
    steps.
    """
    parser.set_defaults(run=step, repeats=2)
    add = parser.add_argument
    add("file", nargs="?", type=pathlib.Path, default=SWEEP, help="default: %(default)s")
    add("--steps", type=int, default=40, help="steps of each run")
    add("--only", nargs="+", help="settings whose name contains one of these")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: CPU seconds of the process")


def settings_of(file: pathlib.Path) -> dict[str, Config]:
    """Return one config per kind of work in an experiment or a sweep, by the labels of its point.

    Of points that do the same work, the one with the fewest labels counts.
    """
    if not re.search("^def get_sweep", file.read_text(), re.MULTILINE):
        return {file.stem: load_config(file)}
    found: dict[Config, tuple[str, Config]] = {}
    for point in load_sweep(file):
        kept = [text for label, text in point.overrides.items() if label not in UNTIMED_LABELS]
        optimizer = dataclasses.replace(point.config.optimizer, learning_rate=1.0)
        without = {"seed": 0, "optimizer": optimizer, "evaluation": EvaluationConfig(source=None)}
        work, name = dataclasses.replace(point.config, **without), ", ".join(dict.fromkeys(kept))
        if work not in found or len(name) < len(found[work][0]):
            found[work] = name, point.config
    return dict(found.values())


def shortened(config: Config, steps: int) -> Config:
    near = config.near_policy
    if near.schedule == "refresh":
        # An epoch keeps its number of steps.
        length = max(config.train.num_steps // near.num_epochs, 1)
        epochs = max(steps // length, 2)
        near = dataclasses.replace(near, num_epochs=epochs, refresh_epochs=(epochs // 2,))
        steps = epochs * length
    return dataclasses.replace(
        config,
        near_policy=near,
        train=dataclasses.replace(config.train, num_steps=steps),
        evaluation=dataclasses.replace(config.evaluation, source=None),
        log=dataclasses.replace(config.log, samples_every=0),
    )


def seconds_of(config: Config, clock: str) -> dict[str, float]:
    """Return the mean seconds of each phase of a run."""
    timer = mock.patch("opdjax.train.Timer", partial(Timer, CLOCKS[clock]))
    with tempfile.TemporaryDirectory() as directory, timer:
        train(config, directory)
        rows = read_run(pathlib.Path(directory)).metrics
    rows = rows[len(rows) // 4 :]
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if "time/" in name]
    mean = lambda name: statistics.fmean(row.get(name, 0.0) for row in rows)
    return {name.removeprefix("time/"): mean(name) for name in names}


def step(options: argparse.Namespace) -> None:
    configs = settings_of(options.file)
    is_wanted = lambda name: not options.only or any(text in name for text in options.only)
    configs = {name: config for name, config in configs.items() if is_wanted(name)}
    found: dict[str, Row] = {name: {} for name in configs}
    for _ in range(options.repeats):
        for name, config in configs.items():
            seconds = seconds_of(shortened(config, options.steps), options.clock)
            for phase in sorted(seconds, key="step".__eq__):
                found[name].setdefault(phase, []).append(seconds[phase])
            progress({"setting": name} | seconds)
    report([{"setting": name} | row for name, row in found.items()], options)
