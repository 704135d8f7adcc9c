"""Runs for `scripts/chaos.py` and `scripts/soak.py`: short ones of every kind, in forked processes,
and what is left of them.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import importlib
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import jax
import numpy as np

from opdjax.cli.main import main as opdjax_main
from opdjax.config import Config
from opdjax.config.validation import from_dict, to_dict
from opdjax.rollouts.near_policy import shards
from opdjax.runs.workdir import read_lines

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))  # the fake gs://
for _name in ("refresh", "continuous"):  # forked processes find them imported
    importlib.import_module(f"opdjax.rollouts.near_policy.{_name}")
ENVIRONMENT = {
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "OPDJAX_LEASE_SECONDS": "6",
    # Compiles three times as fast.
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
}
JAX = {
    "jax_platforms": "cpu",
    "jax_disable_most_optimizations": True,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_enable_compilation_cache": True,
}
LONGEST = float(os.environ.get("CHAOS_LONGEST", 120))  # seconds after which a process hangs
FORK = multiprocessing.get_context("fork")
COMPILED = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
# Metrics that differ from run to run.
UNEQUAL = ("time/", "perf/tokens_per_second", "api/", "problems")
UNREADABLE = "damaged and named by its reader: "
URL = "gs://bucket/run"
BASE = {
    "data": {"max_prompt_length": 32},
    "sampling": {"max_completion_length": 6, "num_generations": 2},
    "estimator": {"recipe": "opd"},
    "optimizer": {"learning_rate": 5e-3, "warmup_steps": 1},
    "train": {"num_steps": 4, "prompts_per_step": 2},
    "evaluation": {"num_prompts": 2, "num_samples": 1, "max_completion_length": 6, "every": 2},
    "checkpoint": {"every": 2},
    "log": {"samples_every": 1, "diagnostics_every": 2},
    "mesh": {"data": 1},
}
REFRESH = {"schedule": "refresh", "num_epochs": 2, "refresh_epochs": [1]}
LAG = {"schedule": "continuous", "max_staleness": 2}
FILTERED = LAG | {"filter": "ifd", "ifd_min": None, "ifd_quantile": 0.7}
JUDGE = {"model": "rules"}
JUDGED = {"estimator": {"recipe": "ropd"}, "rubricator": JUDGE, "verifier": JUDGE}


def near(**given) -> dict:
    return {"near_policy": given, "estimator": {"recipe": "npd"}, "evaluation": {"source": None}}


MODES = {
    "on-policy": {},
    "two processes": {"mesh": {"data": 2, "processes": 2}},
    "refresh": near(**REFRESH),
    "refresh, process": near(**REFRESH, generator="process"),
    "inline": near(**FILTERED),
    "thread": near(**FILTERED, generator="thread"),
    "process": near(**FILTERED, generator="process"),
    "free lag, thread": near(**LAG, lag="free", generator="thread"),
    "free lag, process": near(**LAG, lag="free", generator="process"),
    "judged": JUDGED,
    "judged, evolving": JUDGED | {"rubrics": {"refresh": "evolving"}},
    "gs": {},
    "gs, thread": near(**FILTERED, generator="thread"),
}


def work(
    words: list[str], environment: dict, settings: dict, arm: Callable[[], None], log: str
) -> None:
    """The life of a forked process: `opdjax` with these words, and these settings of jax."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= ENVIRONMENT | environment
    for name, value in (JAX | settings).items():
        jax.config.update(name, value)
    fsspec.config.set_conf_env(fsspec.config.conf)
    sys.argv = ["opdjax", *words]
    arm()
    opdjax_main()


