"""Runs whose rollouts are drawn ahead, killed again and again: does every one of them end as if
nobody had killed it?

    python scripts/kill_storm.py --workdir runs/kills --output experiments/results/kills.md

Of each way to draw, a run on the mini pair is sent SIGKILL at random moments: its learner, its
generator, or both, each a process of its own where the generator is one. What was killed is started
again by the same command, and after the last kill left to finish. Then the table tells whether the
final weights, and the metrics of every step, are bit for bit those of a run that nobody killed, and
whether every rollout of every step is there once, whole, and as old as the schedule says.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
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
from safetensors.numpy import load_file

from opdjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    MeshConfig,
    NearPolicyConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.validation import to_dict
from opdjax.rollouts.near_policy import shards
from opdjax.runs.workdir import read_lines

BASE = Config(
    data=DataConfig(max_prompt_length=32),
    sampling=SamplingConfig(max_completion_length=12, num_generations=2),
    estimator=EstimatorConfig("npd", tile=64),
    optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=1),
    train=TrainConfig(num_steps=48, prompts_per_step=4, pack_length=60),
    evaluation=EvaluationConfig(source=None),
    checkpoint=CheckpointConfig(every=3),
    log=LogConfig(samples_every=0, diagnostics_every=1),
    mesh=MeshConfig(1),
)
REFRESH = {"schedule": "refresh", "num_epochs": 4, "refresh_epochs": (1, 2), "shard_size": 16}
CONTINUOUS = {
    "schedule": "continuous",
    "max_staleness": 2,
    "filter": "ifd",
    "ifd_min": None,
    "ifd_quantile": 0.7,
}
THREAD = {"generator": "thread", "generator_devices": 1}
WAYS = {
    "refresh, inline": REFRESH,
    "refresh, process": REFRESH | {"generator": "process"},
    "continuous, fixed lag 2, inline": CONTINUOUS,
    "continuous, fixed lag 2, thread": CONTINUOUS | THREAD,
    "continuous, fixed lag 2, process": CONTINUOUS | {"generator": "process"},
    "continuous, free lag to 2, thread": CONTINUOUS | THREAD | {"lag": "free"},
    "continuous, free lag to 2, process": CONTINUOUS | {"generator": "process", "lag": "free"},
}
LONGEST = 300  # seconds that a run may take to finish once nobody kills it


class Run:
    """The processes of one run."""

    def __init__(self, config: Config, workdir: pathlib.Path):
        self.workdir, self._saved = workdir, workdir.with_suffix(".json")
        self._saved.write_text(json.dumps({"config": to_dict(config)}))
        self._log = workdir.with_suffix(".log").open("w")
        self.roles = (
            ("learner", "generator") if config.near_policy.generator == "process" else ("learner",)
        )
        self._devices = 2 if config.near_policy.generator == "thread" else 1
        self._running: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Whatever does not run, and has not done its work."""
        for role in self.roles:
            if role not in self._running and not (self.workdir / "result.json").exists():
                given = {
                    "JAX_PLATFORMS": "cpu",
                    "JAX_NUM_CPU_DEVICES": str(self._devices),
                    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                }
                given |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
                verb = ("train", "--workdir") if role == "learner" else ("sample", "--store")
                command = [
                    sys.executable,
                    "-m",
                    "opdjax",
                    verb[0],
                    str(self._saved),
                    verb[1],
                    str(self.workdir),
                ]
                self._running[role] = subprocess.Popen(
                    command, env=os.environ | given, stdout=self._log, stderr=subprocess.STDOUT
                )

    def kill(self, roles: tuple[str, ...]) -> None:
        """SIGKILL, all at once."""
        killed = [self._running.pop(role) for role in roles if role in self._running]
        for process in killed:
            process.kill()
        for process in killed:
            process.wait()

    def lasts(self, is_over: Callable[[], bool]) -> bool:
        """Whether the run still goes on when `is_over`; RuntimeError where a process of it ends
        with an error.
        """
        while any(process.poll() is None for process in self._running.values()):
            if any(process.poll() for process in self._running.values()):
                break
            if is_over():
                return True
            time.sleep(0.002)
        if any(process.poll() for process in self._running.values()):
            self.kill(self.roles)
            raise RuntimeError(f"a process of {self.workdir} failed; see {self._log.name}")
        return False

    def finish(self) -> None:
        """Leave it alone until it has ended; RuntimeError where that takes too long."""
        deadline = time.monotonic() + LONGEST
        if self.lasts(lambda: time.monotonic() > deadline):
            self.kill(self.roles)
            raise RuntimeError(
                f"{self.workdir} is not finished after {LONGEST} s; see {self._log.name}"
            )

    def progress(self) -> dict[str, int]:
        """What each end has done: bytes of metrics, files of rollouts."""
        metrics = self.workdir / "metrics.jsonl"
        files = sum(1 for _ in (self.workdir / "rollouts").glob("*/*"))
        return {"learner": metrics.stat().st_size if metrics.exists() else 0, "generator": files}


