"""Asynchronous against synchronous generation on two simulated devices."""

from __future__ import annotations

import argparse
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.core import Row, progress, report
from opdjax.runs.workdir import read_lines

EXPERIMENT = pathlib.Path(__file__).parents[2] / "experiments" / "mini_vopd.py"
CONTINUOUS = {"schedule": "continuous"}
THREAD = CONTINUOUS | {"generator": "thread"}
BASE = "synchronous, both devices"
MODES: dict[str, dict[str, Any]] = {
    "on-policy, both devices": {},
    BASE: CONTINUOUS,
    "asynchronous, lag 2": THREAD | {"max-staleness": 2},
    "asynchronous, lag 8": THREAD | {"max-staleness": 8},
    "asynchronous, free to 8": THREAD | {"max-staleness": 8, "lag": "free"},
}


def add_async(parser: argparse.ArgumentParser) -> None:
    """Compare asynchronous with synchronous generation on the same two simulated devices.

    Every run trains the mini pair on the same prompts for the same number of updates, in its own
    process with two simulated CPU devices: synchronous on both (data parallel, the paper's
    on-policy baseline), or asynchronous with one device each for generator and learner. All figures
    leave out the first steps, which fill the buffer and compile the programs. Both devices share
    the cores and memory of one machine: the work overlaps here, the hardware does not.
    """
    parser.set_defaults(run=compare, repeats=3)
    add = parser.add_argument
    add("--steps", type=int, default=60, help="updates of a run")
    add("--warm", type=int, default=15, help="updates that are left out at the start")
    add("--recipe", choices=("npd", "full_kl"), default="npd")
    add("--workdir", type=pathlib.Path, help="an empty directory that keeps the runs")


def train(workdir: pathlib.Path, mode: dict[str, Any], options: argparse.Namespace) -> None:
    """Train once in a process with two simulated devices; exit with its last words if it fails."""
    steps = options.steps
    settings = {"workdir": workdir, "train.num-steps": steps, "checkpoint.every": steps}
    settings |= {"log.samples-every": 0, "log.diagnostics-every": 0, "evaluation.source": None}
    settings |= {"estimator.recipe": options.recipe, "estimator.baseline": None}
    settings |= {f"near-policy.{name}": value for name, value in mode.items()}
    command = [sys.executable, "-m", "opdjax", "train", str(EXPERIMENT)]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command += ["--evaluation.temperatures", "1"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def end_of(span: dict) -> float:
    return span["start"] + span["seconds"]


def measures(workdir: pathlib.Path, warm: int) -> dict[str, float]:
    """Return the figures of a run after `warm` updates."""
    metrics = [row for row in read_lines(workdir / "metrics.jsonl") if row["step"] > warm]
    spans, made = (
        read_lines(file) if (file := workdir / f"timeline-{role}.jsonl").exists() else []
        for role in ("learner", "generator")
    )
    waits = [f"time/{name}" for name in ("wait", "sample", "annotate")]
    idle = sum(row.get(name, 0) for row in metrics for name in waits)
    seconds = sum(row["time/step"] for row in metrics)
    if spans:  # wall clock: the time between phases counts too
        ends = {span["step"]: end_of(span) for span in spans if span["what"] == "update"}
        seconds = ends[max(ends)] - ends[warm]
    return {
        "seconds an update": seconds / len(metrics),
        "tokens/s": sum(row["perf/trained_tokens"] for row in metrics) / seconds,
        "learner idle for generation, %": 100 * idle / seconds,
        "generator busy, %": busy([span for span in made if span["step"] > warm]),
        "steps ahead at most": most_ahead(spans, made),
    }


def busy(spans: list[dict]) -> float:
    """Return the share of time in which the generator works; NaN if it never works on its own."""
    if not any(span["what"] == "admit" for span in spans):
        return float("nan")
    whole = max(map(end_of, spans)) - min(span["start"] for span in spans)
    return 100 * sum(span["seconds"] for span in spans if span["what"] != "admit") / whole


def most_ahead(learner: list[dict], generator: list[dict]) -> int:
    """Return the most steps whose rollouts were stored and not yet trained on."""
    sampled = {span["step"]: end_of(span) for span in generator if span["what"] != "admit"}
    taken = {span["step"] - 1: span["start"] for span in learner if span["what"] == "pack"}
    moments = [(at, 1) for at in sampled.values()]
    moments += [(taken[step], -1) for step in sampled if step in taken]
    return max(itertools.accumulate(change for _, change in sorted(moments)), default=0)


def compare(options: argparse.Namespace) -> None:
    """Run the modes in turn, so that other load on the machine affects them all."""
    root = options.workdir or pathlib.Path(tempfile.mkdtemp(prefix="benchmark_async_"))
    found: dict[str, Row] = {name: {} for name in MODES}
    for repeat in range(options.repeats):
        for number, (name, mode) in enumerate(MODES.items()):
            workdir = root / f"{number}_{repeat}"
            train(workdir, mode, options)
            for measure, value in measures(workdir, options.warm).items():
                found[name].setdefault(measure, []).append(value)
            progress({"mode": name, "seconds": found[name]["seconds an update"][-1]})
    base = statistics.median(found[BASE]["seconds an update"])
    for row in found.values():
        row["throughput, synchronous = 1"] = base / statistics.median(row["seconds an update"])
    report([{"mode": name} | row for name, row in found.items()], options, [f"Runs in {root}."])
