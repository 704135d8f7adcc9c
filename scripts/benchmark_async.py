"""Compare asynchronous with synchronous generation on the same two simulated devices.

    python scripts/benchmark_async.py                  # prints a table
    python scripts/benchmark_async.py --repeats 3 --steps 60 --workdir DIR   # keeps the runs

Every run trains the mini pair on the same prompts for the same number of updates, in its own
process with two simulated CPU devices: synchronous on both (data parallel, the paper's on-policy
baseline), or asynchronous with one device each for generator and learner. All figures leave out the
first steps, which fill the buffer and compile the programs. Both devices share the cores and memory
of one machine: the work overlaps here, the hardware does not.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

DEVICES = 2
CONTINUOUS = ("--near-policy.schedule", "continuous")
THREAD = (*CONTINUOUS, "--near-policy.generator", "thread", "--near-policy.max-staleness")
MODES = {
    "on-policy, both devices": (),
    "synchronous, both devices": CONTINUOUS,
    "asynchronous, lag 2": (*THREAD, "2"),
    "asynchronous, lag 8": (*THREAD, "8"),
    "asynchronous, free to 8": (*THREAD, "8", "--near-policy.lag", "free"),
}
RECIPES = {
    "npd": ("--estimator.recipe", "npd", "--estimator.baseline", "None"),
    "full_kl": ("--estimator.recipe", "full_kl", "--estimator.baseline", "None"),
}


def run(workdir: pathlib.Path, options: tuple[str, ...], steps: int) -> None:
    """Train once on simulated devices."""
    command = [sys.executable, "-m", "opdjax", "train", "experiments/mini_vopd.py"]
    settings = {"workdir": workdir, "train.num-steps": steps, "checkpoint.every": steps}
    settings |= {"log.samples-every": 0, "log.diagnostics-every": 0, "evaluation.source": None}
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command += ["--evaluation.temperatures", "1", *options]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def rows_of(file: pathlib.Path) -> list[dict]:
    """Return the rows of a JSONL file; none if it does not exist."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def measures(workdir: pathlib.Path, warm: int) -> dict[str, float]:
    """Return the figures of a run from step `warm` on.

    Seconds an update, tokens a second, the share of time that the learner waits for rollouts, and
    the most steps stored ahead.
    """
    metrics = [row for row in rows_of(workdir / "metrics.jsonl") if row["step"] > warm]
    spans = rows_of(workdir / "timeline-learner.jsonl")
    idle = sum(
        row.get(f"time/{name}", 0) for row in metrics for name in ("wait", "sample", "annotate")
    )
    seconds = sum(row["time/step"] for row in metrics)
    if spans:  # wall clock: the time between phases counts too
        ends = {
            row["step"]: row["start"] + row["seconds"] for row in spans if row["what"] == "update"
        }
        seconds = ends[max(ends)] - ends[warm]
    tokens = sum(row["perf/trained_tokens"] for row in metrics)
    return {
        "seconds": seconds / len(metrics),
        "tokens/s": tokens / seconds,
        "learner idle": idle / seconds,
        "generator busy": busy(workdir, warm),
        "ahead": most_ahead(workdir),
    }


def busy(workdir: pathlib.Path, warm: int) -> float:
    """Return the share of time in which the generator works; NaN if it never works on its own."""
    spans = [row for row in rows_of(workdir / "timeline-generator.jsonl") if row["step"] > warm]
    if not any(row["what"] == "admit" for row in spans):
        return float("nan")
    whole = max(row["start"] + row["seconds"] for row in spans) - min(row["start"] for row in spans)
    return sum(row["seconds"] for row in spans if row["what"] != "admit") / whole


def most_ahead(workdir: pathlib.Path) -> float:
    """Return the most steps whose rollouts were stored and not yet trained on."""
    sampled = {
        row["step"]: row["start"] + row["seconds"]
        for row in rows_of(workdir / "timeline-generator.jsonl")
        if row["what"] != "admit"
    }
    taken = {
        row["step"] - 1: row["start"]
        for row in rows_of(workdir / "timeline-learner.jsonl")
        if row["what"] == "pack"
    }
    moments = [(at, 1) for at in sampled.values()]
    moments += [(taken[step], -1) for step in sampled if step in taken]
    depth = most = 0
    for _, change in sorted(moments):
        depth += change
        most = max(most, depth)
    return most


def main() -> None:
    """Run every mode and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm", type=int, default=15, help="steps left out at the start")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="npd")
    parser.add_argument("--workdir", type=pathlib.Path, default=None)
    options = parser.parse_args()
    root = options.workdir or pathlib.Path(tempfile.mkdtemp(prefix="benchmark_async_"))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in MODES}
    for repeat in range(options.repeats):  # alternate the modes: other load then affects them all
        for number, (name, given) in enumerate(MODES.items()):
            workdir = root / f"{number}_{repeat}"
            run(workdir, RECIPES[options.recipe] + given, options.steps)
            found[name].append(measures(workdir, options.warm))
    base = statistics.median(row["seconds"] for row in found["synchronous, both devices"])
    print(
        f"recipe {options.recipe}, {options.steps - options.warm} updates of 128 rollouts, "
        f"medians of {options.repeats}; runs in {root}\n"
    )
    columns = ("seconds an update", "range", "throughput, synchronous = 1", "tokens/s")
    columns += ("learner idle for generation", "generator busy", "steps ahead at most")
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, runs in found.items():
        middle = {key: statistics.median(row[key] for row in runs) for key in runs[0]}
        seconds = [row["seconds"] for row in runs]
        print(
            f"| {name} | {middle['seconds']:.3f} | {min(seconds):.3f} to {max(seconds):.3f} "
            f"| {base / middle['seconds']:.2f} | {middle['tokens/s']:.0f} "
            f"| {middle['learner idle']:.1%} | {middle['generator busy']:.0%} "
            f"| {middle['ahead']:.0f} |"
        )


if __name__ == "__main__":
    main()
