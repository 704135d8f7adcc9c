"""Kill asynchronous runs again and again, and check that each ends as if it had not been killed.

    python scripts/kill_storm.py --workdir runs/kills --output experiments/results/kills.md

For each schedule, a run on the mini pair receives SIGKILL at random moments: its learner, its
generator, or both if the generator is a process. The same command starts it again, and after the
last kill it runs to its end. The table says whether the final weights and the metrics of every step
are bit-identical to those of a run without kills, and whether every rollout of every step is stored
exactly once, undamaged, and as old as the schedule says.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from benchmarks.core import progress, to_markdown

from opdjax.config import Config
from opdjax.config.validation import from_dict, to_dict
from opdjax.rollouts.near_policy import shards
from opdjax.runs.workdir import read_lines

BASE = {
    "data": {"max_prompt_length": 32},
    "sampling": {"max_completion_length": 12, "num_generations": 2},
    "estimator": {"recipe": "npd"},
    "optimizer": {"learning_rate": 5e-3, "warmup_steps": 1},
    "train": {"num_steps": 48, "prompts_per_step": 4, "pack_length": 60},
    "evaluation": {"source": None},
    "checkpoint": {"every": 3},
    "log": {"samples_every": 0, "diagnostics_every": 1},
    "mesh": {"data": 1},
}
REFRESH = {"schedule": "refresh", "num_epochs": 4, "refresh_epochs": [1, 2]}
CONTINUOUS = {"schedule": "continuous", "max_staleness": 2}
CONTINUOUS |= {"filter": "ifd", "ifd_min": None, "ifd_quantile": 0.7}
PROCESS, THREAD, FREE = {"generator": "process"}, {"generator": "thread"}, {"lag": "free"}
SCHEDULES = {
    "refresh, inline": REFRESH,
    "refresh, process": REFRESH | PROCESS,
    "continuous, fixed lag 2, inline": CONTINUOUS,
    "continuous, fixed lag 2, thread": CONTINUOUS | THREAD,
    "continuous, fixed lag 2, process": CONTINUOUS | PROCESS,
    "continuous, free lag to 2, thread": CONTINUOUS | THREAD | FREE,
    "continuous, free lag to 2, process": CONTINUOUS | PROCESS | FREE,
}
_WORDS = {True: "yes", False: "**no**", None: "not promised"}
LONGEST = 300  # seconds that a run may take to finish after the last kill


class Run:
    """The processes of one run."""

    def __init__(self, config: Config, workdir: pathlib.Path):
        self.workdir, saved = workdir, str(workdir.with_suffix(".json"))
        pathlib.Path(saved).write_text(json.dumps({"config": to_dict(config)}))
        self._log = workdir.with_suffix(".log").open("w")
        self._commands = {"learner": ["train", saved, "--workdir", str(workdir)]}
        if config.near_policy.generator == "process":
            self._commands["generator"] = ["sample", saved, "--store", str(workdir)]
        self.roles = tuple(self._commands)
        self._environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2" if config.near_policy.generator == "thread" else "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._running: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Start the processes that are not running, unless the run is complete."""
        output = {"stdout": self._log, "stderr": subprocess.STDOUT, "env": self._environment}
        for role, words in self._commands.items():
            if role not in self._running and not (self.workdir / "result.json").exists():
                command = [sys.executable, "-m", "opdjax", *words]
                self._running[role] = subprocess.Popen(command, **output)

    def kill(self, roles: tuple[str, ...]) -> None:
        """Send SIGKILL to all of these, then wait for them."""
        killed = [self._running.pop(role) for role in roles if role in self._running]
        for process in killed:
            process.kill()
        for process in killed:
            process.wait()

    def lasts(self, is_over: Callable[[], bool]) -> bool:
        """Wait for `is_over` or the end of the run; return whether the run still works.

        RuntimeError if one of its processes fails.
        """
        while None in (states := [process.poll() for process in self._running.values()]):
            if any(states):
                break
            if is_over():
                return True
            time.sleep(0.002)
        if any(process.poll() for process in self._running.values()):
            self.kill(self.roles)
            raise RuntimeError(f"a process of {self.workdir} failed; see {self._log.name}")
        return False

    def finish(self) -> None:
        """Wait for the end of the run; RuntimeError after LONGEST seconds."""
        deadline = time.monotonic() + LONGEST
        if self.lasts(lambda: time.monotonic() > deadline):
            self.kill(self.roles)
            late = f"{self.workdir} is not finished after {LONGEST} s; see {self._log.name}"
            raise RuntimeError(late)

    def progress(self) -> dict[str, int]:
        """Return bytes of metrics (learner) and files of rollouts (generator)."""
        metrics = self.workdir / "metrics.jsonl"
        files = sum(1 for _ in (self.workdir / "rollouts").glob("*/*"))
        return {"learner": metrics.stat().st_size if metrics.exists() else 0, "generator": files}


