"""Asynchronous against synchronous generation on the same two simulated devices, and whether the
learner ever waits.

    python scripts/benchmark_async.py                  # prints a table; --workdir keeps the runs, for opdjax report
    python scripts/benchmark_async.py --repeats 3 --steps 60

Every run is the mini pair on the same prompts with the same number of updates, in a process of its
own with two simulated CPU devices: synchronous on both (data parallel, the paper's on-policy
baseline), and asynchronous with one device each for generator and learner. The steps before the
buffer is warm, and those in which programs are compiled, are left out of all figures. Two devices
of one machine share its cores and memory: what overlaps here is the work, not the hardware.
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
    """One training run on simulated devices."""
    command = [
        sys.executable,
        "-m",
        "opdjax",
        "train",
        "experiments/mini_vopd.py",
        "--workdir",
        str(workdir),
    ]
    command += [
        "--train.num-steps",
        str(steps),
        "--evaluation.source",
        "None",
        "--evaluation.extra-temperatures",
    ]
    command += [
        "--log.samples-every",
        "0",
        "--log.diagnostics-every",
        "0",
        "--checkpoint.every",
        str(steps),
        *options,
    ]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def rows_of(file: pathlib.Path) -> list[dict]:
    """The rows of a JSONL file; none where there is none."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def measures(workdir: pathlib.Path, warm: int) -> dict[str, float]:
    """Per update from step `warm` on: seconds, tokens a second, the share lost for want of
    rollouts, most steps stored ahead.
    """
    metrics = [row for row in rows_of(workdir / "metrics.jsonl") if row["step"] > warm]
    spans = rows_of(workdir / "timeline-learner.jsonl")
    idle = sum(
        row.get(f"time/{name}", 0) for row in metrics for name in ("wait", "sample", "annotate")
    )
    seconds = sum(row["time/step"] for row in metrics)
    if spans:  # from the clock on the wall: what lies between the phases counts as well
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
    """The share of its time that a generator draws and annotates; NaN where it takes turns with the
    learner.
    """
    spans = [row for row in rows_of(workdir / "timeline-generator.jsonl") if row["step"] > warm]
    if not any(row["what"] == "admit" for row in spans):
        return float("nan")
    whole = max(row["start"] + row["seconds"] for row in spans) - min(row["start"] for row in spans)
    return sum(row["seconds"] for row in spans if row["what"] != "admit") / whole


def most_ahead(workdir: pathlib.Path) -> float:
    """The most steps whose rollouts were stored and not yet trained on."""
    drawn = {
        row["step"]: row["start"] + row["seconds"]
        for row in rows_of(workdir / "timeline-generator.jsonl")
        if row["what"] != "admit"
    }
    taken = {
        row["step"] - 1: row["start"]
        for row in rows_of(workdir / "timeline-learner.jsonl")
        if row["what"] == "pack"
    }
    moments = sorted(
        [(at, 1) for at in drawn.values()] + [(taken[step], -1) for step in drawn if step in taken]
    )
    depth = most = 0
    for _, change in moments:
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
    for repeat in range(
        options.repeats
    ):  # modes in turn, so that a busy minute of the machine meets them all
        for number, (name, given) in enumerate(MODES.items()):
            workdir = root / f"{number}_{repeat}"
            run(workdir, RECIPES[options.recipe] + given, options.steps)
            found[name].append(measures(workdir, options.warm))
    base = statistics.median(row["seconds"] for row in found["synchronous, both devices"])
    print(
        f"recipe {options.recipe}, {options.steps - options.warm} updates of 128 rollouts, medians of {options.repeats}; runs in {root}\n"
    )
    columns = (
        "seconds an update",
        "range",
        "throughput, synchronous = 1",
        "tokens/s",
        "learner idle for generation",
        "generator busy",
    )
    print(f"| | {' | '.join(columns)} | steps ahead at most |\n|{'---|' * (len(columns) + 2)}")
    for name, runs in found.items():
        middle = {key: statistics.median(row[key] for row in runs) for key in runs[0]}
        spread = f"{min(row['seconds'] for row in runs):.3f} to {max(row['seconds'] for row in runs):.3f}"
        print(
            f"| {name} | {middle['seconds']:.3f} | {spread} | {base / middle['seconds']:.2f} | {middle['tokens/s']:.0f} "
            f"| {middle['learner idle']:.1%} | {middle['generator busy']:.0%} | {middle['ahead']:.0f} |"
        )


if __name__ == "__main__":
    main()