@contextlib.contextmanager
def judge_server(*options: str) -> Iterator[str]:
    """The address of a rule-based judge."""
    command = [sys.executable, str(ROOT / "scripts" / "serve_rule_judge.py"), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([*command, *options], **pipes) as server:
        try:
            yield re.search(r"http://\S+", server.stdout.readline())[0]
        finally:
            server.terminate()


class Run:
    """A run of a mode in a directory of its own, on a local disk or gs://; `sections` of its config
    replace those of the mode.
    """

    def __init__(self, mode: str, directory: pathlib.Path, judge: str, store, **sections):
        self.directory, self.store, self._log = directory, store, directory / "log.txt"
        shutil.rmtree(directory, ignore_errors=True)
        (directory / "files").mkdir(parents=True)
        self.workdir, self._saved = directory / "files" / "run", directory / "config.json"
        self._sections = BASE | MODES[mode] | sections
        self.configure(judge)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self._port = free.getsockname()[1]
        place = URL if store else str(self.workdir)
        self.words = {"learner": ["train", str(self._saved), "--workdir", place]}
        if self.config.near_policy.generator == "process":
            self.words["generator"] = ["sample", str(self._saved), "--store", place]
        if self.config.mesh.processes == 2:
            self.words["other"] = self.words["learner"]
        self.running: dict[str, Any] = {}

    def configure(self, judge: str) -> None:
        """Write the config, with the address of a judge."""
        api = {"api": {"base_url": judge, "max_retries": 1}}
        self.config = from_dict(
            Config, self._sections | (api if "verifier" in self._sections else {})
        )
        self._saved.write_text(json.dumps({"config": to_dict(self.config)}))

    def start(self, arms: dict[str, Callable] | None = None, scratch: str = "a") -> None:
        """Start the processes that do not run."""
        is_threaded = self.config.near_policy.generator == "thread"
        environment = {"OPDJAX_SCRATCH": str(self.directory / "files" / scratch)}
        settings = {
            "jax_num_cpu_devices": 2 if is_threaded else 1,
            "jax_compilation_cache_dir": COMPILED or str(self.directory.parent / "compiled"),
        }
        for role in self.words.keys() - self.running.keys():
            if "other" in self.words:
                environment["JAX_COORDINATOR_ADDRESS"] = f"localhost:{self._port}"
                environment["JAX_PROCESS_ID"] = str(int(role == "other"))
            arm = (arms or {}).get(role, lambda: None)
            given = self.words[role], dict(environment), settings, arm, str(self._log)
            self.running[role] = FORK.Process(target=work, args=given, daemon=True)
            self.running[role].start()

    def wait(self, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Wait until then, or for the end of all processes; False if that takes too long. One that
        has failed takes the others of its group along, as launchers do.
        """
        deadline = time.monotonic() + LONGEST
        while not is_over() and any(each.is_alive() for each in self.running.values()):
            if time.monotonic() > deadline:
                return False
            if "other" in self.words and any(each.exitcode for each in self.running.values()):
                deadline = min(deadline, time.monotonic() + 20)
            time.sleep(0.01)
        return True

    def end(self, *roles: str) -> dict[str, int]:
        """End these processes, or all; their statuses, negative for a signal."""
        ended = {role: self.running.pop(role) for role in roles or list(self.running)}
        for process in ended.values():
            process.kill()
            process.join()
        return {role: process.exitcode for role, process in ended.items()}

    def said(self) -> str:
        """What all processes printed so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def beside(self) -> str | None:
        """Start the same run on another machine, or in another process, until it ends; a violation.
        It may wait for the lease of this one, take it over, or find a finished run.
        """
        other = copy.copy(self)
        other.running, other.words = {}, {"learner": self.words["learner"]}
        other._log = self._log.with_suffix(".other")
        other.start(scratch="b")
        is_ended, status, said = other.wait(), other.end()["learner"], other.said()
        is_refused = status == 2 and "is being written by another" in said
        is_fine = is_ended and (is_refused or status == 0)
        return None if is_fine else f"the second, {status}: {last_line(said)}"

    def steal_lease(self) -> None:
        """Another machine has taken the lease."""
        held = max(name for _, name in self.store.objects if "/.lease/" in name)
        about = json.loads(self.store.objects["bucket", held]["data"])
        name = f"run/.lease/{int(held.rpartition('/')[2]) + 1:06}"
        taken = about | {"owner": "another"}
        self.store.put("bucket", name, json.dumps(taken).encode(), {})

    def damage(self, path: str, change: Callable[[bytearray], bytearray | None]) -> None:
        """Replace the content of a file or an object; None removes it."""
        file, key = self.directory / "files" / path, ("bucket", path)
        data = self.store.objects[key]["data"] if self.store else file.read_bytes()
        new = change(bytearray(data)) if data else bytearray(b"\0")
        if self.store and new is None:
            del self.store.objects[key]
        elif self.store:
            self.store.put(*key, bytes(new), {})
        elif new is None:
            file.unlink()
        else:
            file.write_bytes(new)

    def files(self) -> list[str]:
        """The path of every file or object of the run."""
        if self.store:
            return self.store.names()
        root = self.directory / "files"
        return sorted(str(f.relative_to(root)) for f in self.workdir.rglob("*") if f.is_file())

    def outcome(self) -> dict:
        """What the run computed, without times and costs."""
        for path in self.files() if self.store else ():
            local = self.directory / "files" / path
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(self.store.objects["bucket", path]["data"])
        result = json.loads((self.workdir / "result.json").read_text())
        found = {"steps": (result["num_steps"], result["skipped_steps"])}
        if self.config.near_policy.schedule != "none":
            found["rollouts"] = account(self.config, self.workdir)
        if self.config.near_policy.lag == "free":
            return found
        for name in ("metrics", "samples", "eval", "rubrics"):
            found[name] = [
                {key: value for key, value in row.items() if not key.startswith(UNEQUAL)}
                for row in read_lines(self.workdir / f"{name}.jsonl")
            ]
        found["shards"] = sorted(path.name for path in self.workdir.glob("rollouts/*/*.parquet"))
        return found | {"weights": (self.workdir / "student" / "model.safetensors").read_bytes()}


def account(config: Config, workdir: pathlib.Path) -> list[str]:
    """What is wrong with the stored rollouts: lost, repeated, damaged, of a wrong age."""
    near, found, problems = config.near_policy, collections.Counter(), []
    for version in shards.versions(workdir):
        directory = shards.version_directory(workdir, version)
        problems += [f"left behind: {path.name}" for path in directory.glob("*.partial*")]
        samples, read = (shards.shard_paths(directory, s) for s in ("samples", "annotations"))
        if samples.keys() != read.keys():
            problems.append(f"version {version}: samples {[*samples]}, annotations {[*read]}")
        for number in samples.keys() & read.keys():
            try:
                both = [shards.read_shard(paths[number]).columns for paths in (samples, read)]
            except shards.ShardError as error:  # once trained on, no process reads it again
                problems.append(f"{UNREADABLE}{error}")
                continue
            columns, other = both
            if not np.array_equal(columns["prompt_id"], other["prompt_id"]):
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


def last_line(text: str) -> str:
    """The end of what a process said."""
    return (text.strip().splitlines() or ["(nothing)"])[-1][:300]