def stormed(config: Config, workdir: pathlib.Path, kills: int, rng: random.Random) -> dict:
    """Kill a run `kills` times, then let it finish.

    Returns the number of kills of each role, and of those while rows were being written.
    """
    run, counts = Run(config, workdir), collections.Counter()
    both = [*((role,) for role in run.roles), run.roles]
    run.start()
    while counts["kills"] < kills:
        # One kill in four comes at any moment, also during start and compilation; the others come
        # shortly after learner or generator has written something.
        watched, before = rng.choice(("learner", "generator")), run.progress()
        deadline = time.monotonic() + (rng.uniform(0.1, 8) if rng.random() < 0.25 else LONGEST)

        def is_due(watched=watched, before=before, deadline=deadline) -> bool:
            return time.monotonic() > deadline or run.progress()[watched] != before[watched]

        if not run.lasts(is_due):
            break  # finished: the table counts the kills
        counts["at work"] += run.progress() != before
        time.sleep(rng.uniform(0, 0.2))
        roles = rng.choice(both) if len(run.roles) > 1 else run.roles
        run.kill(roles)
        counts.update((*roles, "kills"))
        run.start()
    run.finish()
    return counts


def account(config: Config, workdir: pathlib.Path) -> list[str]:
    """Return what is wrong with the stored rollouts: lost, repeated, damaged, of a wrong age."""
    near, found, problems = config.near_policy, collections.Counter(), []
    for version in shards.versions(workdir):
        directory = shards.version_directory(workdir, version)
        problems += [f"left behind: {path.name}" for path in directory.glob("*.partial*")]
        stages = ("samples", "annotations")
        samples, annotations = (shards.shard_paths(directory, stage) for stage in stages)
        if samples.keys() != annotations.keys():
            numbers = f"samples {sorted(samples)}, annotations {sorted(annotations)}"
            problems.append(f"version {version}: {numbers}")
        for number in samples.keys() & annotations.keys():
            columns, read = (
                shards.read_shard(paths[number]).columns for paths in (samples, annotations)
            )
            if not np.array_equal(columns["prompt_id"], read["prompt_id"]):
                problems.append(f"{samples[number].name}: another annotation")
            names = ("step", "prompt_id", "sample_id", "policy_version")
            for step, prompt, sample, policy in zip(*(columns[name].tolist() for name in names)):
                found[step, prompt, sample] += 1
                oldest = near.max_staleness
                ages = range(oldest + 1) if near.lag == "free" else [min(oldest, step)]
                if policy != version or step - policy not in ages:
                    problems.append(f"step {step} sampled by version {policy}")
    steps = config.refresh_steps or range(config.train.num_steps)
    per_step = config.rows_per_step * (config.steps_per_epoch if config.refresh_steps else 1)
    wanted, counted = dict.fromkeys(steps, per_step), collections.Counter(key[0] for key in found)
    for step in wanted | counted:
        if counted[step] != wanted.get(step):
            problems.append(f"step {step}: {counted[step]} of {wanted.get(step, 0)} rollouts")
    return problems + [f"repeated: {key}" for key, count in found.items() if count > 1]


def outcome(workdir: pathlib.Path) -> tuple[bytes, list[dict]]:
    """Return the weights, and the metrics of every step without times."""
    is_time = lambda name: name.startswith("time/") or name == "perf/tokens_per_second"
    rows = read_lines(workdir / "metrics.jsonl")
    metrics = [{name: value for name, value in row.items() if not is_time(name)} for row in rows]
    return (workdir / "student" / "model.safetensors").read_bytes(), metrics


def compared(schedule: str, options: argparse.Namespace) -> tuple[dict[str, str], bool]:
    """Return (the row of the table, whether nothing is wrong)."""
    config = from_dict(Config, BASE | {"near_policy": SCHEDULES[schedule]})
    rng, began = random.Random(f"{options.seed} {schedule}"), time.monotonic()
    name = schedule.replace(", ", "_").replace(" ", "_")
    calm, storm = options.workdir / f"{name}_calm", options.workdir / f"{name}_storm"
    run = Run(config, calm)
    run.start()
    run.finish()
    counts = stormed(config, storm, options.kills, rng)
    is_same = outcome(calm) == outcome(storm) if config.near_policy.lag == "fixed" else None
    problems = account(config, calm) + account(config, storm)
    by_role = ", ".join(str(counts[role]) for role in ("learner", "generator"))
    row = {
        "schedule": schedule,
        "kills (learner, generator)": f"{counts['kills']} ({by_role})",
        "while it wrote": str(counts["at work"]),
        "bit-identical to a run without kills": _WORDS[is_same],
        "rollouts": "; ".join(problems[:3]) or "each stored once",
        "seconds": f"{time.monotonic() - began:.0f}",
    }
    return progress(row), not problems and is_same is not False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, help="Markdown file for the table")
    parser.add_argument("--kills", type=int, default=6, help="kills of each schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only schedules whose name contains this")
    options = parser.parse_args()
    wanted = [schedule for schedule in SCHEDULES if options.only in schedule]
    if not wanted:
        parser.error(f"--only {options.only} is part of no schedule; there are {list(SCHEDULES)}")
    shutil.rmtree(options.workdir, ignore_errors=True)
    options.workdir.mkdir(parents=True)
    rows, are_clean = zip(*(compared(schedule, options) for schedule in wanted))
    print(to_markdown(rows))
    if options.output:
        options.output.write_text(to_markdown(rows) + "\n")
    sys.exit(0 if all(are_clean) else 1)


if __name__ == "__main__":
    main()
