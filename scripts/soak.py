"""Let a run train for an hour, and say whether its memory, descriptors, threads or speed drift.

    python scripts/soak.py thread --minutes 60 --out runs/soak
    python scripts/soak.py judged --minutes 60 --out runs/soak

The process is sampled from /proc. The first fifth of the time is left out: caches still fill. Each
slope is the median of the slopes between all pairs of samples (Theil and Sen), with its 95 %
interval. At the end the run receives SIGTERM; the seconds until its process ends are measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import matplotlib.pyplot as plt
from benchmarks.core import to_markdown
from chaos_runs import BASE, MODES, judge_server
from scipy.stats import theilslopes

from opdjax.config import Config
from opdjax.config.validation import from_dict, to_dict

QUANTITIES = {"memory": "MB", "descriptors": "", "threads": "", "steps per second": ""}
WARM_UP = 0.2  # share of the time that is left out


def config_of(mode: str, judge: str) -> Config:
    """A run that does not end by itself."""
    sections = {**BASE, **MODES[mode], "evaluation": {"source": None}, "checkpoint": {"every": 100}}
    sections |= {"train": {"num_steps": 1_000_000, "prompts_per_step": 4}}
    if mode == "judged":
        sections |= {"api": {"base_url": judge}}
    return from_dict(Config, sections)


def sample(pid: int, metrics: pathlib.Path) -> dict[str, float]:
    """Memory, descriptors and threads of the process now, and the steps that it has done."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    status, steps = dict(line.split(":", 1) for line in lines), 0
    if metrics.exists():
        with metrics.open("rb") as file:
            file.seek(max(metrics.stat().st_size - 100_000, 0))
            ended = file.read().split(b"\n")[:-1]
        steps = json.loads(ended[-1])["step"] if ended else 0
    return {
        "seconds": time.monotonic(),
        "memory": int(status["VmRSS"].split()[0]) / 1000,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "steps": steps,
    }


def soaked(command: list[str], metrics: pathlib.Path, minutes: float, every: float) -> dict:
    """The samples of a process, its status, and how long it took to answer SIGTERM."""
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    log = metrics.with_name("log.txt").open("w")
    with subprocess.Popen(command, env=os.environ | devices, stdout=log, stderr=log) as process:
        samples, end = [], None
        while end is None or time.monotonic() < end:
            time.sleep(every)
            if process.poll() is not None:
                raise RuntimeError(f"the run has ended, see {log.name}")
            samples.append(sample(process.pid, metrics))
            if end is None and samples[-1]["steps"]:  # compiled
                end, samples = time.monotonic() + 60 * minutes, samples[-1:]
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        status = process.wait()
    return {"samples": samples, "status": status, "answered": time.monotonic() - sent}


def slopes(samples: list[dict]) -> list[dict]:
    """A row for each quantity: its median, and its change per hour with the 95 % interval."""
    for before, now in itertools.pairwise(samples):
        passed = now["seconds"] - before["seconds"]
        now["steps per second"] = (now["steps"] - before["steps"]) / passed
    late = samples[max(int(WARM_UP * len(samples)), 1) :]
    hours = [row["seconds"] / 3600 for row in late]
    rows = []
    for name, unit in QUANTITIES.items():
        values = [row[name] for row in late]
        slope, _, low, high = theilslopes(values, hours, 0.95)
        row = {"quantity": f"{name} {unit}".strip(), "median": sorted(values)[len(values) // 2]}
        rows.append(row | {"per hour": float(slope), "low": float(low), "high": float(high)})
    return rows


def plot(samples: list[dict], file: pathlib.Path) -> None:
    """One panel for each quantity over minutes."""
    figure, axes = plt.subplots(len(QUANTITIES), figsize=(8, 9), sharex=True)
    minutes = [(row["seconds"] - samples[0]["seconds"]) / 60 for row in samples[1:]]
    for axis, (name, unit) in zip(axes, QUANTITIES.items()):
        axis.plot(minutes, [row[name] for row in samples[1:]], linewidth=1)
        axis.set_ylabel(f"{name} {unit}".strip())
    axes[-1].set_xlabel("minutes")
    figure.savefig(file, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mode", choices=["thread", "judged"])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=5, help="seconds between samples")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/soak"))
    options = parser.parse_args()
    workdir = options.out / options.mode
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    saved = options.out / f"{options.mode}-config.json"
    with judge_server() as judge:
        saved.write_text(json.dumps({"config": to_dict(config_of(options.mode, judge))}))
        command = [sys.executable, "-m", "opdjax", "train", str(saved), "--workdir", str(workdir)]
        found = soaked(command, workdir / "metrics.jsonl", options.minutes, options.every)
    found["slopes"] = slopes(found["samples"])
    (options.out / f"{options.mode}.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found["samples"], options.out / f"{options.mode}.svg")
    print(to_markdown(found["slopes"]))
    print(f"\nSIGTERM answered after {found['answered']:.1f} s with status {found['status']}")


if __name__ == "__main__":
    main()