def stormed(
    config: Config, workdir: pathlib.Path, kills: int, rng: random.Random
) -> dict[str, int]:
    """A run killed so many times, then left to finish; how often each role was killed, and how
    often while rows were written.
    """
    run, counts = Run(config, workdir), collections.Counter()
    run.start()
    while counts["kills"] < kills:
        # Of four kills one at any moment, its start and the compiling included, three a little
        # after either end has done something.
        watched, before = rng.choice(("learner", "generator")), run.progress()
        deadline = time.monotonic() + (rng.uniform(0.1, 8) if rng.random() < 0.25 else LONGEST)
        if not run.lasts(
            lambda: time.monotonic() > deadline or run.progress()[watched] != before[watched]
        ):
            break  # finished: the table says after how many kills
        counts["at work"] += run.progress() != before
        time.sleep(rng.uniform(0, 0.2))
        roles = (
            rng.choice((("learner",), ("generator",), ("learner", "generator")))
            if len(run.roles) > 1
            else run.roles
        )
        run.kill(roles)
        counts.update(roles)
        counts["kills"] += 1
        run.start()
    run.finish()
    return dict(counts)


def account(config: Config, workdir: pathlib.Path) -> list[str]:
    """What is amiss with the stored rollouts: lost, there more than once, damaged, or of another
    age than the schedule allows.
    """
    near, wanted, found, amiss = (
        config.near_policy,
        collections.Counter(),
        collections.Counter(),
        [],
    )
    for version in shards.versions(workdir):
        directory = shards.version_directory(workdir, version)
        samples, annotations = (
            shards.shard_paths(directory, stage) for stage in ("samples", "annotations")
        )
        if samples.keys() != annotations.keys():
            amiss.append(
                f"version {version}: samples {sorted(samples)}, annotations {sorted(annotations)}"
            )
        amiss += [f"left behind: {path.name}" for path in directory.glob("*.partial*")]
        for number, path in samples.items():
            shard = shards.read_shard(path)
            read = shards.read_shard(annotations[number]) if number in annotations else shard
            amiss += [f"{path.name}: another annotation"] * (
                not np.array_equal(shard.columns["prompt_id"], read.columns["prompt_id"])
            )
            columns = (
                shard.columns[name].tolist()
                for name in ("step", "prompt_id", "sample_id", "policy_version")
            )
            for step, prompt, sample, drawn in zip(*columns):
                found[step, prompt, sample] += 1
                ages = (
                    range(near.max_staleness + 1)
                    if near.lag == "free"
                    else [min(near.max_staleness, step)]
                )
                amiss += [f"step {step} drawn by version {drawn}"] * (
                    drawn != version or step - drawn not in ages
                )
    steps = config.refresh_steps or range(config.train.num_steps)
    per_step = config.rows_per_step * (config.steps_per_epoch if config.refresh_steps else 1)
    wanted = dict.fromkeys(steps, per_step)
    counted = collections.Counter(step for step, _, _ in found)
    amiss += [
        f"step {step}: {counted[step]} of {wanted.get(step, 0)} rollouts"
        for step in wanted | counted
        if counted[step] != wanted.get(step)
    ]
    amiss += [f"twice: {key}" for key, count in found.items() if count > 1]
    return amiss


def told(workdir: pathlib.Path) -> list[dict]:
    """The metrics of every step, timing aside."""
    rows = read_lines(workdir / "metrics.jsonl")
    return [
        {
            k: v
            for k, v in row.items()
            if not k.startswith("time/") and k != "perf/tokens_per_second"
        }
        for row in rows
    ]


def is_same(left: pathlib.Path, right: pathlib.Path) -> bool:
    """Whether weights and metrics are equal, bit for bit."""
    weights = [load_file(path / "student" / "model.safetensors") for path in (left, right)]
    same = weights[0].keys() == weights[1].keys() and all(
        np.array_equal(value, weights[1][name]) for name, value in weights[0].items()
    )
    return same and told(left) == told(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, help="a Markdown file for the table")
    parser.add_argument("--kills", type=int, default=6, help="of each way to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="ways that contain this")
    options = parser.parse_args()
    lines = [
        "| rollouts | kills (learner, generator) | while it wrote | as undisturbed, bit for bit | rollouts | seconds |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    shutil.rmtree(options.workdir, ignore_errors=True)
    options.workdir.mkdir(parents=True)
    is_clean = True
    for way, given in WAYS.items():
        if options.only and options.only not in way:
            continue
        config = dataclasses.replace(BASE, near_policy=NearPolicyConfig(**given))
        rng, name, began = (
            random.Random(f"{options.seed} {way}"),
            way.replace(", ", "_").replace(" ", "_"),
            time.monotonic(),
        )
        calm, storm = options.workdir / f"{name}_calm", options.workdir / f"{name}_storm"
        run = Run(config, calm)
        run.start()
        run.finish()
        counts = stormed(config, storm, options.kills, rng)
        amiss = account(config, calm) + account(config, storm)
        same = is_same(calm, storm) if config.near_policy.lag == "fixed" else None
        is_clean &= not amiss and same is not False
        by_role = ", ".join(str(counts.get(role, 0)) for role in ("learner", "generator"))
        verdict = "; ".join(amiss[:3]) or "all there, once"
        agrees = {True: "yes", False: "**no**", None: "not promised"}[same]
        cells = [
            way,
            f"{counts.get('kills', 0)} ({by_role})",
            str(counts.get("at work", 0)),
            agrees,
            verdict,
        ]
        lines.append("| " + " | ".join([*cells, f"{time.monotonic() - began:.0f}"]) + " |")
        print(lines[-1], flush=True)
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")
    sys.exit(0 if is_clean else 1)


if __name__ == "__main__":
    main()
